"""Whether the trainer's prevention ladder only hides a divergence: updates skipped for their norm, and clipping.

The norm arms, it never rolls back alone (BERT's doubled for good, and harmlessly): what is found here is
`repeated_spikes_by_state`, a notice that says how the loss fares meanwhile. Non-finite updates are
`monitors.detect.nonfinite`'s; here they only count towards a streak.
"""

import math
from statistics import median

from pydantic import Field
from pydantic.dataclasses import dataclass

from monitors.detect.nonfinite import SHARE_STEPS, improvement
from monitors.records import StepRecord
from monitors.settings import DetectSettings
from monitors.taxonomy import Evidence, Finding, IncidentClass
from monitors.window import Row

_BLOCKS = 8
_TOLD = 3.0  # standard errors by which a loss must move for it to be said


@dataclass(slots=True)
class ClipBlock:
    """So many steps in a row, up to `step`: their median norm, and the share of them that was clipped."""

    step: int
    norm: float
    clipped: float


@dataclass(slots=True)
class PreventionState:
    """What the detector remembers. `*_told` are the steps at which it was said last."""

    streak: int = 0
    skipped_steps: list[int] = Field(default_factory=list)
    norm_skipped_step: int = Field(default=0, description="the last one skipped for its norm")
    skips_told: int | None = None
    gave_in_told: int | None = None
    clipping_told: int | None = None
    norms: list[float] = Field(default_factory=list)
    clips: int = 0
    blocks: list[ClipBlock] = Field(default_factory=list)


class PreventionDetector:
    """Folds step records, finite or not."""

    def __init__(self, settings: DetectSettings, state: PreventionState | None = None) -> None:
        self._settings = settings
        self.state = state or PreventionState()

    def observe(self, record: StepRecord, healthy: list[Row], next_key: int) -> list[Finding]:
        """Take one step in; `healthy` are the finite losses so far."""
        state, step = self.state, record.step
        state.skipped_steps = [known for known in state.skipped_steps if step - known < SHARE_STEPS]
        state.streak = state.streak + 1 if record.skipped else 0
        if record.skipped:
            state.skipped_steps.append(step)
        if record.skip_reason == "norm":
            state.norm_skipped_step = step
        noticed = (self._gave_in(record), self._skips(record), self._clipping(record))
        found: list[Finding] = []
        for onset, what in filter(None, noticed):
            evidence: Evidence = {**self.evidence(), **_loss_meanwhile(healthy)}
            key, cls = next_key + len(found), IncidentClass.REPEATED_SPIKES_BY_STATE
            why = f"{what}; the loss {evidence['loss_meanwhile']}"
            found.append(Finding("classified", key, cls, onset, step, why, None, evidence))
            found.append(Finding("closed", key, cls, onset, step, why, step, evidence))
        return found

    def evidence(self) -> Evidence:
        """How much the ladder has held back of late; the share since the beginning of the last whole block."""
        state, size = self.state, self._settings.clip_block_steps
        whole = state.blocks[-1].clipped * size if state.blocks else 0.0
        steps = len(state.norms) + (size if state.blocks else 0)
        share = (whole + state.clips) / max(1, steps)
        return {"skipped_in_last_1000": len(state.skipped_steps), "clipped_share": round(share, 3)}

    def rewind(self, step: int) -> None:
        """A new attempt begins from a state of `step` updates."""
        state = self.state
        state.streak = state.clips = 0
        state.norms = []
        state.skipped_steps = [known for known in state.skipped_steps if known <= step]
        state.blocks = [block for block in state.blocks if block.step <= step]
        state.norm_skipped_step = 0
        state.skips_told = state.gave_in_told = state.clipping_told = None

    def _gave_in(self, record: StepRecord) -> tuple[int, str] | None:
        """The skip rung has found that its band, not the gradients, was wrong."""
        state, done = self.state, record.prevention
        if done is None or not done.gave_in or not _fresh(state.gave_in_told, record.step):
            return None
        state.gave_in_told = state.skips_told = record.step
        norm, limit = record.grad_norm or 0.0, done.norm_limit or 0.0
        return min(state.skipped_steps, default=record.step), (
            f"skipping updates for their norm was given up after {len(state.skipped_steps)} of the last {SHARE_STEPS}: "
            f"the norm, now {norm:.3g}, stays beyond {limit:.3g}"
        )

    def _skips(self, record: StepRecord) -> tuple[int, str] | None:
        """As many as would be an incident were none of them finite."""
        state, settings = self.state, self._settings
        in_a_row = state.streak >= settings.skipped_streak and state.norm_skipped_step > record.step - state.streak
        many = len(state.skipped_steps) > settings.skipped_share * SHARE_STEPS and record.skip_reason == "norm"
        if not (in_a_row or many) or not _fresh(state.skips_told, record.step):
            return None
        state.skips_told = record.step
        onset = record.step - state.streak + 1 if in_a_row else state.skipped_steps[0]
        count = f"{state.streak} in a row" if in_a_row else f"{len(state.skipped_steps)} within {SHARE_STEPS} steps"
        return onset, f"updates were skipped because their gradient norm left its band: {count}"

    def _clipping(self, record: StepRecord) -> tuple[int, str] | None:
        """Most updates are clipped where few were, because the norm has grown."""
        state, settings = self.state, self._settings
        if record.grad_norm is None or record.skipped or not math.isfinite(record.grad_norm):
            return None
        state.norms.append(record.grad_norm)
        state.clips += record.clipped
        if len(state.norms) < settings.clip_block_steps:
            return None
        newest = ClipBlock(step=record.step, norm=median(state.norms), clipped=state.clips / len(state.norms))
        state.norms, state.clips = [], 0
        state.blocks = [*state.blocks[1 - _BLOCKS :], newest]
        lowest = min(state.blocks, key=lambda block: block.norm)
        grown = newest.norm >= settings.clip_norm_factor * lowest.norm
        if not grown or newest.clipped < max(settings.clip_share, 2 * lowest.clipped):
            return None
        if not _fresh(state.clipping_told, record.step):
            return None
        state.clipping_told = record.step
        return lowest.step, (
            f"{newest.clipped:.0%} of the updates are clipped, {lowest.clipped:.0%} were around step {lowest.step}; "
            f"the gradient norm has grown from {lowest.norm:.3g} to {newest.norm:.3g}"
        )


def _fresh(told: int | None, step: int) -> bool:
    """Not said within the last 1,000 steps."""
    return told is None or step - told >= SHARE_STEPS


def _loss_meanwhile(healthy: list[Row]) -> Evidence:
    """How the loss has moved from the last quarter but one to the last, which tells hiding from helping."""
    gain = improvement(healthy)
    if gain is None:
        return {"loss_meanwhile": "is not known for long enough"}
    if abs(gain.share) <= _TOLD * gain.noise:
        return {"loss_meanwhile": "does not move"}
    return {"loss_meanwhile": "still falls" if gain.share > 0 else "rises", "loss_improved": round(gain.share, 6)}
