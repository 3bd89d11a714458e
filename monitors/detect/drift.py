"""Slow divergence: block medians that climb without a jump, and losses that are too good to be true."""

import itertools
from statistics import median

from pydantic import Field
from pydantic.dataclasses import dataclass

from monitors.settings import DetectSettings
from monitors.taxonomy import Evidence, Finding, IncidentClass
from monitors.window import Band, Row

_BLOCKS = 64
_CLIMBING = 3
_BEND_TO_STEP = 1.73  # sqrt(6 / 2): scatter of second differences over that of first ones
_LOW_STEPS = 200
_LOW_ROWS = 20


@dataclass(slots=True)
class DriftState:
    """What the detector remembers."""

    rows: list[Row] = Field(default_factory=list)
    blocks: list[Row] = Field(default_factory=list, description="medians of so many rows in a row")
    key: int | None = None
    onset_step: int = 0
    level: float = Field(default=0.0, description="of the blocks when it was told last")
    told_step: int = 0
    recent_steps: list[int] = Field(default_factory=list, description="of the newest rows, as many as make it dense")
    low: list[Row] = Field(default_factory=list)
    low_key: int | None = None
    low_step: int = 0
    low_settled: bool = False
    last_eval: tuple[int, float] | None = None


class DriftDetector:
    """Folds finite losses outside of spikes."""

    def __init__(self, settings: DetectSettings, state: DriftState | None = None) -> None:
        self._settings = settings
        self.state = state or DriftState()

    def observe(self, row: Row, next_key: int, *, excused: bool) -> list[Finding]:
        """Take one loss in; `excused` while an overlay's ramp or a planned change explains a rise."""
        state = self.state
        state.rows.append(row)
        if len(state.rows) < self._settings.drift_rows // 2:
            return []
        state.blocks = [*state.blocks[-_BLOCKS:], Row(row.step, median([r.loss for r in state.rows]))]
        state.rows = []
        if excused:
            state.blocks = state.blocks[-1:]
            return []
        if state.key is None:
            return self._climbing(row, next_key)
        return self._falling_again(row) or self._going_on(row, next_key)

    def join(self, key: int) -> None:
        """The climb and a spike in progress are one anomaly."""
        self.state.key = key

    def forget(self) -> None:
        """A spike or a shift explains what came before."""
        self.state.rows, self.state.blocks, self.state.key = [], [], None

    def rewind(self, step: int) -> None:
        """A new attempt."""
        state = self.state
        state.rows, state.low = [], []
        state.blocks = [block for block in state.blocks if block.step <= step]
        state.key = state.low_key = None
        state.low_settled = False

    def _climbing(self, row: Row, next_key: int) -> list[Finding]:
        state = self.state
        if len(state.blocks) < 2 * _CLIMBING + 2:
            return []
        last = [block.loss for block in state.blocks[-_CLIMBING:]]
        if min(last) - min(block.loss for block in state.blocks) < self._settings.drift_nats:
            return []  # nearly always, and soon known
        lowest = _lowest(state.blocks[:-1])
        rise = min(last) - lowest.loss
        noise = self._noise()
        needed = self._needed(lowest.loss, noise)
        if rise < needed:
            return []
        since = [block for block in state.blocks if block.step >= lowest.step]
        climbing = all(late >= early - noise for early, late in itertools.pairwise(last))
        gradual = max((b.loss - a.loss for a, b in itertools.pairwise(since)), default=0.0) < 0.7 * rise
        if len(since) < _CLIMBING + 1 or not climbing or not gradual:
            return []
        state.key, state.onset_step, state.level, state.told_step = next_key, lowest.step, min(last), row.step
        why = f"the loss has climbed from {lowest.loss:.3f} at step {lowest.step} by {rise:.3f} without a jump"
        evidence: Evidence = {"lowest": lowest.loss, "rise": round(rise, 6), "threshold": round(needed, 6)}
        cls = IncidentClass.SLOW_DIVERGENCE
        return [Finding("classified", next_key, cls, lowest.step, row.step, why, None, evidence)]

    def _falling_again(self, row: Row) -> list[Finding]:
        state = self.state
        last = [block.loss for block in state.blocks[-2 * _CLIMBING :]]
        assert state.key is not None
        if len(last) < 2 * _CLIMBING or last[-1] > min(last[:_CLIMBING]) - self._noise():
            return []
        key, state.key = state.key, None
        state.blocks = state.blocks[-1:]
        why = "the loss falls again"
        return [Finding("closed", key, IncidentClass.SLOW_DIVERGENCE, state.onset_step, row.step, why, row.step)]

    def _going_on(self, row: Row, next_key: int) -> list[Finding]:
        """As much again above the level at which it was found: what was done about it did not help."""
        state, cls = self.state, IncidentClass.SLOW_DIVERGENCE
        last = [block.loss for block in state.blocks[-_CLIMBING:]]
        assert state.key is not None
        soon = row.step - state.told_step < 2 * self._settings.recover_steps_max  # an answer takes its time to work
        if soon or len(last) < _CLIMBING or min(last) - state.level < self._needed(state.level, self._noise()):
            return []
        why = f"the loss climbs on, from {state.level:.3f} where it was found to {min(last):.3f}"
        closed = Finding("closed", state.key, cls, state.onset_step, row.step, why, row.step)
        state.key, state.level, state.told_step = next_key, min(last), row.step
        return [closed, Finding("classified", next_key, cls, state.onset_step, row.step, why)]

    def _needed(self, level: float, noise: float) -> float:
        return max(self._settings.drift_nats, self._settings.drift_share * level, 5 * noise)

    def _noise(self) -> float:
        """How far block medians scatter by chance: from second differences, which a steady fall leaves alone."""
        losses = [block.loss for block in self.state.blocks]
        bends = [abs(a - 2 * b + c) for a, b, c in zip(losses[:-2], losses[1:-1], losses[2:], strict=True)]
        return median(bends) / _BEND_TO_STEP if bends else 0.0

    # -- too good to be true --------------------------------------------------------------------------------------

    def observe_low(self, row: Row, band: Band | None, next_key: int) -> list[Finding]:
        """Over `low_share` below the trend for ten rows, and validation does not follow."""
        state, settings = self.state, self._settings
        if state.low_key is not None:
            return self._low_settles(row)
        steps = state.recent_steps
        steps.append(row.step)
        if len(steps) > _LOW_ROWS:
            del steps[0]
        # a fall within 200 steps must be seen within 200 steps
        dense = len(steps) == _LOW_ROWS and row.step - steps[0] <= _LOW_STEPS
        expected = None if band is None or not dense or state.last_eval is None else band.trend(row.step)
        if expected is None or row.loss >= (1 - settings.low_share) * expected:
            state.low = []
            return []
        state.low.append(row)
        if len(state.low) < 5:
            return []
        state.low_key, state.low_step, state.low_settled = next_key, state.low[0].step, False
        why = f"loss {row.loss:.3f} where {expected:.3f} was expected"
        evidence: Evidence = {"loss": row.loss, "expected": round(expected, 6), "share": settings.low_share}
        cls = IncidentClass.LOSS_IMPLAUSIBLY_LOW
        return [Finding("suspected", next_key, cls, state.low_step, row.step, why, None, evidence)]

    def is_low(self) -> bool:
        """Whether the loss is below belief at the moment, so that it makes no baseline."""
        return bool(self.state.low) or self.state.low_key is not None

    def _low_settles(self, row: Row) -> list[Finding]:
        state, cls = self.state, IncidentClass.LOSS_IMPLAUSIBLY_LOW
        assert state.low_key is not None
        evaluated = state.last_eval if state.last_eval is not None and state.last_eval[0] > state.low_step + 5 else None
        if state.low_settled:
            return []
        if evaluated is not None and evaluated[1] < row.loss * (1 + self._settings.low_share):
            key, state.low_key, state.low = state.low_key, None, []
            why = f"validation follows: {evaluated[1]:.3f}"
            return [Finding("dismissed", key, cls, state.low_step, row.step, why, row.step)]
        if evaluated is None and row.step - state.low_step < self._settings.low_wait_steps:
            return []
        state.low_settled = True
        why = f"loss {row.loss:.3f} is implausibly low" + (
            f" and validation, {evaluated[1]:.3f}, does not follow" if evaluated else "; no evaluation says otherwise"
        )
        return [Finding("classified", state.low_key, cls, state.low_step, row.step, why)]


def _lowest(blocks: list[Row]) -> Row:
    """Of medians of three neighbours, so that one lucky block is no level from which the loss could have risen."""
    triples = zip(blocks, blocks[1:], blocks[2:], strict=False)
    loss, step = min((sorted((a.loss, b.loss, c.loss))[1], b.step) for a, b, c in triples)
    return Row(step, loss)
