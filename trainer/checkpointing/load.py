"""Loading a commit: everything that can be checked is checked before anything is returned (DESIGN 9).

`CheckpointError` condemns a commit. A store that cannot be reached condemns nothing: its `StoreError` passes through.
Nothing is unpickled: tensors are safetensors, the rest is JSON.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from trainer.checkpointing.errors import CheckpointError
from trainer.checkpointing.tensors import OPTIMIZER, dtype_name, norm_of
from trainer.contract.manifest import (
    Manifest,
    ManifestError,
    ObjectEntry,
    Parent,
    TensorEntry,
    crc32c,
    manifest_key,
    unseal,
)
from trainer.contract.store import ObjectMissing, Store

_NORM_TOLERANCE = 1e-9  # float64 sums of the same numbers in another order; CRC covers the bits


@dataclass(frozen=True, slots=True)
class Loaded:
    """A verified state. Tensors lie on the CPU and belong to the caller."""

    manifest: Manifest
    digest: str
    tensors: dict[str, Tensor]
    extra: dict[str, Any]

    @property
    def parent(self) -> Parent:
        """What the next commit names as its parent."""
        return Parent(commit=self.manifest.commit, digest=self.digest)


def load_checkpoint(store: Store, commit: str) -> Loaded:
    """Load and verify one commit. What a first reading finds wrong is read again: a bad transfer is no damage.

    Raises:
        CheckpointError: it is not intact or not consistent, twice.
        StoreError: the store cannot be asked; says nothing about the commit.
    """
    try:
        return _load(store, commit)
    except CheckpointError:
        return _load(store, commit)


def _load(store: Store, commit: str) -> Loaded:
    try:
        sealed = unseal(store.read(manifest_key(commit)))
        if sealed.manifest.commit != commit:
            raise CheckpointError(commit, f"its manifest is that of {sealed.manifest.commit}")
        tensors: dict[str, Tensor] = {}
        for index, entry in enumerate(sealed.manifest.objects):
            expected = [tensor for tensor in sealed.manifest.tensors if tensor.object == index]
            tensors |= _read_object(store, commit, entry, expected)
    except ObjectMissing as error:
        raise CheckpointError(commit, f"object {error.key} is missing") from error
    except ManifestError as error:
        raise CheckpointError(commit, str(error)) from error
    _check_consistency(sealed.manifest, tensors)
    return Loaded(sealed.manifest, sealed.digest, tensors, sealed.manifest.extra)


def _read_object(store: Store, commit: str, entry: ObjectEntry, expected: list[TensorEntry]) -> dict[str, Tensor]:
    size = store.size(entry.key)
    if size != entry.size:
        raise CheckpointError(commit, f"object {entry.key} has {size} bytes instead of {entry.size}")
    chunks, crc = [], 0
    for chunk in store.stream(entry.key, size):
        crc = crc32c(chunk, crc)
        chunks.append(chunk)
    if crc != entry.crc32c:
        raise CheckpointError(commit, f"object {entry.key} does not match its CRC32C: it was changed after the save")
    try:
        tensors = safetensors.torch.load(b"".join(chunks))
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
    norm = norm_of(tensor)
    if norm is None and entry.norm is None:
        return
    if norm is None or entry.norm is None or not math.isclose(norm, entry.norm, rel_tol=_NORM_TOLERANCE):
        raise CheckpointError(commit, f"tensor {entry.name} has norm {norm}, at the save it had {entry.norm}")


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
