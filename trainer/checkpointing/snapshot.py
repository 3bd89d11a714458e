"""The trainer's part of a save: one copy of the state into the snapshot arena. All that training waits for.

Putting the copy on disk and sending it to the store is the business of processes of their own (`trainer.keeping`).
"""

import json
import mmap
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

from trainer.checkpointing.errors import SnapshotRefusedError
from trainer.checkpointing.layout import OBJECT_BYTES, Layout, TensorSpec, plan_layout
from trainer.checkpointing.tensors import dtype_name
from trainer.contract.arena import Arena, ArenaError
from trainer.contract.manifest import Health, Parent, commit_id

log = structlog.get_logger(__name__)

_DESCRIPTION_BYTES = 256 << 10  # beside the tensors: generator states, loader and guard windows; grows if need be


@dataclass(frozen=True, slots=True)
class Author:
    """Whose snapshots these are."""

    run_id: str
    epoch: int
    attempt: int
    config_digest: str
    loaded: Parent | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy that is complete: the loop stood still for `stall_s`."""

    commit: str
    bytes: int
    stall_s: float


class Snapshotter:
    """Copies states of one attempt into the arena. Used from one thread."""

    def __init__(self, arena: Path, author: Author, object_bytes: int = OBJECT_BYTES) -> None:
        """`arena` is the link in the run directory; the file behind it is made when its size is known."""
        self._path = arena
        self._author = author
        self._object_bytes = object_bytes
        self._arena: Arena | None = None
        self._planned: tuple[tuple[TensorSpec, ...], Layout, bytes] | None = None
        self._pinned = False

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the arena for states like this one, so that the first snapshot does not have to.

        Raises:
            SnapshotRefusedError: there is no room, or an older snapshot must leave first.
        """
        layout, described = self._layout(tensors)
        self._fitting(layout.bytes, len(described) + _DESCRIPTION_BYTES, pin=_on_gpu(tensors))

    def ready(self) -> bool:
        """Whether a slot is free."""
        return self._arena is None or self._arena.free_slot() is not None

    def snapshot(
        self, tensors: Mapping[str, Tensor], extra: Mapping[str, Any], *, step: int, position: int, tokens: int,
        health: Health | None = None,
    ) -> Snapshot:  # fmt: skip
        """Copy the state.

        Raises:
            SnapshotRefusedError: both slots wait for the disk, there is no room, or the state is not JSON.
        """
        begun_s = time.monotonic()
        author = self._author
        facts = {
            "run_id": author.run_id,
            "step": step,
            "epoch": author.epoch,
            "attempt": author.attempt,
            "tokens": tokens,
            "position": position,
            "nonce": uuid.uuid4().hex,
            "loaded": author.loaded.model_dump() if author.loaded is not None else None,
            "config_digest": author.config_digest,
            "health": (health or Health()).model_dump(),
            "extra_json": _as_json(extra),
        }
        layout, described = self._layout(tensors)
        description = b'{"objects":' + described + b"," + json.dumps(facts).encode()[1:]
        arena = self._fitting(layout.bytes, len(description), pin=_on_gpu(tensors))
        index = arena.free_slot()
        if index is None:
            raise SnapshotRefusedError("both slots of the arena wait to be put on disk, which is slower than the saves")
        number = arena.begin(index)
        _copy(tensors, layout, arena.buffer, arena.offset(index))
        arena.complete(index, number, layout.bytes, description)
        stall_s = time.monotonic() - begun_s
        return Snapshot(commit_id(step, author.epoch, author.attempt), layout.bytes, stall_s)

    def close(self) -> None:
        """Let go of the arena; what is in it is still saved."""
        if self._arena is not None:
            if self._pinned:
                _unpin(self._arena.buffer)
            self._arena.close()
            self._arena = None

    def _layout(self, tensors: Mapping[str, Tensor]) -> tuple[Layout, bytes]:
        specs = tuple(
            TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape), tensor.nbytes)
            for name, tensor in tensors.items()
        )
        if self._planned is None or self._planned[0] != specs:
            try:
                layout = plan_layout(specs, self._object_bytes)
            except ValueError as error:
                raise SnapshotRefusedError(str(error)) from error
            described = json.dumps([placed.model_dump() for placed in layout.objects]).encode()
            self._planned = specs, layout, described
        return self._planned[1], self._planned[2]

    def _fitting(self, payload_bytes: int, description_bytes: int, *, pin: bool) -> Arena:
        if self._arena is not None and self._arena.fits(payload_bytes, description_bytes):
            return self._arena
        self.close()
        try:
            self._arena = Arena(self._path, payload_bytes, description_bytes)
        except (ArenaError, OSError) as error:
            raise SnapshotRefusedError(f"no arena of {payload_bytes / 1e9:.2f} GB twice: {error}") from error
        self._pinned = pin and _pin(self._arena.buffer)
        return self._arena


def _on_gpu(tensors: Mapping[str, Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors.values())


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], layout: Layout, buffer: mmap.mmap, base: int) -> None:
    """Headers and tensors to their places; from a GPU all copies are under way before the first is waited for."""
    for placed, header in zip(layout.objects, layout.headers, strict=True):
        begin = base + placed.offset
        buffer[begin : begin + len(header)] = header
        for place in placed.tensors:
            source = tensors[place.name]
            if source.numel():
                flat = torch.frombuffer(buffer, dtype=source.dtype, count=source.numel(), offset=begin + place.begin)
                flat.view(source.shape).copy_(source, non_blocking=source.is_cuda)
    if _on_gpu(tensors):
        torch.cuda.synchronize()


def _pin(buffer: mmap.mmap) -> bool:
    """Register the mapping with CUDA, so that copies into it run at full speed; without it they still run."""
    failed = int(_runtime().cudaHostRegister(_address(buffer), len(buffer), 0))
    if failed:
        log.warning("arena_not_pinned", cuda_error=failed)
    return not failed


def _unpin(buffer: mmap.mmap) -> None:
    _runtime().cudaHostUnregister(_address(buffer))


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _address(buffer: mmap.mmap) -> int:
    return torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()


def _as_json(extra: Mapping[str, Any]) -> str:
    """The extra state as JSON.

    Raises:
        SnapshotRefusedError: JSON cannot carry it, so it would come back changed.
    """
    try:
        return json.dumps(dict(extra), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SnapshotRefusedError(f"the extra state is not finite JSON: {error}") from error
