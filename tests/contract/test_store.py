"""One contract for every store: file, memory, and two S3 servers; and each store's own ways to fail."""

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import s3
from trainer.contract.backends import LocalBackend
from trainer.contract.config import StoreConfig
from trainer.contract.store import (
    KeyInvalid,
    ObjectExists,
    ObjectMissing,
    Store,
    StoreConfigInvalid,
    StoreDenied,
    StoreFull,
    StoreReadOnly,
    StoreUnavailable,
    StoreUnconditional,
    check_key,
    open_store,
)


def test_what_is_created_can_be_read(store: Store) -> None:
    """An object comes back byte for byte, with its size, whole and in ranges."""
    data = os.urandom(100_000)
    store.create("commits/a.json", data)
    assert store.read("commits/a.json") == data
    assert store.size("commits/a.json") == len(data)
    assert store.read_range("commits/a.json", 10, 20) == data[10:20]
    assert b"".join(store.stream("commits/a.json", len(data), chunk_bytes=30_000)) == data


def test_an_object_is_never_overwritten(store: Store) -> None:
    """A second create with other bytes, empty ones too, fails and leaves the first."""
    store.create("fence/e1.json", b"first")
    for other in (b"second", b""):
        with pytest.raises(ObjectExists):
            store.create("fence/e1.json", other)
    assert store.read("fence/e1.json") == b"first"


def test_our_own_object_is_recognised(store: Store) -> None:
    """Creating the same bytes again succeeds: after a lost response the object that exists is ours."""
    store.create("fence/e1.json", b"nonce 1")
    store.create("fence/e1.json", b"nonce 1")


def test_one_of_many_writers_wins(store: Store) -> None:
    """Of eight that create one key at once, exactly one succeeds, and its bytes are what is there."""

    def attempt(key: str, writer: int) -> bool:
        try:
            store.create(key, b"writer %d" % writer)
        except ObjectExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        for round_number in range(3):
            key = f"fence/e{round_number}.json"
            won = list(pool.map(attempt, [key] * 8, range(8)))
            assert won.count(True) == 1
            assert store.read(key) == b"writer %d" % won.index(True)


def test_listings_are_never_stale(store: Store) -> None:
    """A listing shows what another writer created and deleted since the last, and only what lies below its prefix."""
    store.create("commits/a.json", b"1")
    store.create("commits-of-others/z.json", b"1")
    assert [item.key for item in store.list("commits/")] == ["commits/a.json"]
    store.create("commits/b.json", b"22")
    store.delete("commits/a.json")
    assert [(item.key, item.bytes) for item in store.list("commits/")] == [("commits/b.json", 2)]
    assert [item.key for item in store.list()] == ["commits-of-others/z.json", "commits/b.json"]
    assert store.list("nothing/") == []


def test_a_file_is_stored(store: Store, tmp_path: Path) -> None:
    """`put_file` stores a file under its key, does not overwrite, and the source may go away afterwards."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3 << 20))
    data = source.read_bytes()
    store.put_file("data/x/r0.safetensors", source)
    other = tmp_path / "other"
    other.write_bytes(b"shorter")
    with pytest.raises(ObjectExists):
        store.put_file("data/x/r0.safetensors", other)
    source.unlink()
    assert store.read("data/x/r0.safetensors") == data


def test_a_file_is_copied_where_it_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two mounts of one disk have the same device number, and no link leads from one to the other."""
    source, link = tmp_path / "source", os.link

    def across_mounts(one: str | Path, other: str | Path) -> None:
        if Path(one) == source:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        link(one, other)

    source.write_bytes(b"content")
    store = open_store(StoreConfig(url=f"file://{tmp_path}/store"), tmp_path, "run")
    store.make_place()
    monkeypatch.setattr(os, "link", across_mounts)
    store.put_file("data/x/r0.safetensors", source)
    assert store.read("data/x/r0.safetensors") == b"content"


def test_missing_objects(store: Store) -> None:
    """Reading what is not there says so; deleting it is no error."""
    for call in (store.read, store.size):
        with pytest.raises(ObjectMissing, match="commits/none"):
            call("commits/none.json")
    store.delete("commits/none.json")


def test_probe_passes_and_leaves_nothing(store: Store) -> None:
    """A store that honours create-only passes its probe and is empty afterwards."""
    store.probe()
    assert store.list() == []


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", ".part-1", "a b", "a\n", "ä", "x" * 513]
)
def test_unsafe_keys_are_refused(key: str, tmp_path: Path) -> None:
    """A key that could leave the prefix, or that some storage would change, is refused by every method."""
    store = open_store(StoreConfig(url="file://."), tmp_path, "run-1")
    for call in (store.read, store.size, store.delete, store.local_path, lambda k: store.create(k, b"")):
        with pytest.raises(KeyInvalid):
            call(key)


@given(st.text(alphabet="ab./-_\x00é ", max_size=12))
def test_accepted_keys_stay_below_the_root(key: str) -> None:
    """Whatever is accepted resolves to a place below the root, under its own name."""
    with contextlib.suppress(KeyInvalid):
        check_key(key)
        assert os.path.normpath(f"/root/{key}") == f"/root/{key}"


def test_relative_urls_are_relative_to_the_base(tmp_path: Path) -> None:
    """`file://./store` lies beside the run's configuration, an absolute one where it says."""
    beside = open_store(StoreConfig(url="file://./store"), tmp_path, "run-1")
    beside.make_place()
    beside.create("a", b"1")
    assert (tmp_path / "store/run-1/a").read_bytes() == b"1"
    there = open_store(StoreConfig(url=f"file://{tmp_path}/other"), Path("/nowhere"), "run-1")
    there.make_place()
    there.create("a", b"1")
    assert (tmp_path / "other/run-1/a").exists()


def test_unfinished_local_files_are_not_objects(tmp_path: Path) -> None:
    """What a killed writer left half-written appears in no listing."""
    store = open_store(StoreConfig(url="file://."), tmp_path, "run-1")
    store.make_place()
    store.create("commits/a.json", b"1")
    (tmp_path / "run-1/commits/.part-dead").write_bytes(b"half")
    assert [item.key for item in store.list()] == ["commits/a.json"]


class _Forgetful(LocalBackend):
    """A real store whose response to the first create is lost, as a broken connection would lose it."""

    def __init__(self, root: Path, stored: bool) -> None:
        super().__init__(root)
        self.stored = stored
        self.lost = 0

    def create(self, key: str, data: bytes, timeout_s: float) -> None:
        """Lose the first response, after or before the object was stored."""
        if self.lost:
            return super().create(key, data, timeout_s)
        self.lost += 1
        if self.stored:
            super().create(key, data, timeout_s)
        raise TimeoutError("response lost")


@pytest.mark.parametrize("stored", [True, False])
def test_a_lost_response_is_resolved(tmp_path: Path, stored: bool) -> None:
    """After a lost response the object is looked up: it is ours if it arrived, and created again if not."""
    backend = _Forgetful(tmp_path, stored)
    store = Store(backend, "test://", 1.0)
    store.create("commits/a.json", b"nonce 1")
    assert backend.lost == 1
    assert store.read("commits/a.json") == b"nonce 1"


class _Overwriting(LocalBackend):
    """A store that takes no notice of create-only, like some S3 servers."""

    def create(self, key: str, data: bytes, timeout_s: float) -> None:
        """Overwrite whatever is there."""
        super().delete(key, timeout_s)
        super().create(key, data, timeout_s)


def test_a_store_without_create_only_is_refused(tmp_path: Path) -> None:
    """The probe refuses a store that overwrites, with the reason, unless the configuration allows it."""
    with pytest.raises(StoreUnconditional, match="allow_unconditional"):
        Store(_Overwriting(tmp_path), "test://", 1.0).probe()
    Store(_Overwriting(tmp_path), "test://", 1.0, allow_unconditional=True).probe()


def test_an_unreachable_store_is_named() -> None:
    """Nothing listens there: the error names the URL and what to check, and soon."""
    with socket.socket() as taken:  # bound but not listening, so that connections are refused
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        config = StoreConfig(url="s3://b", endpoint_url=endpoint, key_env="K", secret_env="S", timeout_s=20)
        store = open_store(config, Path(), "run-1", env={"K": "ak", "S": "sk"})
        with pytest.raises(StoreUnavailable, match=r"s3://b/run-1.*store\.endpoint_url"):
            store.probe()
    store.close()


class _Silent(BaseHTTPRequestHandler):
    """Accepts a request and never answers it."""

    release = threading.Event()

    def handle(self) -> None:
        """Hold the connection until the test is over."""
        self.release.wait(60)


def test_a_silent_store_meets_the_deadline() -> None:
    """A server that accepts and stays silent costs the deadline, not for ever (s3fs alone waits for ever)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Silent)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    config = StoreConfig(url="s3://b", endpoint_url=endpoint, key_env="K", secret_env="S", timeout_s=1)
    store = open_store(config, Path(), "run-1", env={"K": "ak", "S": "sk"})
    try:
        begun = monotonic()
        with pytest.raises(StoreUnavailable):
            store.list("commits/")
        with pytest.raises(StoreUnavailable):
            store.read("commits/a.json")
        assert monotonic() - begun < 15
    finally:
        _Silent.release.set()
        store.close()
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_a_bucket_that_does_not_exist(moto_server: s3.S3Server, tmp_path: Path) -> None:
    """The probe says that the bucket is missing and what to do."""
    config = moto_server.config().model_copy(update={"url": "s3://no-such-bucket"})
    store = open_store(config, tmp_path, "run-1")
    with pytest.raises(StoreUnavailable, match="does not exist; create it"):
        store.probe()
    store.close()


def test_a_wrong_secret_is_denied(seaweedfs_server: s3.S3Server, tmp_path: Path) -> None:
    """Wrong credentials are told from an unreachable store, and no message holds them."""
    env = {s3.KEY_ENV: s3.ACCESS_KEY, s3.SECRET_ENV: "canary-wrong"}
    store = open_store(seaweedfs_server.config(), tmp_path, "run-1", env=env)
    with pytest.raises(StoreDenied, match="secret_env") as caught:
        store.probe()
    assert "canary" not in f"{caught.value!r} {store!r}"
    store.close()


def test_configuration_errors_come_before_any_call(tmp_path: Path) -> None:
    """An unset variable, an unknown protocol and a secret in the URL are refused by name, and the secret not shown."""
    with pytest.raises(StoreConfigInvalid, match="LONGWATCH_UNSET is not set"):
        open_store(StoreConfig(url="s3://b", key_env="LONGWATCH_UNSET"), tmp_path, "run-1", env={})
    with pytest.raises(StoreConfigInvalid, match="nosuch"):
        open_store(StoreConfig(url="nosuch://b"), tmp_path, "run-1")
    with pytest.raises(StoreConfigInvalid, match="key_env") as caught:
        open_store(StoreConfig(url="s3://ak:canary@b"), tmp_path, "run-1")
    assert "canary" not in str(caught.value)


def test_a_path_through_a_file(tmp_path: Path) -> None:
    """A file where a directory should be is named as that."""
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StoreReadOnly, match="not a directory"):
        open_store(StoreConfig(url="file://./store"), tmp_path, "run-1").probe()


_PROBE = """
import sys
from pathlib import Path
from trainer.contract.config import StoreConfig
from trainer.contract.store import StoreError, open_store
store = open_store(StoreConfig(url="file://."), Path(sys.argv[1]), "run-1")
try:
    store.make_place()
    store.probe()
    store.create("a", bytes(4 << 20))
except StoreError as error:
    sys.exit(f"{type(error).__name__} {error}; left: {[item.key for item in store.list()]}")
"""


@pytest.mark.parametrize(
    ("options", "expected"), [("size=1m", StoreFull), ("size=8m,ro", StoreReadOnly)], ids=["full", "read-only"]
)
def test_disks_that_take_nothing(tmp_path: Path, options: str, expected: type[Exception]) -> None:
    """A full and a read-only file system are different errors, and nothing half-written is left."""
    mount = f'mount -t tmpfs -o {options} tmpfs "$1"'
    if shutil.which("unshare") is None or _in_namespace(f"{mount}", tmp_path).returncode:
        pytest.skip("this machine lets us mount nothing")
    done = _in_namespace(f'{mount} && exec "$2" -c "$3" "$1"', tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(expected.__name__)
    assert "left: []" in done.stderr


def _in_namespace(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(directory), sys.executable, _PROBE]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_listing_while_objects_come_and_go(tmp_path: Path) -> None:
    """What vanishes between the look at a directory and the look at the file is left out, and is no error."""
    store = open_store(StoreConfig(url="file://./store"), tmp_path, "run-1")
    store.make_place()
    store.create("commits/staying", b"1")
    ended = threading.Event()

    def churn() -> None:
        while not ended.is_set():
            store.create("commits/coming-and-going", b"1")
            store.delete("commits/coming-and-going")

    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn)
        try:
            for _ in range(2000):
                assert "commits/staying" in [item.key for item in store.list("commits/")]
        finally:
            ended.set()
        churning.result()
