"""The snapshot arena: shared memory with two slots that outlives the trainer (DESIGN 9). Torch-free.

The trainer copies its state into a slot; the writer process puts complete slots on disk and gives them back. Whoever
dies meanwhile leaves a slot that is either complete or visibly not. The file lies in /dev/shm (on the run directory's
disk where that is too small), named by a link in the run directory; the supervisor removes it when the run has ended.

A file of one header page and two slots. A slot begins with a page of two halves, each written by one side only: the
trainer's (number of the snapshot, state, sizes) and the writer's (number of the snapshot that it is done with). Then
comes the payload, then the description, JSON with a CRC. Readers use pread, which cannot fault when a file shrinks.
"""

import errno
import hashlib
import mmap
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from trainer.contract.manifest import crc32c

SLOTS = 2
PAGE_BYTES = 4096
_MAGIC = b"LWARENA\1"
_HEADER = struct.Struct("<8sQQ")  # magic, payload capacity, description capacity
_TRAINER = struct.Struct("<QQQQI")  # number, state, payload bytes, description bytes, CRC32C of the description
_WRITER = struct.Struct("<Q")  # number of the snapshot that was taken over
_WRITER_OFFSET = PAGE_BYTES // 2
_EMPTY, _WRITING, _COMPLETE = range(3)
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (opened with O_EXCL and O_NOFOLLOW, 0600)
_MARGIN_BYTES = 64 << 20  # of shared memory left to others


class ArenaError(Exception):
    """The arena cannot be made or is not one of ours."""


@dataclass(frozen=True, slots=True)
class Slot:
    """What a slot's page says. `number` rises with every snapshot of the run."""

    index: int
    number: int
    complete: bool
    payload_bytes: int
    description_bytes: int
    description_crc: int
    released: int

    @property
    def is_pending(self) -> bool:
        """Whether it holds a snapshot that is not on disk yet."""
        return self.complete and self.released != self.number


@dataclass(frozen=True, slots=True)
class _Geometry:
    payload_bytes: int
    description_bytes: int

    @property
    def stride(self) -> int:
        return PAGE_BYTES + self.payload_bytes + self.description_bytes

    @property
    def file_bytes(self) -> int:
        return PAGE_BYTES + SLOTS * self.stride

    def page(self, index: int) -> int:
        return PAGE_BYTES + index * self.stride

    def payload(self, index: int) -> int:
        return self.page(index) + PAGE_BYTES

    def description(self, index: int) -> int:
        return self.payload(index) + self.payload_bytes


class ArenaReader:
    """The side of the writer process, the supervisor and the loader; holds one descriptor and maps nothing.

    Raises:
        FileNotFoundError: there is no arena.
        ArenaError: it is not one of ours.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._geometry = _read_geometry(self._descriptor, path)
        except ArenaError:
            os.close(self._descriptor)
            raise

    def slots(self) -> list[Slot]:
        """Both slots as they are now."""
        return [self._slot(index) for index in range(SLOTS)]

    def description(self, slot: Slot) -> bytes | None:
        """What the trainer wrote about the snapshot; None if the slot was overwritten meanwhile."""
        raw = os.pread(self._descriptor, slot.description_bytes, self._geometry.description(slot.index))
        return raw if crc32c(raw) == slot.description_crc and self.holds(slot) else None

    def read(self, slot: Slot, begin: int, count: int) -> bytes:
        """Bytes of the payload, fewer at its end; ask `holds` afterwards whether they are still that snapshot's."""
        count = min(count, slot.payload_bytes - begin)
        return os.pread(self._descriptor, count, self._geometry.payload(slot.index) + begin)

    def holds(self, slot: Slot) -> bool:
        """Whether the slot still holds that snapshot."""
        now = self._slot(slot.index)
        return now.complete and now.number == slot.number

    def release(self, slot: Slot) -> None:
        """Give the slot back to the trainer: what was in it is on disk, or was given up."""
        place = self._geometry.page(slot.index) + _WRITER_OFFSET
        os.pwrite(self._descriptor, _WRITER.pack(slot.number), place)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _slot(self, index: int) -> Slot:
        raw = os.pread(self._descriptor, PAGE_BYTES, self._geometry.page(index))
        return _parse_slot(index, raw)


class Arena:
    """The trainer's side: the whole file mapped, its pages present before the first snapshot."""

    def __init__(self, path: Path, payload_bytes: int, description_bytes: int) -> None:
        """Open the arena behind the link `path`, or make one with at least these capacities.

        Raises:
            ArenaError: it would have to be made anew, but holds a snapshot that is not on disk yet.
            OSError: there is no room for it, neither in shared memory nor on disk.
        """
        wanted = _Geometry(_rounded(payload_bytes), _rounded(description_bytes))
        found = _open_fitting(path, wanted)
        descriptor = _create(path, wanted) if found is None else found
        try:
            self._geometry = _read_geometry(descriptor, path)
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            self._map = mmap.mmap(descriptor, self._geometry.file_bytes, flags=flags)
        finally:
            os.close(descriptor)

    def fits(self, payload_bytes: int, description_bytes: int) -> bool:
        """Whether such a snapshot has room."""
        own = self._geometry
        return payload_bytes <= own.payload_bytes and description_bytes <= own.description_bytes

    def free_slot(self) -> int | None:
        """A slot that may be overwritten, the one with the older snapshot first; None if both wait for the writer."""
        free = [slot for slot in map(self._slot, range(SLOTS)) if not slot.is_pending]
        return min(free, key=lambda slot: slot.number).index if free else None

    def begin(self, index: int) -> int:
        """Mark a free slot as being written; returns the new snapshot's number. A death leaves it incomplete."""
        number = 1 + max(self._slot(other).number for other in range(SLOTS))
        self._put(index, number, _WRITING, 0, b"")
        return number

    def complete(self, index: int, number: int, payload_bytes: int, description: bytes) -> None:
        """Say that the slot holds the whole snapshot, and what it is."""
        self._put(index, number, _COMPLETE, payload_bytes, description)

    def offset(self, index: int) -> int:
        """Where a slot's payload begins within the mapping."""
        return self._geometry.payload(index)

    @property
    def buffer(self) -> mmap.mmap:
        """The mapping, for tensors that lie in it."""
        return self._map

    def close(self) -> None:
        """Unmap; the file and what is in it stay. Tensors that lie in the mapping must be gone."""
        self._map.close()

    def _put(self, index: int, number: int, state: int, payload_bytes: int, description: bytes) -> None:
        place = self._geometry.description(index)
        self._map[place : place + len(description)] = description
        page = self._geometry.page(index)
        fields = (payload_bytes, len(description), crc32c(description))
        if state != _WRITING:  # who sees the slot complete must find everything else in its place
            _TRAINER.pack_into(self._map, page, number, _WRITING, *fields)
        _TRAINER.pack_into(self._map, page, number, state, *fields)

    def _slot(self, index: int) -> Slot:
        page = self._geometry.page(index)
        return _parse_slot(index, self._map[page : page + PAGE_BYTES])


def has_pending(path: Path) -> bool:
    """Whether any slot holds a snapshot that is not on disk yet; False where there is no arena."""
    try:
        with ArenaReader(path) as reader:
            return any(slot.is_pending for slot in reader.slots())
    except (FileNotFoundError, ArenaError):
        return False


def remove(path: Path) -> None:
    """Remove the arena and its link."""
    with suppress(FileNotFoundError):
        if path.is_symlink():
            Path(os.readlink(path)).unlink(missing_ok=True)
        path.unlink()


def _parse_slot(index: int, page: bytes) -> Slot:
    number, state, payload, description, crc = _TRAINER.unpack_from(page)
    (released,) = _WRITER.unpack_from(page, _WRITER_OFFSET)
    return Slot(index, number, state == _COMPLETE, payload, description, crc, released)


def _read_geometry(descriptor: int, path: Path) -> _Geometry:
    raw = os.pread(descriptor, _HEADER.size, 0)
    if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
        raise ArenaError(f"{path} is no snapshot arena of this version; end the run's processes and remove it")
    _, payload, description = _HEADER.unpack(raw)
    geometry = _Geometry(payload, description)
    if os.fstat(descriptor).st_size < geometry.file_bytes:
        raise ArenaError(f"{path} is shorter than it says; end the run's processes and remove it")
    return geometry


def _open_fitting(path: Path, wanted: _Geometry) -> int | None:
    """An arena that is there and large enough; None if one must be made."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        found = _read_geometry(descriptor, path)
    except ArenaError:
        found = _Geometry(0, 0)
    if found.payload_bytes >= wanted.payload_bytes and found.description_bytes >= wanted.description_bytes:
        return descriptor
    os.close(descriptor)
    if has_pending(path):
        raise ArenaError(f"{path} is too small, and a snapshot in it is not on disk yet")
    return None


def _create(path: Path, wanted: _Geometry) -> int:
    """A new file, all of its space taken at once, and the link to it; an old one goes.

    In shared memory, or in the run directory where that is too small (containers often have 64 MB).
    """
    remove(path)
    if _has_room(wanted.file_bytes):
        target = _target(path.parent)
        try:
            descriptor = _allocate(target, wanted)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        else:
            path.symlink_to(target)
            return descriptor
    return _allocate(path, wanted)


def _allocate(target: Path, wanted: _Geometry) -> int:
    target.unlink(missing_ok=True)  # of a run directory whose link was removed by hand
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, wanted.file_bytes)
        os.pwrite(descriptor, _HEADER.pack(_MAGIC, wanted.payload_bytes, wanted.description_bytes), 0)
    except OSError:
        os.close(descriptor)
        target.unlink()
        raise
    return descriptor


def _has_room(num_bytes: int) -> bool:
    if not _SHARED_MEMORY.is_dir():
        return False
    room = os.statvfs(_SHARED_MEMORY)
    return room.f_bavail * room.f_frsize >= num_bytes + _MARGIN_BYTES


def _target(run_dir: Path) -> Path:
    """One name for one run directory; containers that share the memory may have others at the same path."""
    found = run_dir.stat()
    identity = f"{run_dir.resolve()}:{found.st_dev}:{found.st_ino}"
    return _SHARED_MEMORY / f"longwatch-{os.getuid()}-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]}"


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
