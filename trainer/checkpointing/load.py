"""Loading a commit: everything that can be checked is checked before anything is returned (DESIGN 9).

`CheckpointError` condemns a commit. A store that cannot be reached condemns nothing: its `StoreError` passes through.
Nothing is unpickled: tensors are safetensors, the rest is JSON.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import structlog
import torch
from pydantic import ValidationError
from torch import Tensor

from trainer.checkpointing.errors import CheckpointError
from trainer.checkpointing.layout import SnapshotDescription
from trainer.checkpointing.norms import norm_of_bytes
from trainer.checkpointing.tensors import OPTIMIZER, dtype_name
from trainer.contract.arena import ArenaError, ArenaReader, Slot
from trainer.contract.manifest import (
    Manifest,
    ManifestError,
    ObjectEntry,
    Parent,
    TensorEntry,
    commit_id,
    crc32c,
    manifest_key,
    unseal,
)
from trainer.contract.store import ObjectMissing, Store, StoreError

log = structlog.get_logger(__name__)

_NORM_TOLERANCE = 1e-9  # float64 sums of the same numbers in another order; CRC covers the bits


@dataclass(frozen=True, slots=True)
class Loaded:
    """A verified state. Tensors lie on the CPU and belong to the caller; `tier` says where they came from."""

    manifest: Manifest
    digest: str
    tensors: dict[str, Tensor]
    extra: dict[str, Any]
    tier: str

    @property
    def parent(self) -> Parent:
        """What the next commit names as its parent."""
        return Parent(commit=self.manifest.commit, digest=self.digest)


class Tier(Protocol):
    """A place where checkpoints may lie. Both methods raise `ObjectMissing`, and `StoreError` if it cannot be asked."""

    name: str

    def manifest(self, commit: str) -> bytes:
        """The manifest as it was written."""

    def object(self, commit: str, entry: ObjectEntry) -> bytes:
        """The bytes of an object, as many as there are, up to its size and one more."""


class StoreTier:
    """A store, on the local disk or elsewhere."""

    def __init__(self, name: str, store: Store) -> None:
        self.name = name
        self._store = store

    def manifest(self, commit: str) -> bytes:
        """Read it."""
        return self._store.read(manifest_key(commit))

    def object(self, commit: str, entry: ObjectEntry) -> bytes:
        """Read it in pieces; the size is asked for, because a longer one is damaged too."""
        size = self._store.size(entry.key)
        if size != entry.size:
            raise CheckpointError(commit, f"object {entry.key} has {size} bytes instead of {entry.size}")
        return b"".join(self._store.stream(entry.key, size))


class ArenaTier:
    """Shared memory: the newest snapshots. Their manifests, with the checksums, lie on the local disk."""

    name = "shared memory"

    def __init__(self, path: Path, local: Store) -> None:
        self._path = path
        self._local = local

    def manifest(self, commit: str) -> bytes:
        """The local one, if the arena still holds the snapshot."""
        with self._holding(commit):
            return self._local.read(manifest_key(commit))

    def object(self, commit: str, entry: ObjectEntry) -> bytes:
        """Its bytes in the slot; whether they are sound, the checksum tells."""
        number = int(entry.key.rpartition("-")[2].removesuffix(".safetensors"))
        with self._holding(commit) as (arena, slot, said):
            placed = said.objects[number]
            data = arena.read(slot, placed.offset, placed.size)
            if not arena.holds(slot):
                raise self._missing(commit)
            return data

    @contextmanager
    def _holding(self, commit: str) -> Iterator[tuple[ArenaReader, Slot, SnapshotDescription]]:
        try:
            reader = ArenaReader(self._path)
        except (OSError, ArenaError) as error:
            raise self._missing(commit) from error
        with reader:
            for slot in reader.slots():
                said = _described(reader, slot)
                if said is not None and commit_id(said.step, said.epoch, said.attempt) == commit:
                    yield reader, slot, said
                    return
        raise self._missing(commit)

    def _missing(self, commit: str) -> ObjectMissing:
        return ObjectMissing(str(self._path), "holds no snapshot of that name", manifest_key(commit))


def _described(reader: ArenaReader, slot: Slot) -> SnapshotDescription | None:
    """What a slot holds; None if that is nothing, or of another version of this program."""
    raw = reader.description(slot) if slot.complete else None
    with suppress(ValidationError):
        return SnapshotDescription.model_validate_json(raw) if raw else None
    return None


def load_checkpoint(store: Store, commit: str, nearer: Sequence[Tier] = ()) -> Loaded:
    """Load and verify one commit, from the first place that has it intact: the nearer ones in order, then the store.

    What a first reading of the store finds wrong is read again: a bad transfer is no damage.

    Raises:
        CheckpointError: it is intact nowhere.
        StoreError: it is intact nowhere nearer, and the store cannot be asked; says nothing about the commit.
    """
    for tier in nearer:
        try:
            return _load(tier, commit)
        except ObjectMissing:
            continue
        except (CheckpointError, StoreError) as error:
            log.warning("tier_unusable", tier=tier.name, commit=commit, why=str(error))
    far = StoreTier("store", store)
    try:
        with suppress(CheckpointError):
            return _load(far, commit)
        return _load(far, commit)
    except ObjectMissing as error:
        raise CheckpointError(commit, "its manifest is missing") from error


def _load(tier: Tier, commit: str) -> Loaded:
    """Raises ObjectMissing if the tier has no such commit, CheckpointError if what it has cannot be used."""
    raw = tier.manifest(commit)
    try:
        sealed = unseal(raw)
        if sealed.manifest.commit != commit:
            raise CheckpointError(commit, f"its manifest is that of {sealed.manifest.commit}")
        tensors: dict[str, Tensor] = {}
        for index, entry in enumerate(sealed.manifest.objects):
            expected = [tensor for tensor in sealed.manifest.tensors if tensor.object == index]
            tensors |= _read_object(tier, commit, entry, expected)
    except ObjectMissing as error:
        raise CheckpointError(commit, f"object {error.key} is missing") from error
    except ManifestError as error:
        raise CheckpointError(commit, str(error)) from error
    _check_consistency(sealed.manifest, tensors)
    return Loaded(sealed.manifest, sealed.digest, tensors, sealed.manifest.extra, tier.name)


def _read_object(tier: Tier, commit: str, entry: ObjectEntry, expected: list[TensorEntry]) -> dict[str, Tensor]:
    data = tier.object(commit, entry)
    if len(data) != entry.size:
        raise CheckpointError(commit, f"object {entry.key} has {len(data)} bytes instead of {entry.size}")
    if crc32c(data) != entry.crc32c:
        raise CheckpointError(commit, f"object {entry.key} does not match its CRC32C: it was changed after the save")
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(commit, f"object {entry.key} is not a safetensors file: {error}") from error
    if odd := tensors.keys() ^ {tensor.name for tensor in expected}:
        raise CheckpointError(commit, f"object {entry.key} and the tensor index differ in {sorted(odd)[:5]}")
    for tensor in expected:
        _check_tensor(commit, tensor, tensors[tensor.name])
    return tensors


def _check_tensor(commit: str, entry: TensorEntry, tensor: Tensor) -> None:
    if dtype_name(tensor.dtype) != entry.dtype or tuple(tensor.shape) != entry.shape:
        found = f"{dtype_name(tensor.dtype)}{tuple(tensor.shape)}"
        raise CheckpointError(commit, f"tensor {entry.name} is {found}, its index says {entry.dtype}{entry.shape}")
    norm = norm_of_bytes(_bytes_of(tensor), entry.dtype)
    if norm is None and entry.norm is None:
        return
    if norm is None or entry.norm is None or not math.isclose(norm, entry.norm, rel_tol=_NORM_TOLERANCE):
        raise CheckpointError(commit, f"tensor {entry.name} has norm {norm}, at the save it had {entry.norm}")


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _check_consistency(manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    """Optimizer steps equal the step less the updates that were not applied; the state says what the manifest says."""
    commit, extra = manifest.commit, manifest.extra
    updates = manifest.step - int(extra.get("skipped_updates", 0))
    counts = {count for name in tensors if _is_step_count(name) for count in _values(tensors[name])}
    if counts - {updates}:
        raise CheckpointError(commit, f"optimizer steps are {sorted(counts)[:5]}, the state has seen {updates} updates")
    for key in ("step", "tokens", "position"):
        if key in extra and extra[key] != getattr(manifest, key):
            raise CheckpointError(
                commit, f"{key} is {getattr(manifest, key)} in the manifest, {extra[key]} in the state"
            )


def _is_step_count(name: str) -> bool:
    return name.startswith(OPTIMIZER) and name.endswith(".step")


def _values(tensor: Tensor) -> Iterable[float]:
    return [float(value) for value in tensor.flatten().tolist()]
