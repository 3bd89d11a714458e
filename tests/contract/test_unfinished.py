"""What dead transfers leave behind: removed below our own prefix, and nobody else's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import s3
from trainer.contract.config import StoreConfig
from trainer.contract.store import KeyInvalid, Store, open_store

_DEADLINE_S = 60.0
#: Larger than s3fs sends at once, so that it goes in parts; killed once the first part is there.
_UPLOAD = """
import sys
from pathlib import Path
from trainer.contract.config import StoreConfig
from trainer.contract.store import open_store
config = StoreConfig.model_validate_json(sys.argv[1])
open_store(config, Path(), sys.argv[2]).put_file("data/000000000001-e1-1/half", Path(sys.argv[3]))
"""


def _uploads(store: Store) -> list[str]:
    """Keys of the multipart uploads of the whole bucket that have not ended."""
    fs: Any = store.backend._fs  # type: ignore[attr-defined]
    bucket = store.backend._root.split("/")[0]  # type: ignore[attr-defined]
    return [upload["Key"] for upload in fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])]


def _kill_half_way(config: StoreConfig, run: str, file: Path, seen_by: Store) -> None:
    before = len(_uploads(seen_by))
    command = [sys.executable, "-c", _UPLOAD, config.model_dump_json(), run, str(file)]
    process = subprocess.Popen(command)
    end_s = time.monotonic() + _DEADLINE_S
    try:
        while len(_uploads(seen_by)) == before:
            assert process.poll() is None, "it came to its end"
            assert time.monotonic() < end_s
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("kind", ["moto", "seaweedfs"])
def test_multipart_uploads_of_the_killed_are_ended(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    """An uploader killed half-way leaves parts that no listing shows; the next one ends those of its own run only."""
    server: s3.S3Server = request.getfixturevalue(f"{kind}_server")
    config = server.config(prefix="unfinished")
    file = tmp_path / "large"
    with file.open("wb") as opened:
        opened.truncate(400 << 20)
    ours, theirs = (open_store(config, tmp_path, run) for run in ("run-1", "run-2"))
    for run in ("run-1", "run-2"):
        _kill_half_way(config, run, file, ours)
    assert ours.list() == []
    assert ours.abort_unfinished("data/") == 1
    assert [key.split("/")[1] for key in _uploads(theirs)] == ["run-2"]
    assert theirs.abort_unfinished("data/") == 1
    assert ours.abort_unfinished("data/") == 0
    for store in (ours, theirs):
        store.close()


def test_files_that_were_being_written_are_removed(tmp_path: Path) -> None:
    """On a disk these are private files beside the objects; other prefixes and whole objects stay."""
    store = open_store(StoreConfig(url="file://./store"), tmp_path, "run-1")
    store.make_place()
    store.create("data/c/whole", b"1")
    store.create("verdicts/whole", b"1")
    root = tmp_path / "store/run-1"
    (root / "data/c/.part-dead").write_bytes(b"half")
    (root / "verdicts/.part-living").write_bytes(b"half")
    assert store.abort_unfinished("data/") == 1
    assert [item.key for item in store.list()] == ["data/c/whole", "verdicts/whole"]
    assert (root / "verdicts/.part-living").exists()
    with pytest.raises(KeyInvalid):
        store.abort_unfinished("../")
