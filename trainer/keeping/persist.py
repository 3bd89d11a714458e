"""From a slot of the arena to the local disk: checksums, norms, files, and the manifest last.

Doing it again after a death in the middle gives the same files and the same manifest: all that is random was decided
by the trainer.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from trainer.checkpointing.errors import NonFiniteStateError
from trainer.checkpointing.layout import PlacedObject, SnapshotDescription
from trainer.checkpointing.norms import SquareSum
from trainer.contract.arena import ArenaReader, Slot
from trainer.contract.manifest import (
    Manifest,
    ManifestError,
    ObjectEntry,
    Parent,
    Sealed,
    TensorEntry,
    commit_id,
    crc32c,
    data_key,
    manifest_key,
    parse_commit_id,
    seal,
)
from trainer.contract.store import ObjectMissing
from trainer.keeping.tier import LocalTier

_PIECE_BYTES = 1 << 20  # stays in the processor's cache between checksum, norm and write
_WRITEBACK_BYTES = 16 << 20
_RESERVE = "reserve"


class SlotLostError(Exception):
    """The slot was overwritten while it was read, or its description is damaged."""


def describe(arena: ArenaReader, slot: Slot) -> SnapshotDescription:
    """What a slot holds.

    Raises:
        SlotLostError: it cannot be told.
    """
    raw = arena.description(slot)
    if raw is None:
        raise SlotLostError("the arena's slot is damaged, or was overwritten")
    return SnapshotDescription.model_validate_json(raw)


def persist(
    arena: ArenaReader, slot: Slot, said: SnapshotDescription, tier: LocalTier, beat: Callable[[], None]
) -> Sealed:
    """Put one snapshot on the local disk, durably; afterwards the slot may be released.

    Args:
        arena: where it lies.
        slot: which one.
        said: its description.
        tier: the local disk.
        beat: called between pieces of work, to show that there is progress.

    Raises:
        SlotLostError: the slot did not stay what it was.
        NonFiniteStateError: the state has NaN or an infinity in it; nothing is kept.
        StoreError: the disk is full or fails; nothing is kept.
        OSError: the same.
    """
    commit = commit_id(said.step, said.epoch, said.attempt)
    clear(tier)
    if known := _already(tier, commit, said):
        return known
    with ExitStack() as undo:
        undo.callback(clear, tier)
        undo.callback(tier.forget, commit)
        files = _allocate(tier, said)
        objects, tensors = [], []
        for number, (placed, path) in enumerate(zip(said.objects, files, strict=True)):
            crc, norms = _write(arena, slot, placed, path, beat)
            objects.append(ObjectEntry(key=data_key(commit, path.name), size=placed.size, crc32c=crc))
            tensors += _entries(placed, number, norms)
        if not arena.holds(slot):
            raise SlotLostError("the arena's slot was overwritten while it was being put on disk")
        for entry, path in zip(objects, files, strict=True):
            tier.store.put_file(entry.key, path)
            beat()
        sealed = seal(_manifest(said, commit, objects, tensors, _parent(tier, said)))
        tier.store.create(manifest_key(commit), sealed.raw)
        undo.pop_all()
    clear(tier)
    return sealed


def _already(tier: LocalTier, commit: str, said: SnapshotDescription) -> Sealed | None:
    """An earlier try that came to its end without living to release the slot."""
    try:
        found = tier.manifest(commit)
    except ObjectMissing:
        return None
    if found.manifest.nonce != said.nonce:
        raise SlotLostError(f"{commit} is on disk already, from another snapshot")
    return found


def reserve(tier: LocalTier, num_bytes: int) -> bool:
    """Hold the space of the next checkpoint, so that nothing else on this disk takes it; False if there is none."""
    path = tier.scratch / _RESERVE
    try:
        _allocate_file(path, num_bytes)
    except OSError:
        path.unlink(missing_ok=True)
        return False
    return True


def clear(tier: LocalTier) -> None:
    """Empty the scratch directory: what a killed writer left behind, and the reserve."""
    if tier.scratch.is_dir():
        for path in tier.scratch.iterdir():
            path.unlink()


def _allocate(tier: LocalTier, said: SnapshotDescription) -> list[Path]:
    """Files with all their space, before the first byte: a full disk is found at once."""
    files = []
    for number, placed in enumerate(said.objects):
        path = tier.scratch / f"r0-{said.nonce[:8]}-{number:05d}.safetensors"
        _allocate_file(path, placed.size)
        files.append(path)
    return files


def _allocate_file(path: Path, num_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        if num_bytes:
            os.posix_fallocate(descriptor, 0, num_bytes)
    finally:
        os.close(descriptor)


def _write(
    arena: ArenaReader, slot: Slot, placed: PlacedObject, path: Path, beat: Callable[[], None]
) -> tuple[int, list[float | None]]:
    """One object to its file; its CRC and the norms of its tensors. The caller's put_file syncs it."""
    crc = 0
    sums = [SquareSum(tensor.dtype) for tensor in placed.tensors]
    first = 0  # of the tensors that are not wholly read
    with path.open("r+b", buffering=0) as file:
        for begin in range(0, placed.size, _PIECE_BYTES):
            piece = arena.read(slot, placed.offset + begin, min(_PIECE_BYTES, placed.size - begin))
            crc = crc32c(piece, crc)
            _write_all(file.fileno(), piece)
            end = begin + len(piece)
            if end % _WRITEBACK_BYTES == 0:  # the kernel begins to write now, and the sync at the end finds little left
                os.posix_fadvise(file.fileno(), end - _WRITEBACK_BYTES, _WRITEBACK_BYTES, os.POSIX_FADV_DONTNEED)
            view = memoryview(piece)
            for tensor, total in zip(placed.tensors[first:], sums[first:], strict=True):
                if tensor.begin >= end:
                    break
                total.add(view[max(tensor.begin - begin, 0) : tensor.end - begin])
                first += tensor.end <= end
            beat()
    return crc, [total.norm() for total in sums]


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _entries(placed: PlacedObject, number: int, norms: Iterable[float | None]) -> list[TensorEntry]:
    entries = []
    for tensor, norm in zip(placed.tensors, norms, strict=True):
        if norm is not None and not math.isfinite(norm):
            raise NonFiniteStateError(tensor.name)
        entry = TensorEntry(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, object=number, norm=norm)
        entries.append(entry)
    return entries


def _manifest(
    said: SnapshotDescription,
    commit: str,
    objects: list[ObjectEntry],
    tensors: list[TensorEntry],
    parent: Parent | None,
) -> Manifest:
    return Manifest(
        run_id=said.run_id,
        commit=commit,
        step=said.step,
        epoch=said.epoch,
        attempt=said.attempt,
        tokens=said.tokens,
        position=said.position,
        nonce=said.nonce,
        parent=parent,
        config_digest=said.config_digest,
        objects=tuple(objects),
        tensors=tuple(tensors),
        health=said.health,
        extra=json.loads(said.extra_json),
    )


def _parent(tier: LocalTier, said: SnapshotDescription) -> Parent | None:
    """The attempt's commit before this one that is still here, else what it had loaded."""
    inventory = tier.inventory()
    older = [
        commit
        for commit in (*inventory.waiting, *inventory.uploaded)
        if (parsed := parse_commit_id(commit)).epoch == said.epoch and parsed.step < said.step
    ]
    for commit in sorted(older, key=parse_commit_id, reverse=True):
        try:
            return Parent(commit=commit, digest=tier.manifest(commit).digest)
        except ManifestError:
            continue
    return said.loaded
