"""Checkpoints as the loop sees them: a copy of the state, and later the news of what became of it.

The copy is all that training waits for. Disk and store are the business of the writer and uploader processes, whose
records say how each save ended; a failed one is a record, never the end of training.
"""

import math
import time
from collections.abc import Iterator

import structlog

from monitors.records import CommitFailedRecord, CommitRecord, SnapshotRecord, parse_record
from monitors.tail import Tail
from trainer.checkpoint import Health, SnapshotRefusedError, Snapshotter
from trainer.contract.paths import KEEPER_ROLES, RunPaths
from trainer.errors import SupersededError
from trainer.reporter import Reporter
from trainer.state import TrainingState

log = structlog.get_logger(__name__)

_POLL_S = 0.01


class Saver:
    """Saves states of one attempt."""

    def __init__(
        self, snapshotter: Snapshotter, paths: RunPaths, attempt: int, reporter: Reporter, loaded_step: int | None
    ) -> None:
        self._snapshotter = snapshotter
        self._attempt = attempt
        self._reporter = reporter
        self._news = [Tail.from_end(paths.keeper_records(role)) for role in KEEPER_ROLES]
        self._under_way: set[int] = set()
        self.saved_step = loaded_step
        self.last_error = ""

    def reserve(self, state: TrainingState) -> None:
        """Make room for snapshots ahead of the first; without any room, each save will say so."""
        try:
            self._snapshotter.reserve(state.tensors)
        except SnapshotRefusedError as refusal:
            log.warning("arena_not_reserved", why=refusal.why)

    def ready(self) -> bool:
        """Whether a snapshot could be taken now."""
        return self._snapshotter.ready()

    def wait_until_ready(self, timeout_s: float) -> bool:
        """The same, after having waited for a slot."""
        deadline_s = time.monotonic() + timeout_s
        while not self.ready():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(_POLL_S)
        return True

    def has(self, step: int) -> bool:
        """Whether the state of this step is saved, or on its way."""
        return step == self.saved_step or step in self._under_way

    def save(self, step: int, state: TrainingState, health: Health, late_steps: int = 0) -> None:
        """Copy the state; a record says if that is not possible now."""
        try:
            taken = self._snapshotter.snapshot(
                state.tensors,
                state.extra,
                step=step,
                position=state.extra["position"],
                tokens=state.extra["tokens"],
                health=health,
            )
        except SnapshotRefusedError as refusal:
            self.refuse(step, refusal.why)
            return
        self._under_way.add(step)
        self._reporter.emit(SnapshotRecord, step=step, stall_s=taken.stall_s, bytes=taken.bytes, late_steps=late_steps)

    def refuse(self, step: int, why: str) -> None:
        """Say that no save of this step was begun."""
        self.last_error = why
        log.warning("save_failed", step=step, why=why)
        self._reporter.emit(CommitFailedRecord, step=step, error=why)

    def poll(self) -> None:
        """Take in the news of saves.

        Raises:
            SupersededError: another writer holds the store, so nothing that this attempt does will count.
        """
        for record in self._own_news():
            match record:
                case CommitRecord(tier="store"):
                    self._under_way.discard(record.step)
                    self.saved_step = max(record.step, self.saved_step or 0)
                case CommitFailedRecord():
                    self.last_error = record.error
                    if record.gone:
                        self._under_way.discard(record.step)
                    if record.superseded:
                        raise SupersededError(record.step, record.error)

    def flush(self, step: int, timeout_s: float) -> bool:
        """Wait until the state of a step is in the store; False if it is not, or is no longer on its way.

        Raises:
            SupersededError: as `poll`.
        """
        deadline_s = time.monotonic() + timeout_s
        self.poll()
        while step in self._under_way:
            if time.monotonic() > deadline_s:
                self.last_error = f"still on its way to the store after {timeout_s:.0f} s ({self.last_error or 'slow'})"
                return False
            time.sleep(_POLL_S)
            self.poll()
        return self.saved_step == step

    def close(self) -> None:
        """Let go of the arena; what is on its way goes on without us."""
        self._snapshotter.close()

    def _own_news(self) -> Iterator[object]:
        for tail in self._news:
            for line in tail.poll():
                record = parse_record(line)
                if record.attempt == self._attempt:
                    yield record


def finite_or_none(value: float | None) -> float | None:
    """What is not finite is not known: health figures of a manifest are finite by type."""
    return value if value is not None and math.isfinite(value) else None
