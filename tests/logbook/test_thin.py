"""Thinning out never loses an extreme, and never grows with the run."""

import math

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.logbook.signals import Curves, Sums, Update
from orchestrator.logbook.thin import SpikeScore, Thinner

_VALUES = st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=400)


def _thinned(values: list[float], buckets: int) -> list[tuple[int, float]]:
    thinner = Thinner()
    for place, value in enumerate(values):
        thinner.add(place * buckets // max(1, len(values)), (place, 0.0, value))
    return [(place, value) for place, _, value in thinner.points()]


@given(values=_VALUES, buckets=st.integers(1, 30))
def test_every_extreme_survives(values: list[float], buckets: int) -> None:
    """What lies above or below all of its own bucket is kept, with its place; what is kept was there, in order."""
    kept = _thinned(values, buckets)
    finite = [(place, value) for place, value in enumerate(values) if math.isfinite(value)]
    assert set(kept) <= set(finite)
    assert [place for place, _ in kept] == sorted({place for place, _ in kept})
    assert len(kept) <= 2 * buckets + 2
    for bucket in range(buckets):
        inside = [(value, place) for place, value in finite if place * buckets // len(values) == bucket]
        if inside:
            shown = [value for place, value in kept if place * buckets // len(values) == bucket]
            assert min(shown) == min(inside)[0]
            assert max(shown) == max(inside)[0]
    assert kept[:1] == finite[:1]
    assert kept[-1:] == finite[-1:]


@given(st.lists(st.floats(-1e6, 1e6), min_size=60, max_size=300), st.floats(1e9, 1e30))
def test_one_enormous_value_leaves_no_error_behind(values: list[float], enormous: float) -> None:
    """Once it has left the window, the score is that of a window that never saw it."""
    marked, clean = SpikeScore(window=50), SpikeScore(window=50)
    for value in [*values[:10], enormous, *values[10:], *[0.0, 1.0] * 120]:
        marked.is_spike(value)
    for value in [0.0, 1.0] * 120:
        clean.is_spike(value)
    assert marked.is_spike(100.0)
    assert clean.is_spike(100.0)
    assert not marked.is_spike(1.5)


def test_a_spike_stands_out_once() -> None:
    """Seven deviations above its own past; what is not finite always does."""
    score = SpikeScore()
    seen = [score.is_spike(value) for value in [*[1.0, 1.1] * 100, 9.0, *[1.0, 1.1] * 20, math.nan, 1.0]]
    assert [place for place, spike in enumerate(seen) if spike] == [200, 241]


def test_points_do_not_grow_with_the_run() -> None:
    """A hundred times as many updates give about as many points."""

    def points(updates: int) -> int:
        curves, sums = Curves(0.0, updates), Sums(updates)
        for place in range(updates):
            update = Update(1, place, True, float(place), {"loss": math.sin(place)})
            curves.add(place, update, [("loss", "loss", math.sin(place))])
            sums.add(place, update)
        assert len(sums.trend().steps) <= 80
        return sum(len(curve.steps) for panel in curves.panels() for curve in panel.series[0].curves)

    assert points(2_000) <= points(200_000) <= 2402
