"""One tiny corpus a session; every run has a directory of its own."""

from pathlib import Path

import pytest

from tests.runs import write_corpus


@pytest.fixture(scope="session", name="corpus")
def _corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight shards of learnable tokens."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
