"""Stores of every kind, and the servers behind them, for the contract tests."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import s3
from trainer.contract.config import StoreConfig
from trainer.contract.store import Store, open_store


@pytest.fixture(scope="session")
def moto_server() -> Iterator[s3.S3Server]:
    """One moto server for the session."""
    with s3.moto() as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.S3Server]:
    """One SeaweedFS server for the session."""
    with s3.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(params=["file", "memory", "moto", "seaweedfs", "apart"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty store of every kind."""
    unique = uuid.uuid4().hex
    match request.param:
        case "file":
            config = StoreConfig(url="file://./store")
        case "memory":
            config = StoreConfig(url=f"memory://{unique}")
        case kind:
            server: s3.S3Server = request.getfixturevalue(f"{'seaweedfs' if kind == 'apart' else kind}_server")
            config = server.config(prefix=unique)
    opened = open_store(config, tmp_path, "run-1", apart=request.param == "apart")
    opened.make_place()
    yield opened
    opened.close()
