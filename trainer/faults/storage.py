"""What injected faults do to the store: calls that fail, a death between data and manifest, flipped bytes."""

import errno
import os
from pathlib import Path
from typing import Protocol

from trainer.contract.backends import Backend
from trainer.contract.manifest import COMMITS, manifest_key, unseal
from trainer.contract.store import Store
from trainer.faults.death import die


class StoreFaults(Protocol):
    """What is wrong with the store at the moment."""

    failing: bool
    dying: bool


class FaultyBackend:
    """A storage that fails, or kills its user, whenever it is told to; otherwise the one it wraps."""

    def __init__(self, inner: Backend, faults: StoreFaults) -> None:
        self._inner = inner
        self._faults = faults
        self.errors = inner.errors

    def create(self, key: str, data: bytes, timeout_s: float) -> None:
        """Create; a torn write dies when the data is there and the manifest is not."""
        if self._faults.dying and key.startswith(COMMITS):
            die()
        self._fail()
        self._inner.create(key, data, timeout_s)

    def put_file(self, key: str, path: Path, timeout_s: float) -> None:
        """Create from a file."""
        self._fail()
        self._inner.put_file(key, path, timeout_s)

    def read(self, key: str, start: int, end: int | None, timeout_s: float) -> bytes:
        """Read."""
        self._fail()
        return self._inner.read(key, start, end, timeout_s)

    def size(self, key: str, timeout_s: float) -> int:
        """Size."""
        self._fail()
        return self._inner.size(key, timeout_s)

    def list(self, prefix: str, timeout_s: float) -> list[tuple[str, int]]:
        """List."""
        self._fail()
        return self._inner.list(prefix, timeout_s)

    def delete(self, key: str, timeout_s: float) -> None:
        """Delete."""
        self._fail()
        self._inner.delete(key, timeout_s)

    def abort_unfinished(self, prefix: str, timeout_s: float) -> int:
        """Remove traces of dead transfers."""
        self._fail()
        return self._inner.abort_unfinished(prefix, timeout_s)

    def make_place(self) -> None:
        """Make the place."""
        self._inner.make_place()

    def local_path(self, key: str) -> Path | None:
        """Path on this machine's disk."""
        return self._inner.local_path(key)

    def close(self) -> None:
        """Release connections."""
        self._inner.close()

    def _fail(self) -> None:
        if self._faults.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def flip_byte_of(store: Store, local: Store, commit: str) -> None:
    """Change one byte in the middle of a commit's first object, as a bad disk would, wherever a copy lies."""
    entry = unseal(store.read(manifest_key(commit))).manifest.objects[0]
    flipped: set[tuple[int, int]] = set()  # the local copy and that of a local store may be one file
    for path in filter(None, (store.local_path(entry.key), local.local_path(entry.key))):
        if path.exists() and (file := (path.stat().st_dev, path.stat().st_ino)) not in flipped:
            flipped.add(file)
            _flip_in_file(path, entry.size // 2)
    if store.local_path(entry.key) is None:
        data = bytearray(store.read(entry.key))
        data[entry.size // 2] ^= 0x40
        store.delete(entry.key)
        store.create(entry.key, bytes(data))


def _flip_in_file(path: Path, place: int) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        (byte,) = os.pread(descriptor, 1, place)
        os.pwrite(descriptor, bytes([byte ^ 0x40]), place)
    finally:
        os.close(descriptor)
