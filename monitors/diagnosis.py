"""The diagnosis: records of one lineage in order, findings out. Pure; live and in replay the same.

Non-finite is decided first. Finite losses of healthy steps alone make baselines. At a new attempt streaks and timers
are cleared and baselines are rebuilt from the surviving history, so that a crash in the middle of an incident never
makes the diverged loss a new normal.
"""

import math
from dataclasses import replace
from statistics import median
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from monitors.detect.blame import Blame, BlameState
from monitors.detect.drift import DriftDetector, DriftState
from monitors.detect.nonfinite import NonFiniteDetector, NonFiniteState, is_finite
from monitors.detect.notices import NoticeDetector, NoticeState, Recorded
from monitors.detect.prevention import PreventionDetector, PreventionState
from monitors.detect.shards import Conviction, ShardDetector, ShardState
from monitors.detect.spike import SpikeDetector, SpikeState
from monitors.records import ActivationRecord, EvalRecord, Record, StartedRecord, StepRecord
from monitors.settings import DetectSettings
from monitors.taxonomy import Evidence, Finding, IncidentClass
from monitors.window import Row

_HISTORY_ROWS = 4096
_LOST = (IncidentClass.UNRECOVERED_SPIKE, IncidentClass.SLOW_DIVERGENCE)
_NOT_OF_THE_MODEL = frozenset(
    {IncidentClass.LR_MISMATCH, IncidentClass.LOSS_DISCONTINUITY, IncidentClass.THROUGHPUT_DROP}
)


class _State(BaseModel):
    """Everything that is remembered."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    next_key: int = 1
    history: list[Row] = Field(default_factory=list)
    recorded: dict[int, Recorded] = Field(default_factory=dict)
    spans: list[tuple[int, int]] = Field(default_factory=list)
    spike: SpikeState = Field(default_factory=SpikeState)
    nonfinite: NonFiniteState = Field(default_factory=NonFiniteState)
    prevention: PreventionState = Field(default_factory=PreventionState)
    drift: DriftState = Field(default_factory=DriftState)
    shards: ShardState = Field(default_factory=ShardState)
    blame: BlameState = Field(default_factory=BlameState)
    notices: NoticeState = Field(default_factory=NoticeState)


class Diagnosis:
    """Folds records into findings.

    Args:
        settings: thresholds, the policy's `detect` section.
        planned_changes: steps at which the loss is meant to move.
    """

    def __init__(
        self, settings: DetectSettings | None = None, *, planned_changes: tuple[int, ...] = (),
        state: _State | None = None,
    ) -> None:  # fmt: skip
        self._settings = settings or DetectSettings()
        self._planned = planned_changes
        self._state = state or _State()
        inner = self._state
        self._spike = SpikeDetector(self._settings, inner.spike)
        self._nonfinite = NonFiniteDetector(self._settings, inner.nonfinite)
        self._prevention = PreventionDetector(self._settings, inner.prevention)
        self._drift = DriftDetector(self._settings, inner.drift)
        self._shards = ShardDetector(self._settings, inner.shards)
        self._blame = Blame(inner.blame)
        self._notices = NoticeDetector(self._settings, inner.notices)

    def observe(self, record: Record) -> list[Finding]:
        """Take one record in; replays are not to be fed."""
        match record:
            case StepRecord():
                self._blame.observe(record)
                found = [self._with_blame(finding) for finding in self._step(record)]
            case EvalRecord():
                found = self._eval(record)
            case ActivationRecord():
                self._blame.observe(record)
                found = self._activation(record)
            case StartedRecord():
                self._shards.declare(len(record.shards))
                self._notices.started(record)
                return []
            case _:
                return []
        for finding in found:
            self._state.next_key = max(self._state.next_key, finding.key + 1)
        return found

    def rewind(self, step: int, *, expect_same: bool = False, quarantined: tuple[int, ...] = ()) -> None:
        """A new attempt begins from a state of `step` updates.

        Args:
            step: updates in the loaded state; what came later is dropped.
            expect_same: an exact resume: steps that were recorded must give the same losses on the same data.
            quarantined: shards that are not read any more.
        """
        state = self._state
        state.history = [row for row in state.history if row.step <= step]
        rerun = {number: known for number, known in state.recorded.items() if number > step} if expect_same else {}
        if not expect_same:  # what an exact resume gives is compared with what was first recorded, however often
            state.recorded = {number: known for number, known in state.recorded.items() if number <= step}
        for detector in (state.spike, state.drift):  # an evaluation of a branch that was left says nothing of this one
            if detector.last_eval is not None and detector.last_eval[0] > step:
                detector.last_eval = None
        self._spike.rewind(state.history)
        self._nonfinite.rewind(step)
        self._prevention.rewind(step)
        self._drift.rewind(step)
        self._shards.rewind(step, list(quarantined))
        self._blame.rewind(step)
        self._notices.rewind(rerun, step)

    def accept_other_losses(self) -> None:
        """A person takes the losses as they come out now: what was recorded is no measure any more."""
        self._state.recorded = {}

    def note_overlays(self, overlays: tuple[tuple[int, int], ...]) -> None:
        """Step ranges [from, to] in which a lowered LR moves the loss by intention."""
        self._state.spans = list(overlays)

    def to_state(self) -> dict[str, Any]:
        """Everything that is remembered, as JSON values."""
        return self._state.model_dump(mode="json")

    @classmethod
    def from_state(
        cls, settings: DetectSettings, state: dict[str, Any], *, planned_changes: tuple[int, ...] = ()
    ) -> Self:
        """As it was when `to_state` was called.

        Raises:
            pydantic.ValidationError: it is not such a state.
        """
        return cls(settings, planned_changes=planned_changes, state=_State.model_validate(state))

    # -- by kind of record ----------------------------------------------------------------------------------------

    def _step(self, record: StepRecord) -> list[Finding]:
        state, key = self._state, self._state.next_key
        found = self._nonfinite.observe(record, state.history, key)
        found += self._prevention.observe(record, state.history, key + len(found))
        found += self._notices.learning_rate(record, key + len(found))
        found += self._notices.initial(record, key + len(found))
        if not is_finite(record):
            return found + self._broken(record, key + len(found))
        row = Row(step=record.step, loss=record.loss)
        found += [self._with_prevention(finding) for finding in self._loss(record, row, key + len(found))]
        if self._recently_planned(record.step):
            self._notices.expect_other_losses()
        found += self._notices.rerun(record, key + len(found))
        if state.spike.event is None and not record.skipped:  # while the loss is out, other signals only say so again
            found += self._notices.update_ratios(record, key + len(found))
        found += self._notices.throughput(record, key + len(found))
        self._remember(record, row)
        return found

    def _with_prevention(self, finding: Finding) -> Finding:
        """A loss that is lost all the same: what the trainer's ladder has held back is part of the evidence."""
        if finding.kind != "classified" or finding.cls not in _LOST:
            return finding
        return replace(finding, evidence={**self._prevention.evidence(), **finding.evidence})

    def _loss(self, record: StepRecord, row: Row, key: int) -> list[Finding]:
        found: list[Finding] = []
        band = self._spike.band()
        trusted = len(self._state.spike.window) >= self._settings.min_rows
        found += self._convicted(self._shards.observe(record, band if trusted else None), row.step, key)
        event, key = self._state.spike.event, key + len(found)
        if event is None:
            low = self._drift.observe_low(row, band if trusted else None, key + len(found))
            found += low
            if any(finding.kind == "dismissed" for finding in low):  # the new level is real: expect it from now on
                self._state.history.clear()
                self._spike.rewind([])
                self._drift.forget()
        if self._drift.is_low():
            return found
        planned, climbing = self._recently_planned(row.step), self._drift.state.key is not None
        spikes = self._spike.observe(
            row, key + len(found), planned_change=planned, climbing=climbing, norm=record.grad_norm
        )
        if spikes:
            found += self._told(spikes, row, key + len(found))
        return found + self._climb(row, key + len(found))

    def _told(self, spikes: list[Finding], row: Row, key: int) -> list[Finding]:
        """What was said of a spike, and what follows from it for shards, climbs and their number."""
        found = list(spikes)
        for begun in (f for f in spikes if f.kind == "suspected"):
            found += self._convicted(self._shards.on_onset(begun.onset_step), row.step, key + len(found))
        if any(f.kind == "closed" for f in spikes) and any(f.cls is not IncidentClass.TRANSIENT_SPIKE for f in spikes):
            self._drift.forget()
        return found + self._repeated(spikes, row, key + len(found))

    def _broken(self, record: StepRecord, key: int) -> list[Finding]:
        """A non-finite step speaks of its shards too: of the one that alone is not finite, or of all that were read."""
        conviction = self._shards.observe(record, None)
        if conviction is None and self._state.nonfinite.streak == 1:
            conviction = self._shards.on_onset(record.step)
        return self._convicted(conviction, record.step, key)

    def _convicted(self, conviction: Conviction | None, step: int, key: int) -> list[Finding]:
        """The class of the spike that is going on, or an incident of its own."""
        if conviction is None:
            return []
        event, cls = self._state.spike.event, IncidentClass.REPEATED_SPIKES_BY_SHARDS
        if event is not None:
            event.settled, event.shards = cls, [conviction.shard]
        number = event.key if event is not None else key
        shards = (conviction.shard,)
        onset, why, evidence = conviction.onset_step, conviction.why, conviction.evidence
        return [Finding("classified", number, cls, onset, step, why, None, evidence, shards)]

    def _with_blame(self, finding: Finding) -> Finding:
        """The same finding with what is known of shards, samples and layers around its onset."""
        if finding.cls in _NOT_OF_THE_MODEL or finding.kind == "dismissed":
            return finding
        known = self._blame.evidence(finding.onset_step, finding.step)
        loud = self._shards.loud_in(range(finding.onset_step - 2, finding.onset_step + 3))
        if loud and "shards" not in finding.evidence:
            known["shards"] = loud
        return replace(finding, evidence={**finding.evidence, **known})

    def _climb(self, row: Row, key: int) -> list[Finding]:
        """A climb may look like a spike that has just begun: then both are one anomaly."""
        event = self._state.spike.event
        if event is not None and (event.settled is not None or event.jumped()):
            return []
        excused = self._overlay_moves(row.step) or self._recently_planned(row.step)
        found = self._drift.observe(row, key, excused=excused)
        if event is not None and found:
            event.settled = IncidentClass.SLOW_DIVERGENCE
            self._drift.join(event.key)
            found = [replace(finding, key=event.key) for finding in found]
        return found

    def _repeated(self, spikes: list[Finding], row: Row, key: int) -> list[Finding]:
        """`repeated_spikes_by_state`: a rising rate of spikes that no shard explains; a notice, never more."""
        state, settings = self._state.spike, self._settings
        if not any(f.kind == "closed" and f.cls is IncidentClass.TRANSIENT_SPIKE for f in spikes):
            return []
        span = settings.repeated_window_steps
        recent = [step for step in state.closed_steps if step > row.step - span]
        before = [step for step in state.closed_steps if row.step - 2 * span < step <= row.step - span]
        fresh = state.repeated_reported < 0 or row.step - state.repeated_reported > span
        if len(recent) < max(settings.repeated_spikes, 2 * len(before)) or not fresh:
            return []
        state.repeated_reported = row.step
        cls = IncidentClass.REPEATED_SPIKES_BY_STATE
        why = f"{len(recent)} spikes within {span} steps, {len(before)} in as many before, tied to no shard"
        evidence: Evidence = {"recent": len(recent), "before": len(before), "steps": recent[-20:]}
        return [
            Finding("classified", key, cls, recent[0], row.step, why, None, evidence),
            Finding("closed", key, cls, recent[0], row.step, why, row.step, evidence),
        ]

    def _eval(self, record: EvalRecord) -> list[Finding]:
        self._state.spike.last_eval = self._state.drift.last_eval = (record.step, record.loss)
        recent = [row.loss for row in self._state.history[-32:]]
        older = [row.loss for row in self._state.history[-96:-32]]
        falling = bool(recent and older) and median(recent) < median(older)
        return self._notices.validation(record, falling, self._state.next_key)

    def _activation(self, record: ActivationRecord) -> list[Finding]:
        limit = self._settings.plateau_dead
        sick = (group for group, stats in record.groups.items() if max(stats.dead, stats.saturated) >= limit)
        finite = all(math.isfinite(stats.rms) for stats in record.groups.values())
        if finite:
            self._state.nonfinite.dead_group = next(sick, "")
        return self._notices.activations(record, self._state.next_key)

    # -- memory ---------------------------------------------------------------------------------------------------

    def _remember(self, record: StepRecord, row: Row) -> None:
        """Healthy steps alone make baselines and are what a re-run is held against."""
        state = self._state
        if self._spike.state.event is not None or self._drift.is_low() or record.skipped:
            return
        notices = state.notices
        if record.data is not None and notices.lr_key is None and not notices.doubted:
            fresh = Recorded(record.loss, record.data.begin, record.data.end, record.lr_planned)
            known = state.recorded.get(record.step)
            same_data = known is not None and (known.begin, known.end) == (fresh.begin, fresh.end)
            if known is None or not same_data or self._notices.other_lr(known, record):
                state.recorded[record.step] = fresh
            if len(state.recorded) > 2 * _HISTORY_ROWS:
                state.recorded = dict(list(state.recorded.items())[-_HISTORY_ROWS:])
        state.history.append(row)
        if len(state.history) > 2 * _HISTORY_ROWS:
            del state.history[:-_HISTORY_ROWS]

    def _recently_planned(self, step: int) -> bool:
        span = self._settings.planned_change_steps
        return bool(self._planned) and any(change <= step <= change + span for change in self._planned)

    def _overlay_moves(self, step: int) -> bool:
        """While a lowered LR ramps back, and a little after, the loss is a little higher by intention."""
        spans, after = self._state.spans, self._settings.planned_change_steps
        return bool(spans) and any(begin <= step <= end + after for begin, end in spans)
