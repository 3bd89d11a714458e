"""Non-finite losses, gradients and the updates skipped for them: decided first, and never mixed into a window."""

import math
from statistics import median
from typing import NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from monitors.records import StepRecord
from monitors.settings import DetectSettings
from monitors.taxonomy import Evidence, Finding, IncidentClass
from monitors.window import MAD_TO_SIGMA, Row

SHARE_STEPS = 1000
_HEALTHY_STEPS = 10
_STALL_ROWS = (128, 192, 288, 432, 648, 972, 1458, 2048)


@dataclass(slots=True)
class NonFiniteState:
    """What the detector remembers."""

    key: int | None = None
    cls: IncidentClass | None = None
    onset_step: int = 0
    last_bad_step: int = 0
    streak_from: int | None = None
    streak: int = 0
    skipped_steps: list[int] = Field(default_factory=list)
    loaded_step: int | None = None
    first_step: int | None = None
    dead_group: str = ""


class NonFiniteDetector:
    """Folds step records, finite or not."""

    def __init__(self, settings: DetectSettings, state: NonFiniteState | None = None) -> None:
        self._settings = settings
        self.state = state or NonFiniteState()

    def observe(self, record: StepRecord, healthy: list[Row], next_key: int) -> list[Finding]:
        """Take one step in; `healthy` are the finite losses so far."""
        state = self.state
        if state.first_step is None:
            state.first_step = record.step
        if is_finite(record):
            state.streak, state.streak_from = 0, None
            return self._finite(record)
        state.streak += 1
        state.streak_from = record.step if state.streak_from is None else state.streak_from
        state.skipped_steps = [s for s in state.skipped_steps if record.step - s < SHARE_STEPS] + [record.step]
        state.last_bad_step = record.step
        if state.key is not None or not self._is_incident(record, healthy):
            return []
        state.key, state.onset_step = next_key, state.streak_from
        state.cls, reason = self._class(record, healthy)
        what = "loss" if not math.isfinite(record.loss) else "gradient"
        why = f"non-finite {what} from step {state.onset_step} on: {reason}"
        evidence: Evidence = {"streak": state.streak, "skipped_in_last_1000": len(state.skipped_steps)}
        return [Finding("classified", next_key, state.cls, state.onset_step, record.step, why, None, evidence)]

    def rewind(self, step: int) -> None:
        """A new attempt begins from a state of `step` updates."""
        state = self.state
        state.key = state.cls = state.streak_from = None
        state.streak = 0
        state.skipped_steps = [s for s in state.skipped_steps if s <= step]
        state.loaded_step = step if step > 0 else None
        state.dead_group = ""

    def _finite(self, record: StepRecord) -> list[Finding]:
        state = self.state
        if state.key is None or record.step - state.last_bad_step < _HEALTHY_STEPS:
            return []
        key, cls = state.key, state.cls
        assert cls is not None
        state.key = state.cls = None
        why = f"finite again from step {state.last_bad_step + 1} on"
        return [Finding("closed", key, cls, state.onset_step, record.step, why, state.last_bad_step)]

    def _is_incident(self, record: StepRecord, healthy: list[Row]) -> bool:
        """A skipped update did no harm by itself; a non-finite loss that was not skipped has."""
        settings, state = self._settings, self.state
        if not record.skipped or not healthy:
            return True
        if state.loaded_step is not None and record.step - state.loaded_step <= settings.nan_after_load_steps:
            return state.streak >= min(2, settings.skipped_streak)
        return (
            state.streak >= settings.skipped_streak or len(state.skipped_steps) > settings.skipped_share * SHARE_STEPS
        )

    def _class(self, record: StepRecord, healthy: list[Row]) -> tuple[IncidentClass, str]:
        settings, state = self._settings, self.state
        onset = state.onset_step
        if state.loaded_step is not None and 0 <= onset - state.loaded_step - 1 < settings.nan_after_load_steps:
            return (
                IncidentClass.NAN_AFTER_LOAD,
                f"{onset - state.loaded_step} steps after the load of {state.loaded_step}",
            )
        first = state.first_step if state.first_step is not None else 0
        begins_here = state.loaded_step is None and first <= settings.immediate_steps
        early = begins_here and onset <= settings.immediate_steps
        if not healthy or early:
            return IncidentClass.IMMEDIATE_NAN, "the run has hardly begun"
        if state.dead_group:
            return IncidentClass.PLATEAU_THEN_NAN, f"units of group {state.dead_group} were dead or saturated before"
        gain = improvement(healthy)
        if gain is not None and gain.share < max(settings.plateau_share, min(gain.noise, settings.plateau_noisy_share)):
            return IncidentClass.PLATEAU_THEN_NAN, f"the last quarter had improved by {gain.share:.2%} only"
        stalled = stall(healthy)
        if stalled is not None:
            return IncidentClass.PLATEAU_THEN_NAN, f"the loss, falling before, was flat from step {stalled} on"
        return IncidentClass.SUDDEN_NAN, "out of a healthy run"


def is_finite(record: StepRecord) -> bool:
    """Whether loss and gradient are finite, and the update was not skipped for not being so."""
    norm = record.grad_norm
    finite = math.isfinite(record.loss) and (norm is None or math.isfinite(norm))
    return finite and record.skip_reason != "non_finite"


class Improvement(NamedTuple):
    """By how much the last quarter of the steps is below the quarter before, as shares of the loss."""

    share: float
    noise: float


def improvement(rows: list[Row]) -> Improvement | None:
    """Compare the last two quarters; None if there is too little to tell.

    The noise is the standard error of a difference of medians: 1.25 sigma sqrt(1/n + 1/m) for normal scatter.
    """
    if len(rows) < 16:
        return None
    first, last = rows[0].step, rows[-1].step
    half, quarter = first + (last - first) / 2, first + 3 * (last - first) / 4
    before = [row.loss for row in rows if half < row.step <= quarter]
    after = [row.loss for row in rows if row.step > quarter]
    level = median(before) if before else 0.0
    if len(before) < 4 or len(after) < 4 or not level:
        return None
    now = median(after)
    sigma = MAD_TO_SIGMA * median([*(abs(loss - level) for loss in before), *(abs(loss - now) for loss in after)])
    noise = 1.25 * sigma * math.sqrt(1 / len(before) + 1 / len(after))
    return Improvement(share=(level - now) / abs(level), noise=noise / abs(level))


def stall(rows: list[Row]) -> int | None:
    """The step from which on a loss that had been falling was flat, None if it was not; rows before a NaN.

    At each scale the newest stretch is held against the one as long before it: that one fell by more than chance (4
    standard errors), this one by under a fifth of it, and by 3 standard errors less. A power law keeps most of its
    fall from one stretch to the next; a model that has stopped learning keeps none.
    """
    for span in _STALL_ROWS:
        if len(rows) < 2 * span:
            return None
        before, now = _fall(rows[-2 * span : -span]), _fall(rows[-span:])
        if before.nats > 4 * before.error and now.nats < before.nats / 5 and before.nats - now.nats > 3 * now.error:
            return rows[-span].step
    return None


class _Fall(NamedTuple):
    nats: float
    error: float


def _fall(rows: list[Row]) -> _Fall:
    """From the median of the first half to that of the second, with its standard error."""
    half = len(rows) // 2
    first, second = [row.loss for row in rows[:half]], [row.loss for row in rows[half:]]
    a, b = median(first), median(second)
    sigma = MAD_TO_SIGMA * median([*(abs(loss - a) for loss in first), *(abs(loss - b) for loss in second)])
    return _Fall(a - b, 1.25 * sigma * math.sqrt(2 / half))
