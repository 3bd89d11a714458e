"""`longwatch replay`: a recorded run through the same core that runs live, with every effect left out.

The engine folds the records as it would a living run's, in a mode that decides and writes down but touches nothing, so
the record goes on as it was after a decision to roll back. Where no evaluation can be asked for, `validation_confirms`
counts as true, and the incident says so.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitors.records import ActivationRecord, EvalRecord, Record, StartedRecord, StepRecord, parse_record
from monitors.taxonomy import IncidentClass
from monitors.trace import read_trace
from orchestrator.facts import facts_of
from orchestrator.policy.engine import Engine
from orchestrator.policy.events import AttemptExited, AttemptSpawned, RecordReceived, RunOpened
from orchestrator.policy.model import Policy
from orchestrator.policy.state import Incident, RunFacts
from trainer.contract.config import RunConfig
from trainer.contract.paths import RunPaths

_UNSHOWN = ("suspected", "dismissed")
#: How an attempt ended is not in its records; that it ended is no finding.
_OF_THE_PROCESS = (IncidentClass.PREEMPTION,)


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded run: attempts in order, each with the step it went on from."""

    name: str
    attempts: list[tuple[int, list[Record]]]
    facts: RunFacts

    @property
    def points(self) -> list[tuple[int, float]]:
        """(step, loss) of every row."""
        return [(one.step, one.loss) for _, rows in self.attempts for one in rows if isinstance(one, StepRecord)]

    @property
    def steps(self) -> int:
        """How many steps it spans."""
        steps = [step for step, _ in self.points]
        return max(steps) - min(steps) + 1


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a policy would have made of a recording.

    `steps_lost`: of each rollback that it would have decided, from the step that it would have gone back to (onset less
    margin) to the detection; where the next checkpoint lay is not known.
    """

    recording: Recording
    incidents: list[Incident]
    rollbacks: int
    halts: int
    steps_lost: int


def read_recording(path: Path, columns: Mapping[str, str]) -> Recording:
    """A run directory of ours, or a log of any kind that `monitors.trace` reads.

    Raises:
        TraceError: it is none of these.
        OSError: it cannot be read.
    """
    paths = RunPaths(path)
    if paths.database.exists():
        return _own_run(paths)
    rows = read_trace(path, columns)
    attempts = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.attempt)]
    last = max(row.step for row in rows)
    facts = RunFacts(run_id=path.stem, total_steps=max(1, last), warmup_steps=0, batch_samples=1, trace=True)
    return Recording(path.stem, [(max(0, group[0].step - 1), list(group)) for group in attempts], facts)


def _own_run(paths: RunPaths) -> Recording:
    """Every attempt but the replays of a diagnosis, as each came to its end."""
    config = RunConfig.model_validate_json(paths.run_yaml.read_bytes())
    numbers = sorted(int(file.name.partition("-")[0]) for file in (paths.root / "records").glob("*-0.jsonl"))
    attempts: list[tuple[int, list[Record]]] = []
    for number in numbers:
        rows = [parse_record(line) for line in paths.records(number).read_text().splitlines() if line.endswith("}")]
        started = next((row for row in rows if isinstance(row, StartedRecord)), None)
        if started is not None and not started.replay:
            kept = [row for row in rows if isinstance(row, StartedRecord | StepRecord | EvalRecord | ActivationRecord)]
            attempts.append((started.step, list(kept)))
    return Recording(config.name, attempts, facts_of(config).model_copy(update={"trace": True}))


def replay(recording: Recording, policy: Policy) -> Replayed:
    """Fold a recording under a policy."""
    engine = Engine(policy, recording.facts)
    engine.fold(RunOpened(at_s=0.0, run_id=recording.name, config_digest="", policy_digest="", code_version=""))
    for number, (begin, rows) in enumerate(recording.attempts, start=1):
        if number > 1:
            engine.fold(AttemptExited(at_s=engine.state.now_s, attempt=number - 1, cause="left"))
        engine.fold(AttemptSpawned(at_s=engine.state.now_s, attempt=number, pid=1))
        if number > 1 and not any(isinstance(row, StartedRecord) for row in rows):
            engine.fold(RecordReceived(at_s=engine.state.now_s, record=_resumed(number, begin, recording.facts)))
        for row in rows:
            engine.fold(RecordReceived(at_s=row.at_s, record=row.model_copy(update={"attempt": number})))
    shown = [i for i in engine.incidents() if i.state not in _UNSHOWN and i.cls not in _OF_THE_PROCESS]
    lost = [steps for incident in shown if (steps := _steps_lost(incident, policy)) is not None]
    halts = sum("halt" in incident.decision for incident in shown)
    return Replayed(recording, shown, len(lost), halts, sum(lost))


def _resumed(attempt: int, step: int, facts: RunFacts) -> StartedRecord:
    """What is known of a resume that a log shows only by its steps."""
    return StartedRecord(
        seq=1, attempt=attempt, at_s=0.0, step=step, position=0, tokens=0, loaded=None, precision="", device="",
        parameters=0, vocab_size=0, batch_samples=facts.batch_samples, sample_tokens=0, total_steps=facts.total_steps,
        total_samples=0, shards=(), peak_lr=0.0, warmup_steps=facts.warmup_steps,
    )  # fmt: skip


def _steps_lost(incident: Incident, policy: Policy) -> int | None:
    """None where no rollback would have been made."""
    if "roll_back" not in incident.decision:
        return None
    chosen = next(row.rule for row in incident.considered if row.matched)
    rungs = policy.rules[chosen - 1].rungs()
    action = rungs[min(incident.rung, len(rungs) - 1)].roll_back
    margin = action.margin_steps if action is not None else 0
    return incident.detected_step - max(0, incident.onset_step - margin)


def by_class(incidents: Iterable[Incident]) -> dict[str, int]:
    """How many of each class, the most frequent first."""
    return dict(Counter(str(incident.cls) for incident in incidents).most_common())


def as_json(one: Replayed) -> dict[str, Any]:
    """The published form of one recording under one policy."""
    return {
        "name": one.recording.name,
        "steps": one.recording.steps,
        "attempts": len(one.recording.attempts),
        "incidents": [incident.model_dump(mode="json", by_alias=True) for incident in one.incidents],
        "by_class": by_class(one.incidents),
        "rollbacks": one.rollbacks,
        "halts": one.halts,
        "steps_lost": one.steps_lost,
    }


def differences(
    ours: Sequence[Replayed], theirs: Sequence[Replayed]
) -> Iterator[tuple[str, Incident | None, Incident | None]]:
    """Incidents of the same recordings that two policies see or answer differently: (name, ours, theirs)."""
    for one, other in zip(ours, theirs, strict=True):
        left = {(i.cls, i.onset_step): i for i in one.incidents}
        right = {(i.cls, i.onset_step): i for i in other.incidents}
        for key in sorted({*left, *right}, key=lambda key: (key[1], key[0])):
            a, b = left.get(key), right.get(key)
            if a is None or b is None or a.decision != b.decision:
                yield one.recording.name, a, b
