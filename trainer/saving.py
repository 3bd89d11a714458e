"""Checkpoints as the loop sees them: a copy of the state, and later the news of what became of it.

The copy is all that training waits for. Disk and store are the business of the writer and uploader processes, whose
records say how each save ended; a failed one is a record, never the end of training.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from typing import Literal

import structlog
from pydantic import ValidationError

from monitors.records import CommitFailedRecord, CommitRecord, SnapshotRecord, parse_record
from monitors.tail import Tail
from trainer.checkpoint import Health, SnapshotRefusedError, Snapshotter
from trainer.contract.paths import KEEPER_ROLES, RunPaths
from trainer.errors import SupersededError
from trainer.interval import Interval, Measured, choose_interval
from trainer.reporter import Reporter
from trainer.state import TrainingState

log = structlog.get_logger(__name__)

_POLL_S = 0.01
_RECENT = 5  # stalls whose median counts: a first one that allocates does not
_UNTIL_MEASURED = 50  # steps


class SaveSchedule:
    """When a checkpoint is due: every so many steps, or as often as is best by what was measured.

    `loaded_step` is the step of the checkpoint that this attempt began with, None if it began from scratch.
    """

    def __init__(self, every: int | Literal["auto"], failure_every_s: float, loaded_step: int | None) -> None:
        self.loaded_step = loaded_step
        self.disk_s = 0.0
        self._every = every
        self._failure_every_s = failure_every_s
        self._stalls_s: deque[float] = deque(maxlen=_RECENT)
        self._next = (loaded_step or 0) + _UNTIL_MEASURED

    def due(self, step: int) -> bool:
        """Whether one is due at this step."""
        return step >= self._next if self._every == "auto" else step % self._every == 0

    def taken(self, step: int, stall_s: float, step_s: float | None) -> Interval | None:
        """One was taken; the interval until the next, if it is chosen here."""
        self._stalls_s.append(stall_s)
        if self._every != "auto":
            return None
        if step_s is None:  # the first one, before any step
            chosen = Interval(_UNTIL_MEASURED, "nothing is measured yet")
        else:
            measured = Measured(statistics.median(self._stalls_s), self.disk_s, step_s)
            chosen = choose_interval(measured, self._failure_every_s)
        self._next = step + chosen.steps
        return chosen

    def refused(self, step: int) -> None:
        """One could not be taken; not to be asked for again at every step."""
        self._next = step + _UNTIL_MEASURED


class Saver:
    """Saves states of one attempt."""

    def __init__(
        self, snapshotter: Snapshotter, paths: RunPaths, attempt: int, reporter: Reporter, schedule: "SaveSchedule"
    ) -> None:
        self._snapshotter = snapshotter
        self._schedule = schedule
        self._attempt = attempt
        self._reporter = reporter
        self._news = [Tail.from_end(paths.keeper_records(role)) for role in KEEPER_ROLES]
        self._under_way: set[int] = set()
        self.saved_step = schedule.loaded_step
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

    def save(self, step: int, state: TrainingState, health: Health, step_s: float | None, late_steps: int = 0) -> None:
        """Copy the state; a record says if that is not possible now. `step_s`: how long a step takes, if known."""
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
            self._schedule.refused(step)
            self.refuse(step, refusal.why)
            return
        self._under_way.add(step)
        chosen = self._schedule.taken(step, taken.stall_s, step_s)
        self._reporter.emit(
            SnapshotRecord,
            step=step,
            stall_s=taken.stall_s,
            bytes=taken.bytes,
            late_steps=late_steps,
            next_steps=chosen.steps if chosen is not None else None,
            because=chosen.because if chosen is not None else "",
        )

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due at this step."""
        return self._schedule.due(step)

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
                case CommitRecord(tier="disk"):
                    self._schedule.disk_s = record.seconds
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
                try:
                    record = parse_record(line)
                except ValidationError as error:  # torn on a full disk, or of another version: never a reason to stop
                    log.warning("record_of_keeper_unreadable", why=str(error))
                    continue
                if record.attempt == self._attempt:
                    yield record


def finite_or_none(value: float | None) -> float | None:
    """What is not finite is not known: health figures of a manifest are finite by type."""
    return value if value is not None and math.isfinite(value) else None
