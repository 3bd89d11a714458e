"""A directory's disk as a run uses it: small synced appends for the journal, large files for checkpoints."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from orchestrator.errors import NetworkFilesystemError
from orchestrator.findings import Finding, graded
from orchestrator.process.filesystem import refuse_network_filesystem

_SYNCS = 30
_SLOW_SYNC_S = 0.05  # a supervisor syncs about twice a second
_CHUNK = 8 << 20
_MOST_BYTES = 512 << 20
_MOST_S = 3.0
_SLOW_BYTES_S = 100e6


def examine_disk(place: Path, state_bytes: int | None = None) -> list[Finding]:
    """Look at the disk that holds `place`, which exists; `state_bytes` is the size of one checkpoint, if known."""
    try:
        refuse_network_filesystem(place)
    except NetworkFilesystemError as error:
        return [Finding("file system", "fail", f"{place} is on a network", str(error))]
    if not os.access(place, os.W_OK | os.X_OK):
        return [Finding("file system", "fail", f"{place} cannot be written", "change its owner, or set run_dir")]
    return [
        Finding("file system", "pass", f"{place} is local and writable"),
        *_room(place),
        *_speed(place, state_bytes),
    ]


def _room(place: Path) -> Iterator[Finding]:
    usage, inodes = shutil.disk_usage(place), os.statvfs(place).f_favail
    seen = f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f}"
    few = os.statvfs(place).f_files > 0 and inodes < 10_000
    yield graded("disk space", seen, good=usage.free > 0.05 * usage.total, remedy="free some, or set run_dir elsewhere")
    if few:
        yield Finding("inodes", "warn", f"{inodes} free", "remove small files, or set run_dir elsewhere")


def _speed(place: Path, state_bytes: int | None) -> Iterator[Finding]:
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".longwatch-doctor-") as file:
            syncs_s = [_synced_append(file.fileno()) for _ in range(_SYNCS)]
            rate = _sequential(file.fileno())
    except OSError as error:
        yield Finding("disk speed", "fail", f"writing failed: {error.strerror}", "free space, or set run_dir elsewhere")
        return
    typical_s, worst_s = median(syncs_s), max(syncs_s)
    seen = f"a synced append takes {typical_s * 1e3:.1f} ms (at most {worst_s * 1e3:.1f})"
    yield graded("journal speed", seen, good=typical_s < _SLOW_SYNC_S, remedy="a local SSD for run_dir")
    seen = f"{rate / 1e6:.0f} MB/s to the disk"
    if state_bytes is not None:
        seen += f": a checkpoint of {state_bytes / 1e9:.2f} GB takes {state_bytes / rate:.0f} s beside training"
    yield graded("checkpoint speed", seen, good=rate > _SLOW_BYTES_S, remedy="a local SSD for run_dir")


def _synced_append(descriptor: int) -> float:
    began_s = time.perf_counter()
    os.write(descriptor, b"x" * 4096)
    os.fdatasync(descriptor)
    return time.perf_counter() - began_s


def _sequential(descriptor: int) -> float:
    """Bytes a second of large writes, the last sync included."""
    chunk, written, began_s = os.urandom(_CHUNK), 0, time.perf_counter()
    while written < _MOST_BYTES and time.perf_counter() - began_s < _MOST_S:
        written += os.write(descriptor, chunk)
    os.fdatasync(descriptor)
    return written / (time.perf_counter() - began_s)
