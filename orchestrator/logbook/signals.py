"""One pass over all updates: the curves, the trend and the sums. SQLite's rows are streamed, none is held."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.logbook.model import Curve, Panel, Series, Totals, Trend
from orchestrator.logbook.thin import SpikeScore, Thinner, rounded

#: key -> (title, unit, logarithmic, buckets over the whole run), in the order of the page.
PANELS: dict[str, tuple[str, str, bool, int]] = {
    "loss": ("Loss", "nats a token", False, 1200),
    "evaluation": ("Evaluation", "", False, 600),
    "grad_norm": ("Gradient norm", "before clipping", True, 800),
    "lr": ("Learning rate", "", False, 400),
    "update_ratio": ("Update ratio", "|dw| / |w| by layer group", True, 300),
    "throughput": ("Throughput", "tokens a second", False, 500),
    "waiting": ("Waiting for data", "share of the step", False, 300),
    "clip_factor": ("Clipping", "factor on the gradient", False, 300),
    "grad_norms": ("Gradient norm by layer group", "", True, 300),
    "attention_logit_max": ("Largest attention logit", "", False, 300),
    "log_z": ("Log partition of the output", "log Z", False, 300),
    "second_moment_ratio": ("Second moment", "RMS of g²/v by layer group", True, 300),
    "activation_rms": ("Activations", "RMS by layer group", True, 300),
    "activation_max": ("Largest activation", "by layer group", True, 300),
    "dead": ("Dead units", "share by layer group", False, 300),
    "saturated": ("Saturated units", "share by layer group", False, 300),
    "scaler": ("Loss scale", "fp16", True, 300),
}
_BRANCHES = ("Loss by position in the data", "nats a token", False, 0)
_GROUPED = ("update_ratio", "grad_norms", "attention_logit_max", "second_moment_ratio")
_PARTS = 80  # of the trend
_NON_FINITE = 200  # listed; all are counted

Value = tuple[str, str, float]
"""(panel, series, value)"""


@dataclass(frozen=True, slots=True)
class Update:
    """One update that was run."""

    attempt: int
    step: int
    survives: bool
    at_s: float
    record: Mapping[str, Any]


def number(value: object) -> float:
    """A number of a record: what is not finite travels as text, what is not recorded as None."""
    return math.nan if value is None else float(value)  # type: ignore[arg-type]


def values(record: Mapping[str, Any]) -> Iterator[Value]:
    """What an update's record says, by panel."""
    yield "loss", "loss", number(record["loss"])
    for key in ("grad_norm", "log_z", "scaler"):
        if record.get(key) is not None:
            yield key, key, number(record[key])
    for key, name in (("lr_planned", "planned"), ("lr", "applied")):
        if record.get(key) is not None:
            yield "lr", name, number(record[key])
    for key in _GROUPED:
        for group, value in (record.get(key) or {}).items():
            yield key, group, number(value)
    if took := record.get("step_time_s"):
        total = sum(took.values())
        if total > 0.0:
            yield "waiting", "share", took["data"] / total
            if record.get("tokens"):
                yield "throughput", "tokens/s", record["tokens"] / total
    if (prevention := record.get("prevention")) and prevention.get("clip_factor") is not None:
        yield "clip_factor", "factor", number(prevention["clip_factor"])


class Curves:
    """Thins out the values of all panels as they come."""

    def __init__(self, began_at_s: float, updates: int, buckets: Mapping[str, int] | None = None) -> None:
        self._began_at_s = began_at_s
        self._updates = max(1, updates)
        self._buckets = buckets or {key: panel[3] for key, panel in PANELS.items()}
        self._open: dict[tuple[str, str, int, bool], Thinner] = {}

    def add(self, ordinal: int, update: Update, found: Iterable[Value]) -> None:
        """The values of one update, the `ordinal`th of all."""
        seconds = update.at_s - self._began_at_s
        for key, name, value in found:
            place = (key, name, update.attempt, update.survives)
            if (thinner := self._open.get(place)) is None:
                thinner = self._open[place] = Thinner()
            bucket = ordinal * self._buckets[key] // self._updates
            thinner.add(bucket, (update.step, seconds, value))

    def panels(self) -> list[Panel]:
        """In the order of the page; a panel without a point is left out."""
        series: dict[str, dict[str, list[Curve]]] = {}
        for (key, name, attempt, survives), thinner in self._open.items():
            if points := thinner.points():
                curve = Curve(
                    attempt=attempt,
                    survives=survives,
                    steps=[step for step, _, _ in points],
                    times_s=[round(seconds, 2) for _, seconds, _ in points],
                    values=[rounded(value) for _, _, value in points],
                )
                series.setdefault(key, {}).setdefault(name, []).append(curve)
        return [panel_of(key, series[key]) for key in PANELS if key in series]


def panel_of(key: str, series: Mapping[str, Sequence[Curve]]) -> Panel:
    """A panel with its title and unit."""
    title, unit, log, _ = PANELS.get(key, _BRANCHES)
    lines = [Series(name=name, curves=list(curves)) for name, curves in series.items()]
    return Panel(key=key, title=title, unit=unit, log=log and _is_positive(lines), series=lines)


def _is_positive(series: Sequence[Series]) -> bool:
    """A ratio may be 0 for want of an update, and is then no point on a logarithmic scale."""
    found = [value for one in series for curve in one.curves for value in curve.values]
    return min(found) >= 0.0 and max(found) > 0.0


class Sums:
    """The trend over parts of all updates, and the sums over all."""

    def __init__(self, updates: int) -> None:
        self._updates = max(1, updates)
        self._scores = {"loss": SpikeScore(), "grad_norm": SpikeScore()}
        self._parts: dict[int, list[int]] = {}
        self._seconds = {True: 0.0, False: 0.0}
        self._lost = 0
        self._non_finite = 0
        self._non_finite_steps: list[int] = []

    def add(self, ordinal: int, update: Update) -> None:
        """One update, the `ordinal`th of all."""
        record = update.record
        part = self._parts.setdefault(ordinal * min(_PARTS, self._updates) // self._updates, [0] * 6)
        seen = [
            self._scores["loss"].is_spike(number(record["loss"])),
            record.get("grad_norm") is not None and self._scores["grad_norm"].is_spike(number(record["grad_norm"])),
            bool(record.get("clipped")),
            bool(record.get("skipped")),
        ]
        part[:] = [update.step, part[1] + 1, *(count + now for count, now in zip(part[2:], seen, strict=True))]
        self._seconds[update.survives] += sum((record.get("step_time_s") or {}).values())
        self._lost += not update.survives
        if not math.isfinite(number(record["loss"])):
            self._non_finite += 1
            if len(self._non_finite_steps) < _NON_FINITE:
                self._non_finite_steps.append(update.step)

    def trend(self) -> Trend:
        """Shares by part."""
        parts = list(self._parts.values())
        shares = [[rounded(part[place] / part[1]) for part in parts] for place in range(2, 6)]
        return Trend(
            steps=[part[0] for part in parts],
            spikes_loss=shares[0],
            spikes_grad_norm=shares[1],
            clipped=shares[2],
            skipped=shares[3],
        )

    def totals(self) -> Totals:
        """Sums over everything."""
        counts = [sum(part[place] for part in self._parts.values()) for place in range(1, 6)]
        return Totals(
            updates=counts[0],
            lost=self._lost,
            kept_s=self._seconds[True],
            lost_s=self._seconds[False],
            spikes_loss=counts[1],
            spikes_grad_norm=counts[2],
            clipped=counts[3],
            skipped=counts[4],
            non_finite=self._non_finite,
            non_finite_steps=self._non_finite_steps,
        )


def parsed(text: str) -> Mapping[str, Any]:
    """A record as it lies in the journal."""
    record: dict[str, Any] = json.loads(text)
    return record
