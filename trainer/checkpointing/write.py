"""Saving: one copy at a step boundary is all that training waits for; a thread does the rest.

Order of a save: data objects (new names, never reused), their sizes as the store sees them, the fence, the manifest.
Until the manifest exists there is no checkpoint. One save at a time; a failed one is a result, not an exception.
"""

import json
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from trainer.checkpointing.errors import NonFiniteStateError, SnapshotRefusedError
from trainer.checkpointing.tensors import dtype_name, grouped, norm_of
from trainer.contract import fence
from trainer.contract.manifest import (
    Health,
    Manifest,
    ObjectEntry,
    Parent,
    TensorEntry,
    commit_id,
    crc32c,
    data_key,
    manifest_key,
    seal,
)
from trainer.contract.store import Store, StoreError, StoreUnavailable

OBJECT_BYTES = 256 << 20  # large enough for S3's throughput, small enough to hold once more in memory

_SAVE_ERRORS = (
    StoreError, fence.FenceError, NonFiniteStateError, SafetensorError, OSError, ValueError, TypeError, RuntimeError,
    MemoryError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Committed:
    """A save that came to its end: the manifest exists."""

    step: int
    commit: str
    position: int
    tokens: int
    bytes: int
    seconds: float
    digest: str


@dataclass(frozen=True, slots=True)
class SaveFailed:
    """A save that did not. `superseded`: another writer holds the store now, so no later save will succeed."""

    step: int
    error: str
    superseded: bool = False


@dataclass(frozen=True, slots=True)
class _Job:
    step: int
    position: int
    tokens: int
    health: Health
    extra_json: str
    tensors: dict[str, Tensor]
    parent: Parent | None
    begun_s: float


class CheckpointWriter:
    """Saves the states of one attempt. Used from one thread."""

    def __init__(
        self,
        store: Store,
        *,
        run_id: str,
        epoch: int,
        attempt: int,
        config_digest: str,
        scratch_dir: Path,
        parent: Parent | None = None,
        object_bytes: int = OBJECT_BYTES,
    ) -> None:
        """`scratch_dir` is this writer's own; leftovers of a killed one are removed. `parent`: what was loaded."""
        self._store = store
        self._run_id = run_id
        self._epoch = epoch
        self._attempt = attempt
        self._config_digest = config_digest
        self._scratch = scratch_dir
        self._object_bytes = object_bytes
        self._parent = parent
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._results: queue.SimpleQueue[Committed | SaveFailed] = queue.SimpleQueue()
        self._saved_step: int | None = None
        scratch_dir.mkdir(parents=True, exist_ok=True)
        for leftover in scratch_dir.glob("*.safetensors"):
            leftover.unlink()

    @property
    def busy(self) -> bool:
        """Whether a save is under way; a snapshot would be refused."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def saved_step(self) -> int | None:
        """The step of this attempt's newest commit."""
        return self._saved_step

    def snapshot(
        self,
        tensors: Mapping[str, Tensor],
        extra: Mapping[str, Any],
        *,
        step: int,
        position: int,
        tokens: int,
        health: Health | None = None,
    ) -> float:
        """Copy the state, start saving it, and return the seconds this took (the stall).

        Raises:
            SnapshotRefusedError: a save is under way, or this step is committed already.
        """
        begun_s = time.monotonic()
        if self.busy:
            raise SnapshotRefusedError(f"the save before step {step} is still under way; flush, or ask again later")
        if self._saved_step == step:
            raise SnapshotRefusedError(f"step {step} is committed already")
        copies = self._copy(tensors)
        try:
            extra_json = json.dumps(dict(extra), allow_nan=False)
        except (TypeError, ValueError) as error:
            self._results.put(SaveFailed(step, f"the extra state is not finite JSON: {error}"))
            return time.monotonic() - begun_s
        job = _Job(step, position, tokens, health or Health(), extra_json, copies, self._parent, begun_s)
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint-writer", daemon=True)
        self._thread.start()
        return time.monotonic() - begun_s

    def poll(self) -> list[Committed | SaveFailed]:
        """What came to an end since the last call."""
        results: list[Committed | SaveFailed] = []
        while not self._results.empty():
            results.append(self._results.get())
        return results

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is being saved; False if that took too long. Results still come by `poll`."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.busy

    def close(self, timeout_s: float) -> bool:
        """The same at the end of the attempt: nothing is left to the interpreter's exit, which would lose it."""
        return self.flush(timeout_s)

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Into buffers that are allocated once, because fresh pages cost more than the copy; pinned for a GPU."""
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        self._buffers = buffers
        for name, tensor in tensors.items():
            buffers[name].copy_(tensor, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()
        return buffers

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        old = self._buffers.get(name)
        if old is not None and old.shape == like.shape and old.dtype == like.dtype:
            return old
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)

    def _run(self, job: _Job) -> None:
        try:
            committed = self._save(job)
        except _SAVE_ERRORS as error:
            superseded = isinstance(error, fence.FenceLostError)
            self._results.put(SaveFailed(job.step, f"{type(error).__name__}: {error}", superseded))
            return
        self._parent = Parent(commit=committed.commit, digest=committed.digest)
        self._saved_step = job.step
        self._results.put(committed)

    def _save(self, job: _Job) -> Committed:
        commit = commit_id(job.step, self._epoch, self._attempt)
        nonce = uuid.uuid4().hex
        objects: list[ObjectEntry] = []
        index: list[TensorEntry] = []
        for number, group in enumerate(grouped(job.tensors, self._object_bytes)):
            index.extend(_entry(name, tensor, number) for name, tensor in group.items())
            objects.append(self._put(data_key(commit, f"r0-{nonce[:8]}-{number:05d}.safetensors"), group))
        manifest = Manifest(
            run_id=self._run_id,
            commit=commit,
            step=job.step,
            epoch=self._epoch,
            attempt=self._attempt,
            tokens=job.tokens,
            position=job.position,
            nonce=nonce,
            parent=job.parent,
            config_digest=self._config_digest,
            objects=tuple(objects),
            tensors=tuple(index),
            health=job.health,
            extra=json.loads(job.extra_json),
        )
        sealed = seal(manifest)
        fence.ensure_current(self._store, self._epoch)
        self._store.create(manifest_key(commit), sealed.raw)
        seconds = time.monotonic() - job.begun_s
        return Committed(job.step, commit, job.position, job.tokens, manifest.bytes, seconds, sealed.digest)

    def _put(self, key: str, group: dict[str, Tensor]) -> ObjectEntry:
        """One object: the CRC is that of the bytes in memory, so that a fault of the disk on the way is found."""
        data = safetensors.torch.save(group)
        path = self._scratch / key.rpartition("/")[2]
        try:
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._store.put_file(key, path)
        finally:
            path.unlink(missing_ok=True)
        stored = self._store.size(key)
        if stored != len(data):
            raise StoreUnavailable(self._store.url, f"it holds {stored} bytes of the {len(data)} written", key)
        return ObjectEntry(key=key, size=len(data), crc32c=crc32c(data))


def _entry(name: str, tensor: Tensor, number: int) -> TensorEntry:
    norm = norm_of(tensor)
    if norm is not None and not math.isfinite(norm):
        raise NonFiniteStateError(name)
    return TensorEntry(name=name, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), object=number, norm=norm)
