"""Where data lies: an fsspec file system and a path on it. Owns listing, ranged reads and whole writes.

What a storage raises becomes a `StorageError` that names the URL without its options, which may hold secrets.
Torch-free.
"""

import errno
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from trainer.data.errors import DataError, ShardMissingError, StorageError

_GLOB = "*?["


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a listing."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes [begin, end) of a file."""

    name: str
    begin: int
    end: int


class Place:
    """A directory of data. `pattern` limits the files that are listed: `dir/train_*.bin`, or a single file."""

    def __init__(self, fs: AbstractFileSystem, root: str, url: str, pattern: str | None = None) -> None:
        self._fs = fs
        self._root = root.rstrip("/") or root
        self.url = url
        self.pattern = pattern
        self._errors = storage_errors(fs)

    def list(self) -> list[Entry]:
        """Files directly in the directory, by name; hidden ones are left out.

        Raises:
            StorageError: there is no such directory, or it cannot be listed.
        """
        with self.translated():
            self._fs.invalidate_cache(self._root)
            found = self._fs.ls(self._root, detail=True)
        entries = [
            Entry(str(info["name"]).rstrip("/").rsplit("/", 1)[-1], int(info["size"] or 0))
            for info in found
            if info.get("type") != "directory"
        ]
        wanted = (e for e in entries if not e.name.startswith(".") and fnmatch(e.name, self.pattern or "*"))
        return sorted(wanted, key=lambda entry: entry.name)

    def read(self, name: str) -> bytes:
        """A whole small file.

        Raises:
            ShardMissingError: there is none of that name.
            StorageError: it cannot be read.
        """
        return self.read_ranges([ByteRange(name, 0, self.size(name))])[0]

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with self.translated(name):
            return int(self._fs.size(self._path(name)) or 0)

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        with self.translated(name):
            return bool(self._fs.exists(self._path(name)))

    def read_ranges(self, ranges: Iterable[ByteRange]) -> list[bytes]:
        """The bytes of each range, fewer where a file ends; remote file systems fetch them concurrently.

        Raises:
            ShardMissingError: one of the files is not there.
            StorageError: one of them cannot be read.
        """
        asked = list(ranges)
        paths = [self._path(r.name) for r in asked]
        found = self._fs.cat_ranges(paths, [r.begin for r in asked], [r.end for r in asked], on_error="return")
        for wanted, got in zip(asked, found, strict=True):
            if isinstance(got, BaseException):
                raise self.meaning(got, wanted.name) from got
        return [bytes(got) for got in found]

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file whole: never a half-written one under its name, whenever this process dies.

        Raises:
            StorageError: it cannot be written.
        """
        with self.translated(name):
            if isinstance(self._fs, LocalFileSystem):
                _write_local(Path(self._path(name)), data)
            else:
                self._fs.pipe_file(self._path(name), data)

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""
        with self.translated(name):
            if self._fs.exists(self._path(name)):
                self._fs.rm_file(self._path(name))

    def make(self) -> None:
        """Make the directory, where the storage has such a thing."""
        with self.translated():
            self._fs.makedirs(self._root, exist_ok=True)

    @contextmanager
    def translated(self, name: str | None = None) -> Iterator[None]:
        """What the storage raises inside becomes an error of ours."""
        try:
            yield
        except self._errors as error:
            raise self.meaning(error, name) from error

    def meaning(self, error: BaseException, name: str | None = None) -> DataError:
        """Which of our errors a storage's error is."""
        where = f"{self.url.rstrip('/')}/{name}" if name and not self.pattern == name else self.url
        first_line = (str(error).splitlines() or [""])[0][:200]
        match error:
            case FileNotFoundError() if name is not None:
                return ShardMissingError(f"{where} does not exist", "restore it, or prepare the data again", name)
            case FileNotFoundError() | NotADirectoryError():
                return StorageError(f"{where} does not exist", "correct the URL, or prepare the data first", name)
            case PermissionError():
                return StorageError(f"{where}: access denied", "check its owner and mode, or the credentials", name)
            case OSError(errno=errno.ENOSPC | errno.EDQUOT):
                return StorageError(f"{where}: no space left", "free some, or choose another place", name)
            case OSError(errno=errno.EROFS):
                return StorageError(f"{where}: the file system is read-only", "choose another place", name)
        what = f"{where} cannot be reached ({type(error).__name__}: {first_line})"
        return StorageError(what, "check the URL, the network, the server and the credentials", name)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def open_place(url: str, options: Mapping[str, Any] | None = None) -> Place:
    """The place that a URL names: a directory, a single file, or a directory with a pattern of files.

    Raises:
        StorageError: no file system speaks this protocol here, or it cannot be reached.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url, **dict(options or {}))
    except (ValueError, ImportError, OSError) as error:
        remedy = "correct the URL; file, memory and s3 are supported here"
        raise StorageError(f"{url} cannot be opened ({error})", remedy) from error
    parent, _, last = str(path).rstrip("/").rpartition("/")
    if any(mark in last for mark in _GLOB):
        return Place(fs, parent or "/", url.rstrip("/").rpartition("/")[0], last)
    place = Place(fs, str(path), url)
    with place.translated():
        is_file = bool(fs.isfile(path))
    return Place(fs, parent or "/", url.rpartition("/")[0], last) if is_file else place


def storage_errors(fs: AbstractFileSystem) -> tuple[type[Exception], ...]:
    """What calls to a file system raise when the storage is to blame."""
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
    if "s3" not in protocols:
        return (OSError,)
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 (slow, and of S3 alone)

    return (OSError, BotoCoreError, ClientError)


def _write_local(target: Path, data: bytes) -> None:
    """Write a private file, sync it, rename it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".part-{uuid.uuid4().hex}")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
