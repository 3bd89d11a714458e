"""Checkpoints as the loop sees them: when a state may be saved, and the records that say what became of it.

A failed save is a record, never the end of training; at most one save is under way. The records of a commit are sent
once its manifest exists, not when the copy was taken.
"""

import contextlib
import math

import structlog
import torch

from monitors.records import CommitFailedRecord, CommitRecord, SnapshotRecord
from trainer.checkpoint import CheckpointWriter, Committed, Health, SaveFailed, SnapshotRefusedError
from trainer.contract.store import Store
from trainer.errors import SupersededError
from trainer.faults.desk import FaultDesk
from trainer.reporter import Reporter
from trainer.state import TrainingState

log = structlog.get_logger(__name__)


class Saver:
    """Saves states of one attempt and reports each save's end."""

    def __init__(
        self, writer: CheckpointWriter, store: Store, reporter: Reporter, faults: FaultDesk, loaded_step: int | None
    ) -> None:
        self._writer = writer
        self._store = store
        self._reporter = reporter
        self._faults = faults
        self.saved_step = loaded_step
        self.last_error = ""

    def save(self, step: int, state: TrainingState, health: Health) -> None:
        """Copy the state and begin to save it; a record says if that is not possible now."""
        self._faults.before_save(step)
        try:
            stall_s = self._writer.snapshot(
                state.tensors,
                state.extra,
                step=step,
                position=state.extra["position"],
                tokens=state.extra["tokens"],
                health=health,
            )
        except SnapshotRefusedError as refusal:
            self._failed(step, refusal.why)
            return
        num_bytes = sum(tensor.nbytes for tensor in state.tensors.values())
        self._reporter.emit(SnapshotRecord, step=step, stall_s=stall_s, bytes=num_bytes)

    def refuse(self, step: int, why: str) -> None:
        """Say that no save of this step was begun."""
        self._failed(step, why)

    def poll(self) -> None:
        """Report saves that have come to an end.

        Raises:
            SupersededError: another writer holds the store, so nothing that this attempt does will count.
        """
        for result in self._writer.poll():
            match result:
                case Committed():
                    self._committed(result)
                case SaveFailed():
                    self._failed(result.step, result.error)
                    if result.superseded:
                        raise SupersededError(result.step, result.error)

    def flush(self, timeout_s: float) -> None:
        """Wait for the save that is under way, and report it."""
        if not self._writer.flush(timeout_s):
            self.last_error = f"still being saved after {timeout_s:.0f} s"
        self.poll()

    def close(self, timeout_s: float) -> None:
        """The same at the end of the attempt."""
        self._writer.close(timeout_s)
        with contextlib.suppress(SupersededError):  # it is leaving anyway; what was committed must be known
            self.poll()

    def _committed(self, done: Committed) -> None:
        self.saved_step = done.step
        self._reporter.emit(
            CommitRecord,
            step=done.step,
            commit=done.commit,
            position=done.position,
            tokens=done.tokens,
            bytes=done.bytes,
            seconds=done.seconds,
        )
        self._faults.after_commit(done.step, done.commit, self._store)

    def _failed(self, step: int, why: str) -> None:
        self.last_error = why
        log.warning("save_failed", step=step, why=why)
        self._reporter.emit(CommitFailedRecord, step=step, error=why)


def finite_or_none(value: float | None) -> float | None:
    """What is not finite is not known: health figures of a manifest are finite by type."""
    return value if value is not None and math.isfinite(value) else None


def all_finite(state: TrainingState) -> bool:
    """Whether every number of a state is finite; one look at the device, whatever the number of tensors."""
    floats = [tensor for tensor in state.tensors.values() if tensor.is_floating_point()]
    norms = torch._foreach_norm(floats, ord=float("inf"))
    return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())
