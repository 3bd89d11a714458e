"""What a run directory says of the data that was read: attempts, the plans they followed, the steps they took.

Torch-free, and nothing but the run directory is looked at: neither data nor supervisor need to be there.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.contract.commands import ApplyPlan, read_commands
from trainer.contract.config import RunConfig
from trainer.contract.paths import RunPaths
from trainer.contract.plan import ResumePlan, read_plan
from trainer.data.book import Book, read_book, segments_of, timeline_of
from trainer.data.cursor import Cursor
from trainer.data.errors import DataError
from trainer.data.timeline import Timeline

_KINDS = ("started", "step", "plan_applied")


@dataclass(frozen=True, slots=True)
class Step:
    """A step that was taken: the raw positions [begin, end) that it used up, for how many sequences."""

    step: int
    begin: int
    end: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps of one attempt under one plan. `position` is where it began, `replay` whether nothing of it counts."""

    attempt: int
    position: int
    step: int
    timeline: Timeline
    cursor: Cursor
    steps: list[Step]
    replay: bool

    @property
    def stands(self) -> tuple[int, int]:
        """Cursor and step behind the last step that was taken."""
        return (self.steps[-1].end, self.steps[-1].step) if self.steps else (self.position, self.step)

    def step_at(self, position: int) -> Step | None:
        """The step that used a position up."""
        number = bisect_right(self.steps, position, key=lambda step: step.begin) - 1
        return self.steps[number] if number >= 0 and position < self.steps[number].end else None


@dataclass(frozen=True, slots=True)
class History:
    """A run as far as it has come. The last phase's plan is the one that goes on."""

    config: RunConfig
    book: Book
    phases: list[Phase]

    @property
    def shard_samples(self) -> list[int]:
        """Samples of each shard, by number."""
        length = self.config.batch.sequence_tokens
        return [max(0, (row.shard.tokens - 1) // length) for row in self.book.shards]

    def survives(self, phase: Phase, step: int) -> bool:
        """Whether no later attempt, replays aside, went back before the step."""
        later = (other for other in self.phases if other.attempt > phase.attempt and not other.replay)
        return not phase.replay and all(other.step >= step for other in later)

    @property
    def last(self) -> Phase:
        """Where the run stands."""
        return next(phase for phase in reversed(self.phases) if not phase.replay)


def read_history(paths: RunPaths) -> History:
    """Everything that the directory of a run says.

    Raises:
        DataError: it says too little: the run was never launched, or has not begun.
    """
    try:
        config = RunConfig.model_validate_json(paths.run_yaml.read_bytes())
    except (OSError, ValidationError) as error:
        what = f"{paths.run_yaml}: cannot be read ({error})"
        raise DataError(what, "name the directory of a run that was launched") from error
    book = read_book(paths.data_book)
    if book is None:
        what = f"{paths.root}: has no {paths.data_book.name}"
        raise DataError(what, "the run was never launched, or its trainer is not ours")
    attempts = sorted(int(path.stem.removeprefix("attempt-")) for path in (paths.root / "plans").glob("attempt-*.json"))
    phases = [phase for attempt in attempts for phase in _phases(paths, attempt, config, book)]
    if not any(not phase.replay for phase in phases):
        raise DataError(f"{paths.root}: no attempt has begun", "look again once the run trains")
    return History(config, book, phases)


def _phases(paths: RunPaths, attempt: int, config: RunConfig, book: Book) -> Iterator[Phase]:
    rows = list(_records(paths.records(attempt)))
    started = next((row for row in rows if row["kind"] == "started"), None)
    if started is None:
        return
    plan = read_plan(paths.plan(attempt)).anchored(started["step"], started["position"])
    updates = {c.id: c.update for c in read_commands(paths.commands(attempt)) if isinstance(c, ApplyPlan)}
    segments = segments_of(plan.segments, book, config.data, config.batch.sequence_tokens)
    timeline = timeline_of(segments, book, config.data)
    phase = _phase(plan, timeline, started["position"], started["step"])
    for row in rows:
        if row["kind"] == "plan_applied":
            yield phase
            update = updates[row["command"]]
            plan = plan.model_copy(update={"skips": update.skips, "quarantines": update.quarantines})
            phase = _phase(plan, timeline, row["position"], row["step"])
        elif row["kind"] == "step" and row["data"] is not None:
            sequences = sum(count for count, _ in row["shards"].values())
            phase.steps.append(Step(row["step"], row["data"]["begin"], row["data"]["end"], sequences))
    yield phase


def _phase(plan: ResumePlan, timeline: Timeline, position: int, step: int) -> Phase:
    cursor = Cursor(timeline.shards_of, position, plan.deferred_from, timeline.shards_from)
    cursor.apply(plan.skips, plan.quarantines)
    return Phase(plan.attempt, position, step, timeline, cursor, [], plan.replay is not None)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records that matter here; a line that is being written at the moment is not there yet."""
    try:
        complete = path.read_bytes().rpartition(b"\n")[0]
    except FileNotFoundError:
        return
    for line in complete.splitlines():
        row = json.loads(line)
        if row["kind"] in _KINDS:
            yield row
