"""A journal of several attempts with losses, as a reader of a run finds it; nothing is trained."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from monitors.records import StartedRecord, StepRecord, StepTime
from orchestrator.journal import Batch, Folded, Journal, Spawned
from orchestrator.policy.events import AttemptExited, RecordReceived


@dataclass(frozen=True, slots=True)
class Walk:
    """One attempt: from a step to a step, spawned and ended at unix seconds, a step taking `step_s`."""

    first: int
    last: int
    spawned_s: float
    ready_s: float
    ended_s: float | None
    replay: bool = False
    step_s: float = 1.0


def loss_at(step: int) -> float:
    """A loss that falls."""
    return 2.0 + 8.0 / (1 + step / 50)


def write_walks(database: Path, walks: Sequence[Walk], totals: str = "{}") -> None:
    """The journal of these attempts, numbered from 1."""
    with closing(Journal.open(database)) as journal:
        journal.commit(Batch(meta={"totals": totals}))
        for number, walk in enumerate(walks, start=1):
            journal.record_spawn(Spawned(number, 1, "boot", 1, walk.spawned_s, None))
            events = [RecordReceived(at_s=walk.ready_s, record=_started(number, walk))]
            events += [_step(number, walk, step) for step in range(walk.first + 1, walk.last + 1)]
            journal.commit(Batch(folded=[Folded(event) for event in events]))
            if walk.ended_s is not None:
                exited = AttemptExited(
                    at_s=walk.ended_s, attempt=number, cause="killed", code=None, signum=9, detail=""
                )
                journal.commit(Batch(folded=[Folded(exited)]))


def _started(number: int, walk: Walk) -> StartedRecord:
    return StartedRecord(
        seq=1, attempt=number, at_s=walk.ready_s, step=walk.first, position=walk.first * 4, tokens=0, loaded=None,
        precision="fp32", device="cpu", parameters=1, vocab_size=2, batch_samples=4, sample_tokens=2, total_steps=1000,
        total_samples=10**6, shards=("a",), peak_lr=1e-3, warmup_steps=0, replay=walk.replay,
    )  # fmt: skip


def _step(number: int, walk: Walk, step: int) -> RecordReceived:
    at_s = walk.ready_s + (step - walk.first) * walk.step_s
    record = StepRecord(
        seq=step - walk.first + 1, attempt=number, at_s=at_s, step=step, loss=loss_at(step), grad_norm=1.0, tokens=8,
        step_time_s=StepTime(data=0.0, compute=walk.step_s, other=0.0), replay=walk.replay,
    )  # fmt: skip
    return RecordReceived(at_s=at_s, record=record)
