"""The cache on local disk: what comes out is what went in, or nothing, whatever happened to the files."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runs import wait_until
from tests.trainer_data.far import FarFileSystem, far
from tests.trainer_data.shards import config, corpus
from trainer.data.cache import DiskCache
from trainer.data.stream import DataStream, validation_batches

LENGTH = 16
MOST = 10_000


@pytest.fixture(autouse=True)
def _settled() -> Iterator[None]:
    FarFileSystem.settle()
    yield
    FarFileSystem.settle()


def _held_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


@given(data=st.binary(max_size=200), cut=st.integers(0, 10_000), bit=st.integers(0, 7), flips=st.booleans())
def test_a_damaged_file_is_never_used(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cut: int, bit: int, flips: bool
) -> None:
    """Cut anywhere, or with any bit turned: it is gone, and can be put again."""
    cache = DiskCache(tmp_path_factory.mktemp("cache"), MOST)
    cache.put("key", data)
    assert cache.get("key", len(data)) == data
    (path,) = cache.directory.iterdir()
    raw = bytearray(path.read_bytes())
    at = cut % len(raw)
    if flips:
        raw[at] ^= 1 << bit
    path.write_bytes(raw if flips else raw[:at])
    assert cache.get("key", len(data)) is None
    assert not path.exists()
    cache.put("key", data)
    assert cache.get("key", len(data)) == data


def test_another_size_is_another_block(tmp_path: Path) -> None:
    """Whole, and still not what was asked for."""
    cache = DiskCache(tmp_path, MOST)
    cache.put("key", b"tokens")
    assert cache.get("key", 5) is None


def test_bounded_and_the_least_recently_used_go_first(tmp_path: Path) -> None:
    """Never more than allowed, over restarts too; what is used all the time stays."""
    for run in range(3):
        cache = DiskCache(tmp_path, MOST)
        for number in range(40):
            cache.put(f"{run}-{number}", bytes(996))
            os.utime(tmp_path / f"{run}-{number}", ns=(0, (100 * run + number) * 10**9))
            assert _held_bytes(tmp_path) <= MOST
            assert cache.get("0-0", 996) is not None
    assert cache.get("2-39", 996) is not None
    assert cache.get("2-1", 996) is None
    cache.put("large", bytes(MOST))
    assert cache.get("large", MOST) is None


def test_a_place_that_cannot_be_written_costs_nothing_but_reads(tmp_path: Path) -> None:
    """A file where the directory should be: nothing is kept, and nobody is stopped."""
    (tmp_path / "file").write_bytes(b"")
    cache = DiskCache(tmp_path / "file", MOST)
    cache.put("key", b"tokens")
    assert cache.get("key", 6) is None


def test_several_may_share_a_directory(tmp_path: Path) -> None:
    """Two owners that evict each other's blocks: each gets what was put, or nothing."""
    wrong: list[object] = []

    def work() -> None:
        cache = DiskCache(tmp_path, MOST)
        for number in range(300):
            key = str(number % 30)
            found = cache.get(key, 900)
            if found is None:
                cache.put(key, bytes([number % 30]) * 900)
            elif found != bytes([number % 30]) * 900:
                wrong.append(key)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert _held_bytes(tmp_path) <= 2 * MOST


_WRITER = """
import sys
from itertools import count
from pathlib import Path
from trainer.data.cache import DiskCache
cache = DiskCache(Path(sys.argv[1]), 1 << 30)
for number in count():
    cache.put(str(number % 50), bytes([number % 50]) * 1_000_000)
"""


def test_a_kill_leaves_nothing_half_written(tmp_path: Path) -> None:
    """SIGKILL in the middle of writing: every block that is found is whole; leftovers count and age out."""
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], cwd=Path(__file__).parents[2])
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) > 20, "blocks to be written")
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    cache = DiskCache(tmp_path, 1 << 30)
    found = [cache.get(str(number), 1_000_000) for number in range(50)]
    assert sum(block is not None for block in found) >= 15
    assert all(block in (None, bytes([number]) * 1_000_000) for number, block in enumerate(found))
    small = DiskCache(tmp_path, 1_500_000)
    small.put("last", bytes(1_000_000))
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def _epoch(root: Path, cache_dir: Path, **changes: int) -> list[list[int]]:
    stream = DataStream(far(root, **changes), sample_tokens=LENGTH, cache_dir=cache_dir)
    rows: list[list[int]] = stream.next_batch(stream.samples_per_epoch).tokens.tolist()
    stream.close()
    return rows


def _reads() -> int:
    """Reads of tokens since the last time this was asked."""
    found = len(FarFileSystem.reads)
    FarFileSystem.reads.clear()
    return found


def test_a_restart_reads_from_the_disk(tmp_path: Path) -> None:
    """The same rows without a single read of tokens from afar; a damaged block alone is fetched again."""
    root, kept = corpus(tmp_path / "data"), tmp_path / "kept"
    expected = DataStream(config(root), sample_tokens=LENGTH).next_batch(190).tokens.tolist()
    assert _epoch(root, kept)[:190] == expected
    _epoch(root, kept)  # so that the beginning of the next epoch, which is read ahead, is there too
    assert _reads() > 0
    assert _epoch(root, kept)[:190] == expected
    assert _reads() == 0
    for path in kept.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert _epoch(root, kept)[:190] == expected
    assert _reads() > 0


def test_a_shard_that_was_mended_is_not_read_from_the_disk(tmp_path: Path) -> None:
    """Same name and size, written again: its blocks are fetched, or the mending would have no effect."""
    root, kept = corpus(tmp_path / "data", (3000,)), tmp_path / "kept"
    before = _epoch(root, kept)
    path = root / "shard-0.bin"
    raw = bytearray(path.read_bytes())
    raw[1024:1026] = b"\x07\x00"
    path.write_bytes(raw)
    os.utime(path, ns=(0, 10**18))
    after = _epoch(root, kept)
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1


def test_no_room_means_memory_alone(tmp_path: Path) -> None:
    """`cache_bytes: 0`, and data that is near anyway."""
    root, kept = corpus(tmp_path / "data"), tmp_path / "kept"
    _epoch(root, kept, cache_bytes=0)
    DataStream(config(root), sample_tokens=LENGTH, cache_dir=kept).next_batch(20)
    assert not kept.exists()


def test_validation_is_fetched_once_a_run(tmp_path: Path) -> None:
    """The same held-out samples at every evaluation: the second one reads nothing from afar."""
    data, kept = far(corpus(tmp_path / "data")), tmp_path / "kept"
    first = [rows.tolist() for rows in validation_batches(data, LENGTH, 50, 16, cache_dir=kept)]
    assert _reads() > 0
    again = [rows.tolist() for rows in validation_batches(data, LENGTH, 50, 16, cache_dir=kept)]
    assert again == first
    assert _reads() == 0
