"""A SQLite VFS that notes what reaches the files: every write, truncation, sync and deletion, in order.

It stands in front of SQLite's own unix VFS in this process: files are opened by that one, and then three of their
methods are replaced by ones that note and pass on. The library is the very one that the `sqlite3` module has loaded.
Structures are those of sqlite3.h (sqlite3_vfs 3, sqlite3_io_methods 3).
"""

import _sqlite3
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

_POINTERS_OF_METHODS = 18  # after iVersion: xClose ... xUnfetch
_WRITE, _TRUNCATE, _SYNC = 2, 3, 4
_CREATE, _JOURNAL_OR_WAL = (
    0x4,
    0x800 | 0x80000,
)  # SQLITE_OPEN_...: the first sync of such a file syncs its directory too


class _Methods(ctypes.Structure):
    _fields_: ClassVar[list[Any]] = [("version", ctypes.c_int), ("calls", ctypes.c_void_p * _POINTERS_OF_METHODS)]


class _File(ctypes.Structure):
    _fields_: ClassVar[list[Any]] = [("methods", ctypes.POINTER(_Methods))]


class _Vfs(ctypes.Structure):
    pass


_XOPEN = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(_Vfs),
    ctypes.c_void_p,
    ctypes.POINTER(_File),
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_int),
)
_XDELETE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Vfs), ctypes.c_char_p, ctypes.c_int)
_XWRITE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
_XTRUNCATE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
_XSYNC = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_Vfs._fields_ = [
    ("version", ctypes.c_int), ("file_bytes", ctypes.c_int), ("most_path", ctypes.c_int),
    ("next", ctypes.POINTER(_Vfs)), ("name", ctypes.c_char_p), ("app_data", ctypes.c_void_p),
    ("open", _XOPEN), ("delete", _XDELETE), ("rest", ctypes.c_void_p * 14),
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Op:
    """One thing that was done to a file, or a moment at which the journal had said that something is durable."""

    kind: Literal["write", "truncate", "sync", "delete", "sync_directory", "acknowledged"]
    name: str = ""
    offset: int = 0
    data: bytes = b""


@dataclass
class Recorder:
    """Notes everything below one directory. One at a time."""

    root: Path
    ops: list[Op] = field(default_factory=list)
    _names: dict[int, str] = field(default_factory=dict)
    _new: set[int] = field(default_factory=set)
    _kept: list[Any] = field(default_factory=list)  # what SQLite points to

    def acknowledge(self) -> None:
        """The journal's caller was told that its batch is durable."""
        self.ops.append(Op("acknowledged"))

    @contextmanager
    def installed(self) -> Iterator["Recorder"]:
        """Every connection that is opened meanwhile is noted; it must be closed meanwhile, too."""
        library = ctypes.CDLL(_sqlite3.__file__)
        library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
        library.sqlite3_vfs_find.argtypes = [ctypes.c_char_p]
        library.sqlite3_vfs_register.argtypes = [ctypes.POINTER(_Vfs), ctypes.c_int]
        library.sqlite3_vfs_unregister.argtypes = [ctypes.POINTER(_Vfs)]
        original = library.sqlite3_vfs_find(None)
        ours = _Vfs.from_buffer_copy(original.contents)
        ours.name = b"recorder"
        ours.open = _XOPEN(lambda vfs, path, file, flags, out: self._open(original, path, file, flags, out))
        ours.delete = _XDELETE(lambda vfs, path, sync: self._delete(original, path, sync))
        self._kept.append(ours)
        assert library.sqlite3_vfs_register(ctypes.byref(ours), 1) == 0
        try:
            yield self
        finally:
            library.sqlite3_vfs_unregister(ctypes.byref(ours))

    def _open(self, original: Any, path: int | None, file: Any, flags: int, out: Any) -> int:
        """`path` is the pointer itself: SQLite keeps it, and names further files after what it points to."""
        code: int = original.contents.open(original, path, file, flags, out)
        named = Path(ctypes.string_at(path).decode()) if path else None
        if code == 0 and named is not None and file.contents.methods and named.parent == self.root:
            address = ctypes.addressof(file.contents)
            self._names[address] = named.name
            if flags & _CREATE and flags & _JOURNAL_OR_WAL:
                self._new.add(address)
            file.contents.methods = ctypes.pointer(self._noting(file.contents.methods.contents))
        return code

    def _delete(self, original: Any, path: bytes, sync: int) -> int:
        if Path(path.decode()).parent == self.root:
            self.ops.append(Op("delete", Path(path.decode()).name))
            if sync:
                self.ops.append(Op("sync_directory"))
        code: int = original.contents.delete(original, path, sync)
        return code

    def _noting(self, methods: _Methods) -> _Methods:
        write, truncate = _XWRITE(methods.calls[_WRITE]), _XTRUNCATE(methods.calls[_TRUNCATE])
        sync = _XSYNC(methods.calls[_SYNC])

        def note_write(file: int, data: int, size: int, offset: int) -> int:
            self.ops.append(Op("write", self._names[file], offset, ctypes.string_at(data, size)))
            return int(write(file, data, size, offset))

        def note_truncate(file: int, size: int) -> int:
            self.ops.append(Op("truncate", self._names[file], size))
            return int(truncate(file, size))

        def note_sync(file: int, flags: int) -> int:
            code = int(sync(file, flags))
            self.ops.append(Op("sync", self._names[file]))  # durable only now
            if file in self._new:
                self._new.remove(file)
                self.ops.append(Op("sync_directory"))
            return code

        ours = _Methods.from_buffer_copy(methods)
        calls = (_XWRITE(note_write), _XTRUNCATE(note_truncate), _XSYNC(note_sync))
        for place, call in zip((_WRITE, _TRUNCATE, _SYNC), calls, strict=True):
            ours.calls[place] = ctypes.cast(call, ctypes.c_void_p).value
        self._kept.append((ours, calls))
        return ours
