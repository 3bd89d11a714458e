"""Signals that only notify, and two proofs of resume: LR as planned, losses of re-run steps as recorded.

Each value is judged against its own recent band, in logarithms where it lives on a ratio scale.
"""

import math
from dataclasses import dataclass as plain_dataclass
from statistics import median

from pydantic import Field
from pydantic.dataclasses import dataclass

from monitors.detect.series import Series
from monitors.records import ActivationRecord, EvalRecord, StartedRecord, StepRecord
from monitors.settings import DetectSettings
from monitors.taxonomy import Finding, IncidentClass

_ALIVE_FACTOR = 2.0  # half of the units that were alive
_THROUGHPUT_REFERENCE = 100
_THROUGHPUT_RECENT = 20
_THROUGHPUT_EVERY = 4


@dataclass(slots=True)
class Watched:
    """A series, and whether it is out of its band."""

    series: Series = Field(default_factory=Series)
    streak: int = 0
    streak_from: int = 0
    reported: bool = False


@plain_dataclass(frozen=True, slots=True)
class Recorded:
    """What a step gave when it was first run."""

    loss: float
    begin: int
    end: int
    lr: float | None = None  # as planned


@dataclass(slots=True)
class NoticeState:
    """What the detector remembers."""

    watched: dict[str, Watched] = Field(default_factory=dict)
    seconds_per_token: list[float] = Field(default_factory=list)
    slow_reported: bool = False
    evals: list[tuple[int, float]] = Field(default_factory=list)
    diverging_reported: bool = False
    lr_key: int | None = None
    rerun: dict[int, Recorded] = Field(default_factory=dict)
    rerun_from: int = 0
    differences: list[float] = Field(default_factory=list)
    uniform: float | None = Field(default=None, description="ln(vocabulary), until a fresh model has shown its loss")
    doubted: bool = Field(default=False, description="this attempt's losses are not those that were recorded")


class NoticeDetector:
    """Folds records of every kind; findings are one-off unless a state lasts."""

    def __init__(self, settings: DetectSettings, state: NoticeState | None = None) -> None:
        self._settings = settings
        self.state = state or NoticeState()

    def rewind(self, rerun: dict[int, Recorded], step: int) -> None:
        """A new attempt; `rerun` are the recorded steps beyond the loaded one, if they must come out the same."""
        state = self.state
        state.watched, state.seconds_per_token, state.slow_reported = {}, [], False
        state.evals = [row for row in state.evals if row[0] <= step]
        state.lr_key, state.rerun, state.rerun_from, state.differences = None, rerun, step, []
        state.doubted = False

    def started(self, record: StartedRecord) -> None:
        """A model that has learned nothing should be as good as a guess."""
        fresh = record.loaded is None and record.step == 0 and record.vocab_size > 1
        self.state.uniform = math.log(record.vocab_size) if fresh else None

    # -- step records ---------------------------------------------------------------------------------------------

    def learning_rate(self, record: StepRecord, key: int) -> list[Finding]:
        """`lr_mismatch`: the LR applied is not the LR planned."""
        state, planned = self.state, record.lr_planned
        if planned is None or record.lr is None:
            return []
        wrong = abs(record.lr - planned) > self._settings.lr_tolerance * max(abs(planned), 1e-12)
        cls = IncidentClass.LR_MISMATCH
        if wrong and state.lr_key is None:
            state.lr_key = key
            why = f"the LR applied is {record.lr:.3e}, the LR planned {planned:.3e}"
            evidence = {"lr": record.lr, "planned": planned}
            return [Finding("classified", key, cls, record.step, record.step, why, None, dict(evidence))]
        if not wrong and state.lr_key is not None:
            closed, state.lr_key = state.lr_key, None
            return [Finding("closed", closed, cls, record.step, record.step, "the LR is as planned", record.step)]
        return []

    def initial(self, record: StepRecord, key: int) -> list[Finding]:
        """`initial_loss_off`: the first loss of a fresh model is far from ln(vocabulary), that of a uniform guess."""
        uniform, self.state.uniform = self.state.uniform, None
        if uniform is None or record.step != 1 or not math.isfinite(record.loss):
            return []
        limit = self._settings.initial_share * uniform
        if abs(record.loss - uniform) <= limit:
            return []
        above = record.loss > uniform
        cause = "the initialisation is too large" if above else "the model was trained before, or sees what it predicts"
        why = (
            f"the first loss is {record.loss:.3f}, a fresh model's is ln(vocabulary) = {uniform:.3f}, give or take "
            f"{limit:.3f}: {cause}, or the loss is counted in another way"
        )
        return _once(key, IncidentClass.INITIAL_LOSS_OFF, 1, 1, why, loss=record.loss, uniform=uniform, limit=limit)

    def expect_other_losses(self) -> None:
        """What was recorded is no measure of what is run again now."""
        self.state.rerun = {}

    def rerun(self, record: StepRecord, key: int) -> list[Finding]:
        """`loss_discontinuity`: after a resume the same data gives other losses."""
        state, settings = self.state, self._settings
        known = state.rerun.pop(record.step, None)
        if record.step - state.rerun_from > settings.discontinuity_steps:
            state.rerun = {}
        if known is not None and self.other_lr(known, record):  # from here on other losses are meant
            self.expect_other_losses()
            return []
        same_data = known is not None and record.data is not None and (
            (known.begin, known.end) == (record.data.begin, record.data.end)
        )  # fmt: skip
        if known is None or not same_data or not math.isfinite(record.loss) or not math.isfinite(known.loss):
            return []
        state.differences.append(abs(record.loss - known.loss))
        mean = sum(state.differences) / len(state.differences)
        limit = settings.discontinuity_share * abs(known.loss)
        if len(state.differences) < 3 or mean <= limit:
            return []
        state.rerun, state.doubted = {}, True
        why = (
            f"re-run on the same data after the resume from step {state.rerun_from}, losses differ by {mean:.4f} "
            f"in the mean of {len(state.differences)} steps, more than {limit:.4f}"
        )
        onset = state.rerun_from + 1
        return _once(key, IncidentClass.LOSS_DISCONTINUITY, onset, record.step, why, difference=mean, limit=limit)

    def other_lr(self, known: Recorded, record: StepRecord) -> bool:
        """Whether another LR is planned for a step than when it was recorded: its schedule was changed in between."""
        if known.lr is None or record.lr_planned is None:
            return False
        return abs(record.lr_planned - known.lr) > self._settings.lr_tolerance * max(abs(known.lr), 1e-12)

    def update_ratios(self, record: StepRecord, next_key: int) -> list[Finding]:
        """`update_ratio_high/low`: ratio over LR, because the ratio itself falls with the LR."""
        found: list[Finding] = []
        if not record.lr:
            return found
        for group, ratio in record.update_ratio.items():
            direction = self._outside(f"ratio/{group}", ratio / record.lr, self._settings.ratio_factor, record.step)
            if direction:
                cls = IncidentClass.UPDATE_RATIO_HIGH if direction > 0 else IncidentClass.UPDATE_RATIO_LOW
                why = f"update to weight ratio of {group} is {ratio:.2e} at an LR of {record.lr:.2e}, out of its band"
                onset = self.state.watched[f"ratio/{group}"].streak_from
                found += _once(next_key + len(found), cls, onset, record.step, why, ratio=ratio, lr=record.lr)
        return found

    def throughput(self, record: StepRecord, key: int) -> list[Finding]:
        """`throughput_drop`: the last 20 steps against the steps before them, of this attempt."""
        state = self.state
        if not record.tokens or record.step_time_s is None or record.step_time_s.total <= 0:
            return []
        state.seconds_per_token.append(record.step_time_s.total / record.tokens)
        values = state.seconds_per_token
        if len(values) > _THROUGHPUT_REFERENCE + _THROUGHPUT_RECENT:
            del values[0]
        if len(values) < 3 * _THROUGHPUT_RECENT:
            return []
        if record.step % _THROUGHPUT_EVERY:
            return []
        share = median(values[:-_THROUGHPUT_RECENT]) / median(values[-_THROUGHPUT_RECENT:])
        if share >= self._settings.throughput_share:
            state.slow_reported = state.slow_reported and share < 0.9
            return []
        if state.slow_reported:
            return []
        state.slow_reported = True
        onset = record.step - _THROUGHPUT_RECENT
        why = f"the last {_THROUGHPUT_RECENT} steps ran at {share:.0%} of the speed of the steps before"
        return _once(key, IncidentClass.THROUGHPUT_DROP, onset, record.step, why, share=share)

    # -- other records --------------------------------------------------------------------------------------------

    def activations(self, record: ActivationRecord, next_key: int) -> list[Finding]:
        """`activation_explosion/vanishing`: RMS per layer group against its own band."""
        found: list[Finding] = []
        for group, stats in record.groups.items():
            name, factor = f"activation/{group}", self._settings.activation_factor
            direction = self._outside(name, stats.rms, factor, record.step, streak=2)
            if direction:
                up = direction > 0
                cls = IncidentClass.ACTIVATION_EXPLOSION if up else IncidentClass.ACTIVATION_VANISHING
                side = "above" if up else "below"
                why = f"activations of group {group} have an RMS of {stats.rms:.3g}, far {side} their band"
                onset = self.state.watched[name].streak_from
                found += _once(next_key + len(found), cls, onset, record.step, why, rms=stats.rms, dead=stats.dead)
            elif self._outside(f"alive/{group}", 1.0 - stats.dead, _ALIVE_FACTOR, record.step, streak=2) < 0:
                onset = self.state.watched[f"alive/{group}"].streak_from
                why = f"{stats.dead:.0%} of the units of group {group} are dead, far more than before"
                cls = IncidentClass.ACTIVATION_VANISHING
                found += _once(next_key + len(found), cls, onset, record.step, why, rms=stats.rms, dead=stats.dead)
        return found

    def validation(self, record: EvalRecord, falling: bool, key: int) -> list[Finding]:
        """`validation_divergence`: three evaluations up while the training loss falls."""
        state, rise = self.state, self._settings.validation_rise
        if record.command is not None or not math.isfinite(record.loss):
            return []
        state.evals = [*state.evals[-255:], (record.step, record.loss)]
        losses = [loss for _, loss in state.evals]
        if len(losses) < 4:
            return []
        best = min(losses[:-3])
        up = all(loss > best + rise for loss in losses[-3:]) and losses[-1] > losses[-3]
        if not up or not falling:
            state.diverging_reported = state.diverging_reported and up
            return []
        if state.diverging_reported:
            return []
        state.diverging_reported = True
        onset = state.evals[-3][0]
        why = f"validation rose from {best:.3f} to {losses[-1]:.3f} in three evaluations while the training loss fell"
        return _once(key, IncidentClass.VALIDATION_DIVERGENCE, onset, record.step, why, best=best, now=losses[-1])

    def _outside(self, name: str, value: float, factor: float, step: int, streak: int | None = None) -> int:
        """+1 or -1 once, when a value has been out of its band for a streak of records."""
        watched = self.state.watched.get(name)
        if watched is None:
            watched = self.state.watched[name] = Watched()
        if not math.isfinite(value) or value < 0:
            return 0
        off = watched.series.offset(value)
        if off is None or abs(off) <= max(math.log(factor), self._settings.spike_sigma * watched.series.spread):
            watched.series.add(value)
            watched.streak, watched.reported = 0, False
            return 0
        watched.streak_from = step if watched.streak == 0 else watched.streak_from
        watched.streak += 1
        if watched.reported or watched.streak < (streak or self._settings.notice_streak):
            return 0
        watched.reported = True
        return 1 if off > 0 else -1


def _once(key: int, cls: IncidentClass, onset: int, step: int, why: str, **numbers: float) -> list[Finding]:
    """A notice: classified and closed in one, since nothing is waited for."""
    evidence = {name: round(value, 9) for name, value in numbers.items()}
    return [
        Finding("classified", key, cls, onset, step, why, None, dict(evidence)),
        Finding("closed", key, cls, onset, step, why, step, dict(evidence)),
    ]
