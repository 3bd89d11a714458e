"""The process that talks to a remote storage for a supervisor: its cost, and what deaths on either side mean."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests import s3
from trainer.contract.apart import ApartBackend
from trainer.contract.store import Store, StoreConfigInvalid, StoreUnavailable, open_store


@pytest.fixture
def apart(moto_server: s3.S3Server, tmp_path: Path) -> Iterator[Store]:
    """A store that another process talks to."""
    with closing(open_store(moto_server.config(prefix=tmp_path.name), tmp_path, "run-1", apart=True)) as store:
        yield store


def _pid(store: Store) -> int:
    assert isinstance(store.backend, ApartBackend)
    assert store.backend._process is not None
    return store.backend._process.pid


def test_a_killed_process_is_a_store_that_did_not_answer_and_the_next_call_starts_another(apart: Store) -> None:
    """A create is looked at and repeated by the store itself, a read is the caller's to repeat."""
    apart.create("a", b"1")
    first = _pid(apart)
    os.kill(first, 9)
    with pytest.raises(StoreUnavailable, match="store"):
        apart.read("a")
    assert apart.read("a") == b"1"
    assert _pid(apart) != first
    os.kill(_pid(apart), 9)
    apart.create("b", b"2")
    assert [one.key for one in apart.list()] == ["a", "b"]


def test_a_process_that_hangs_costs_the_deadline(apart: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed, not waited for."""
    apart.create("a", b"1")
    monkeypatch.setattr("trainer.contract.apart._MARGIN_S", 0.0)
    stopped = _pid(apart)
    os.kill(stopped, 19)
    apart.timeout_s = 0.2
    with pytest.raises(StoreUnavailable, match="timeout_s"):
        apart.read("a")
    assert not Path(f"/proc/{stopped}").exists()
    apart.timeout_s = 30.0
    assert apart.read("a") == b"1"


def test_large_objects_pass_whole(apart: Store, tmp_path: Path) -> None:
    """Longer than any socket buffer, both ways."""
    data = os.urandom(9 << 20)
    (tmp_path / "file").write_bytes(data)
    apart.put_file("file", tmp_path / "file")
    apart.create("bytes", data)
    assert apart.read("file") == apart.read("bytes") == data
    assert b"".join(apart.stream("file", len(data), 1 << 20)) == data


def test_it_ends_with_whom_it_serves(moto_server: s3.S3Server, tmp_path: Path) -> None:
    """Also when that one is killed; and the one that asks loads none of the libraries."""
    code = f"""
import os, sys
from pathlib import Path
from trainer.contract.config import StoreConfig
from trainer.contract.store import open_store
config = StoreConfig.model_validate_json({moto_server.config(prefix="ends").model_dump_json()!r})
store = open_store(config, Path("."), "run-1", apart=True)
store.create("a", b"1")
print(store.backend._process.pid, any(name in sys.modules for name in ("fsspec", "s3fs", "botocore")), flush=True)
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    pid, heavy = ended.stdout.split()
    assert (ended.returncode, heavy) == (-9, "False")
    deadline_s = time.monotonic() + 30
    while _runs(int(pid)):
        assert time.monotonic() < deadline_s, "it lives on without anybody to serve"


def test_what_is_wrong_with_the_configuration_is_said_at_once(tmp_path: Path) -> None:
    """As without it."""
    config = s3.S3Server("http://127.0.0.1:1", "b", None).config().model_copy(update={"key_env": "LONGWATCH_UNSET"})
    with pytest.raises(StoreConfigInvalid, match="LONGWATCH_UNSET"):
        open_store(config, tmp_path, "run-1", apart=True)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
