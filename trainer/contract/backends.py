"""How bytes reach one kind of storage, and the local file system as one; `trainer.contract.remote` has the others.

Backends raise what their storage raises (`Backend.errors` says which); `trainer.contract.store` gives it a meaning.
Keys are checked by the caller. Deadlines are seconds for one whole call.

Why the local one is our own: fsspec's local `pipe_file(mode="create")` looks and then opens, so two writers can both
win (70 of 200 races), and it leaves a half-written object under its final name when the process dies.
"""

import contextlib
import errno
import os
import shutil
import uuid
from pathlib import Path
from typing import Protocol

_PART = ".part-"  # prefix of files that are still being written; never listed
# One file system in two mounts, or one without hard links: device numbers do not tell, only trying does.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)


class Backend(Protocol):
    """What the store needs of a storage."""

    errors: tuple[type[Exception], ...]

    def create(self, key: str, data: bytes, timeout_s: float) -> None:
        """Create the object whole or not at all; `FileExistsError` if there is one."""

    def put_file(self, key: str, path: Path, timeout_s: float) -> None:
        """The same for the content of a local file, which must not change afterwards."""

    def read(self, key: str, start: int, end: int | None, timeout_s: float) -> bytes:
        """Bytes [start, end) of an object; `FileNotFoundError` if there is none."""

    def size(self, key: str, timeout_s: float) -> int:
        """Bytes of an object; `FileNotFoundError` if there is none."""

    def list(self, prefix: str, timeout_s: float) -> list[tuple[str, int]]:
        """Keys below `prefix` (empty, or ending in a slash) with their sizes, sorted, as they are now."""

    def make_place(self) -> None:
        """Make what keys lie below, where that is a directory; nothing else does, so that one that is gone is seen."""

    def delete(self, key: str, timeout_s: float) -> None:
        """Remove an object; one that is not there is no error."""

    def abort_unfinished(self, prefix: str, timeout_s: float) -> int:
        """Remove the traces of transfers below `prefix` that never ended; returns how many there were."""

    def local_path(self, key: str) -> Path | None:
        """Where the object lies on this machine's disk, None if it does not."""

    def close(self) -> None:
        """Release connections."""


class LocalBackend:
    """Objects are files below `root`; durable when a call returns.

    A root that is not there, say because its file system was unmounted, is an error of its own (ENODEV): neither is it
    made again on the wrong disk, nor do its objects count as deleted.
    """

    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self, key: str, data: bytes, timeout_s: float) -> None:
        """Write a private file, sync it, link it to its name: link(2) fails if the name is taken."""
        target = self._prepare(key)
        part = target.with_name(f"{_PART}{uuid.uuid4().hex}")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(part, target)
        finally:
            part.unlink(missing_ok=True)
        _sync_directory(target.parent)

    def put_file(self, key: str, path: Path, timeout_s: float) -> None:
        """Link the file in place where that can be done, copy it otherwise."""
        target = self._prepare(key)
        _sync_file(path)
        try:
            os.link(path, target)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
        else:
            _sync_directory(target.parent)
            return
        part = target.with_name(f"{_PART}{uuid.uuid4().hex}")
        try:
            shutil.copyfile(path, part)
            _sync_file(part)
            os.link(part, target)
        finally:
            part.unlink(missing_ok=True)
        _sync_directory(target.parent)

    def read(self, key: str, start: int, end: int | None, timeout_s: float) -> bytes:
        """Read from the file."""
        try:
            with (self.root / key).open("rb") as file:
                file.seek(start)
                return file.read(-1 if end is None else max(0, end - start))
        except FileNotFoundError:
            self._must_be_there()
            raise

    def size(self, key: str, timeout_s: float) -> int:
        """Stat the file."""
        try:
            return (self.root / key).stat().st_size
        except FileNotFoundError:
            self._must_be_there()
            raise

    def list(self, prefix: str, timeout_s: float) -> list[tuple[str, int]]:
        """Walk the directory; a file that vanishes meanwhile is left out."""
        found = []
        for directory, _, names in os.walk(self.root / prefix):
            for name in names:
                path = Path(directory, name)
                if not name.startswith(_PART):
                    with contextlib.suppress(FileNotFoundError):
                        found.append((path.relative_to(self.root).as_posix(), path.stat().st_size))
        return sorted(found)

    def make_place(self) -> None:
        """Make the directory, durably."""
        _make_directory(self.root)

    def delete(self, key: str, timeout_s: float) -> None:
        """Unlink the file and directories that this leaves empty."""
        path = self.root / key
        path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == self.root or not _remove_if_empty(parent):
                return

    def abort_unfinished(self, prefix: str, timeout_s: float) -> int:
        """Files that were being written."""
        parts = [Path(at, name) for at, _, names in os.walk(self.root / prefix) for name in names]
        parts = [path for path in parts if path.name.startswith(_PART)]
        for path in parts:
            path.unlink(missing_ok=True)
        return len(parts)

    def local_path(self, key: str) -> Path | None:
        """Every object is a local file."""
        return self.root / key

    def close(self) -> None:
        """Nothing is held open."""

    def _prepare(self, key: str) -> Path:
        """Make the directories of a key."""
        self._must_be_there()
        target = self.root / key
        _make_directory(target.parent)
        return target

    def _must_be_there(self) -> None:
        if not self.root.is_dir():
            raise OSError(errno.ENODEV, "the directory is gone (is it mounted?)", str(self.root))


def _make_directory(path: Path) -> None:
    """Durably: a lost directory entry would lose the objects with it."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    for directory in missing:
        _sync_directory(directory.parent)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_if_empty(path: Path) -> bool:
    try:
        path.rmdir()
    except OSError:
        return False
    return True
