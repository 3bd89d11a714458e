"""Blocks of remote shards on local disk: bounded, least recently used out first.

A file appears whole under its name or not at all, and begins with a CRC32C of the rest, which is compared at each use:
after a kill or a power cut nothing half-written or damaged is ever used. Any number of processes may share a directory:
they write under names of their own, and what another one removed is merely missing. A cache that cannot be written
(a full disk) costs reads, and never the run.
"""

import os
import threading
import uuid
from contextlib import suppress
from pathlib import Path

import structlog
from google_crc32c import value as crc32c

log = structlog.get_logger(__name__)

_CRC_BYTES = 4
_AFTER_EVICTION = 0.9  # so that not every write has to look at all files


class DiskCache:
    """Byte strings by key, in files below a directory; threads may share it.

    Args:
        directory: is made if it is not there. Nothing else may lie in it.
        most_bytes: bound for all of them; each process keeps it on its own.
    """

    def __init__(self, directory: Path, most_bytes: int) -> None:
        self.directory = directory
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._warned = False
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            self._warn(error)
        self._held_bytes = sum(size for _, size, _ in self._files())

    def get(self, key: str, size: int) -> bytes | None:
        """The `size` bytes kept under a key; None if they are not there, or no longer what they were."""
        path = self.directory / key
        try:
            content = path.read_bytes()
            if content[:_CRC_BYTES] == _checksum(content[_CRC_BYTES:]) and len(content) == _CRC_BYTES + size:
                os.utime(path)
                return content[_CRC_BYTES:]
            log.warning("cached_block_damaged", path=str(path))
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._warn(error)
        return None

    def put(self, key: str, data: bytes) -> None:
        """Keep these bytes, as long as there is room."""
        size = _CRC_BYTES + len(data)
        if size > self._most_bytes:
            return
        path = self.directory / key
        part = path.with_name(f"{key}.{uuid.uuid4().hex}")  # what a killed process leaves ages out like the rest
        try:
            part.write_bytes(_checksum(data) + data)
            part.rename(path)
        except OSError as error:
            _remove(part)
            self._warn(error)
            return
        with self._lock:
            self._held_bytes += size
            if self._held_bytes > self._most_bytes:
                self._evict()

    def _evict(self) -> None:
        files = sorted(self._files())
        self._held_bytes = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._held_bytes <= self._most_bytes * _AFTER_EVICTION:
                return
            _remove(path)
            self._held_bytes -= size

    def _files(self) -> list[tuple[int, int, Path]]:
        """(last use, bytes, path) of all that lies there."""
        found = []
        for path in self.directory.glob("*"):
            try:
                facts = path.stat()
            except OSError:
                continue  # removed by another process meanwhile
            found.append((facts.st_mtime_ns, facts.st_size, path))
        return found

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warning("data_cache_unusable", directory=str(self.directory), why=str(error))


def _remove(path: Path) -> None:
    with suppress(OSError):  # gone already, or on a disk that has become read-only
        path.unlink()


def _checksum(data: bytes) -> bytes:
    return int(crc32c(data)).to_bytes(_CRC_BYTES, "little")
