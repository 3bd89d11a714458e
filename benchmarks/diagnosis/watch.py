"""What a detector says of a run: Longwatch's diagnosis and the published rules, in one form that can be scored."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.diagnosis import rules
from benchmarks.diagnosis.synthetic import Run
from monitors.diagnosis import Diagnosis
from monitors.records import StartedRecord, StepRecord
from monitors.taxonomy import Finding, IncidentClass
from orchestrator.policy.model import Actions, Rule
from orchestrator.policy.shipped import in_force

OURS = "longwatch"
_ALARM_ROWS = 20  # alarms no farther apart are one alarm

#: Notices and facts of the process: nothing that a loss is judged by.
_JUDGED = frozenset(
    {
        IncidentClass.TRANSIENT_SPIKE,
        IncidentClass.UNRECOVERED_SPIKE,
        IncidentClass.SLOW_DIVERGENCE,
        IncidentClass.IMMEDIATE_NAN,
        IncidentClass.SUDDEN_NAN,
        IncidentClass.NAN_AFTER_LOAD,
        IncidentClass.PLATEAU_THEN_NAN,
        IncidentClass.REPEATED_SPIKES_BY_SHARDS,
        IncidentClass.LOSS_IMPLAUSIBLY_LOW,
    }
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """One incident as a detector tells it. `acts`: it would have rolled the run back or ended it."""

    cls: IncidentClass
    onset_step: int
    detected_step: int
    end_step: int | None
    acts: bool
    why: str = ""
    shards: tuple[int, ...] = ()


def harmful_classes() -> frozenset[IncidentClass]:
    """Classes for which the shipped policy has any rung that goes back or halts: to miss one costs the run."""
    return _acting(lambda rule: (*(rule.ladder or ()), *(rule.do or ())))


def acting_classes() -> frozenset[IncidentClass]:
    """Classes to which the shipped policy goes back or halts at once."""
    return _acting(lambda rule: (*(rule.ladder or ())[:1], *(rule.do or ())))


def _acting(rungs: Callable[[Rule], Iterable[object]]) -> frozenset[IncidentClass]:
    found: set[IncidentClass] = {IncidentClass.SUDDEN_NAN}  # diagnosed first, and then gone back from in any case
    for rule in in_force(None).rules:
        actions = [item for item in rungs(rule) if isinstance(item, Actions)]
        if any(rung.roll_back is not None or rung.halt is not None for rung in actions):
            found.update(rule.classes())
    return frozenset(found)


def longwatch(run: Run) -> list[Prediction]:
    """Fold a run through the diagnosis that runs live."""
    diagnosis = Diagnosis(planned_changes=run.planned)
    diagnosis.note_overlays(run.overlays)
    findings: list[Finding] = []
    for record in run.records:
        if isinstance(record, StartedRecord):
            diagnosis.rewind(record.step, expect_same=False)
        findings += diagnosis.observe(record)
    return sorted(_settled(findings), key=lambda one: one.onset_step)


def others(run: Run) -> dict[str, list[Prediction]]:
    """Each published rule on the same steps."""
    steps = [record for record in run.records if isinstance(record, StepRecord)]
    return {rule.name: _alarms(rule, steps) for rule in rules.published(len(steps))}


def _settled(findings: Iterable[Finding]) -> Iterable[Prediction]:
    """The last word on each anomaly, detected when that word was first said; a relapse climbs to the rung that acts."""
    at_once, sooner_or_later, before = acting_classes(), harmful_classes(), set[IncidentClass]()
    said: dict[int, list[Finding]] = {}
    for finding in findings:
        said.setdefault(finding.key, []).append(finding)
    for words in said.values():
        last = words[-1]
        if last.kind == "dismissed" or last.cls not in _JUDGED or (last.kind == "suspected" and len(words) == 1):
            continue
        named = {word.cls for word in words if word.kind == "classified"}
        acts = bool(named & at_once or named & before & sooner_or_later)
        before |= named
        told = next(w for w in words if w.cls is last.cls)
        yield Prediction(
            last.cls, told.onset_step, told.step, last.end_step, acts, last.why, last.shards or told.shards
        )


def _alarms(rule: rules.Rule, steps: list[StepRecord]) -> list[Prediction]:
    cls = IncidentClass.UNRECOVERED_SPIKE if rule.stops else IncidentClass.TRANSIENT_SPIKE
    found: list[tuple[int, int, int]] = []  # first step, last step, last row
    for row, record in enumerate(steps):
        if not rule.observe(record.loss, record.grad_norm):
            continue
        if found and row - found[-1][2] <= _ALARM_ROWS:
            found[-1] = (found[-1][0], record.step, row)
        else:
            found.append((record.step, record.step, row))
    return [Prediction(cls, begin, begin, end, rule.stops) for begin, end, _ in found]
