"""Where in the batch and in the model an incident began: evidence for people, never a reason to act by itself.

Samples: the worst sequences of the batches around an onset, by raw position. Layer group: whichever left its own band
first, by update ratio over LR, gradient norm, attention-logit maximum, g^2/v or activation RMS, each judged in logs
against its last 64 records. What left together cannot be told apart and is not named, and what was not recorded is not
guessed: then the fields are missing. Memory is constant, and so is the work of a record.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import Field, PlainSerializer
from pydantic.dataclasses import dataclass

from monitors.detect.series import Series
from monitors.records import LAYER_GROUPS, ActivationRecord, StepRecord
from monitors.taxonomy import Evidence

_WINDOW_STEPS = 16  # before an onset: the gradient norm left its band 4 steps before the loss at BLOOM
_BEFORE_STEPS, _AFTER_STEPS = 2, 32  # around an onset, whose worst samples are named
_KEPT = 64
_SETTLES = 8  # records outside its band after which a signal has a new one
_SIGMA = 8.0  # above the 6 of the loss: some 25 series are looked at
_LEAST = math.log(2.0)  # smaller changes are no cause of anything
_CLEARLY = 2.0  # times as far out as the next group, of those that left at the same step
_SAMPLES = 3
_FORWARD = ("activation_rms", "attention_logit_max")
_FIRST_BLOCKS = LAYER_GROUPS.index("early")  # if these left, all did: damage of every layer looks the same
_Float = Annotated[float, PlainSerializer(lambda x: x if math.isfinite(x) else str(x), when_used="json")]


@dataclass(slots=True)
class Watched:
    """One signal of one group."""

    series: Series = Field(default_factory=Series)
    out: int = Field(default=0, description="records in a row outside the band")


@dataclass(frozen=True, slots=True)
class Departure:
    """A signal of a layer group has left its band; `sigma` is how far, infinite for a value that is not finite."""

    step: int
    group: str
    signal: str
    value: _Float
    usual: float
    sigma: _Float


@dataclass(slots=True)
class BlameState:
    """What is remembered."""

    worst: list[tuple[int, int, _Float]] = Field(default_factory=list, description="(step, raw position, loss)")
    watched: dict[str, Watched] = Field(default_factory=dict)
    departures: list[Departure] = Field(default_factory=list)


class Blame:
    """Folds step and activation records; `evidence` is asked when something has been found."""

    def __init__(self, state: BlameState | None = None) -> None:
        self.state = state or BlameState()

    def observe(self, record: StepRecord | ActivationRecord) -> None:
        """Take one record in."""
        state = self.state
        if isinstance(record, StepRecord) and record.worst is not None:
            state.worst = [*state.worst[-_KEPT + 1 :], (record.step, *record.worst)]
        for group, signal, value in _signals(record):
            departure = self._judge(record.step, group, signal, value)
            if departure is not None:
                state.departures = [*state.departures[-_KEPT + 1 :], departure]

    def evidence(self, onset_step: int, step: int) -> Evidence:
        """What speaks of an incident that began at `onset_step`, as far as it is known at `step`."""
        return {**self._samples(onset_step, step), **self._layers(onset_step)}

    def rewind(self, step: int) -> None:
        """A new attempt from `step` updates: what came later did not happen; the bands are made anew."""
        state = self.state
        state.worst = [known for known in state.worst if known[0] <= step]
        state.departures = [known for known in state.departures if known.step <= step]
        state.watched = {}

    def _samples(self, onset_step: int, step: int) -> Evidence:
        worst, begin, end = self.state.worst, onset_step - _BEFORE_STEPS, onset_step + _AFTER_STEPS
        if not worst or worst[0][0] > onset_step:
            return {}  # what an earlier finding said of it stands; later samples have nothing to do with its onset
        window = [known for known in worst if begin <= known[0] <= min(step, end)]
        ranked = sorted(window, key=lambda known: (not math.isnan(known[2]), -known[2]))[:_SAMPLES]
        return {
            "samples": [position for _, position, _ in ranked],
            "sample_losses": [round(loss, 6) for _, _, loss in ranked],
            "sample_steps": [at for at, _, _ in ranked],
        }

    def _layers(self, onset_step: int) -> Evidence:
        begin = onset_step - _WINDOW_STEPS
        window = [known for known in self.state.departures if begin <= known.step <= onset_step + 1]
        if not window:
            return {}
        first = min(known.step for known in window)
        found = _clearly_first([known for known in window if known.step == first])
        if found is None:
            return {}
        return {
            "layer_group": found.group, "layer_signal": found.signal, "layer_step": found.step,
            "layer_value": found.value, "layer_usual": round(found.usual, 9), "layer_sigma": round(found.sigma, 2),
        }  # fmt: skip

    def _judge(self, step: int, group: str, signal: str, value: float) -> Departure | None:
        name = f"{signal}/{group}"
        watched = self.state.watched.get(name)
        if watched is None:
            watched = self.state.watched[name] = Watched()
        series, finite = watched.series, math.isfinite(value)
        off = series.offset(value if finite else math.inf)
        if off is not None and abs(off) > max(_LEAST, _SIGMA * series.spread):
            watched.out += 1
            if watched.out == 1:
                sigma = abs(off) / max(series.spread, _LEAST / _SIGMA)
                return Departure(step, group, signal, value, math.exp(series.middle), sigma)
        if not finite or 0 < watched.out < _SETTLES:
            return None
        if watched.out:
            watched.series, watched.out = Series(), 0
        watched.series.add(value)
        return None


def _signals(record: StepRecord | ActivationRecord) -> Iterator[tuple[str, str, float]]:
    """(group, signal, value) of everything that a record says of layer groups."""
    if isinstance(record, ActivationRecord):
        yield from ((group, "activation_rms", stats.rms) for group, stats in record.groups.items())
        return
    if record.lr and not record.skipped:  # an update that was not applied has no size
        yield from ((group, "update_ratio_over_lr", ratio / record.lr) for group, ratio in record.update_ratio.items())
    known: tuple[tuple[str, Mapping[str, float] | None], ...] = (
        ("grad_norm", record.grad_norms),
        ("attention_logit_max", record.attention_logit_max),
        ("second_moment_ratio", record.second_moment_ratio),
    )
    for signal, values in known:
        yield from ((group, signal, value) for group, value in (values or {}).items())


def _clearly_first(together: list[Departure]) -> Departure | None:
    """The group that is to blame, of those that left at the same step; None where that cannot be told.

    What goes wrong in a layer spreads forward from there: of the activations that left, the first in order is named,
    unless all did. A gradient that is not finite spreads to none above, so only one that is alone is named. Otherwise
    it is the group that is farther out than the others by far.
    """
    forward = sorted({_place(known) for known in together if known.signal in _FORWARD})
    if forward:
        first = [known for known in together if known.signal in _FORWARD and _place(known) == forward[0]]
        return max(first, key=lambda known: known.sigma) if forward[0] > _FIRST_BLOCKS else None
    broken = [known for known in together if math.isinf(known.sigma)]
    if broken:
        alone = [known for known in broken if known.signal == "grad_norm"]
        return alone[0] if len(alone) == 1 else None
    furthest = max(together, key=lambda known: known.sigma)
    others = [known.sigma for known in together if known.group != furthest.group]
    return furthest if furthest.sigma >= _CLEARLY * max(others, default=0.0) else None


def _place(known: Departure) -> int:
    return LAYER_GROUPS.index(known.group) if known.group in LAYER_GROUPS else 0
