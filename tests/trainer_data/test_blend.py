"""A blend keeps its proportions, can be entered anywhere, and has an inverse."""

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.blend import PERIOD, Blend

weight_lists = st.lists(
    st.one_of(st.floats(0.001, 100).map(lambda weight: round(weight, 4)), st.integers(1, 50).map(float)),
    min_size=1,
    max_size=6,
)
seeds = st.integers(0, 2**63 - 1)


@settings(max_examples=50)
@given(weight_lists, seeds)
def test_proportions_never_drift(weights: list[float], seed: int) -> None:
    """After whole periods no source is further from its share than its harmonic number, and none was ever un-read."""
    blend = Blend(weights, seed)
    total = sum(Fraction(str(weight)) for weight in weights)
    before = [0] * len(weights)
    for period in (1, 2, 3, 10, 1000, 10**7):
        counts = blend.counts(period * PERIOD)
        assert sum(counts) == period * PERIOD
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - Fraction(str(weight)) / total * period * PERIOD) < 1 + np.log(len(weights))
        assert all(count >= earlier for count, earlier in zip(counts, before, strict=True))
        before = counts


@settings(max_examples=50)
@given(weight_lists, seeds, st.integers(0, 10**12))
def test_each_source_is_counted_up_without_gaps(weights: list[float], seed: int, begin: int) -> None:
    """From any position on, the samples of a source come in their own order, each once, and `counts` agrees."""
    blend = Blend(weights, seed)
    sources, indices = blend.sources(np.arange(begin, begin + 600))
    starts, ends = blend.counts(begin), blend.counts(begin + 600)
    for source in range(len(weights)):
        assert indices[sources == source].tolist() == list(range(starts[source], ends[source]))


@settings(max_examples=50)
@given(weight_lists, seeds, st.integers(0, 10**12))
def test_the_inverse_finds_the_position(weights: list[float], seed: int, begin: int) -> None:
    """Also of a source that comes once in many periods."""
    blend = Blend(weights, seed)
    positions = np.arange(begin, begin + 300)
    sources, indices = blend.sources(positions)
    for source in np.unique(sources).tolist():
        mine = sources == source
        assert blend.positions(source, indices[mine][::-1]).tolist() == positions[mine][::-1].tolist()


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), seeds, st.integers(0, 10**9))
def test_a_whole_pattern_holds_the_exact_proportions(weights: list[int], seed: int, begin: int) -> None:
    """Any window of whole patterns: as many periods as the weights' sum."""
    blend = Blend([float(weight) for weight in weights], seed)
    pattern = sum(weights) * PERIOD
    before, after = blend.counts(begin * pattern), blend.counts((begin + 1) * pattern)
    assert [b - a for a, b in zip(before, after, strict=True)] == [weight * PERIOD for weight in weights]


def test_a_rare_source_is_not_forgotten() -> None:
    """One of ten thousand: exactly ten in a hundred thousand, to within one."""
    blend = Blend([9999, 1], 5)
    sources, _ = blend.sources(np.arange(99_840))
    assert abs(int((sources == 1).sum()) - 9.984) < 1


def test_sources_come_irregularly_within_a_period() -> None:
    """Two equal sources do not alternate, so that a rank's share of a batch is not tied to one of them."""
    sources, _ = Blend([1, 1], 9).sources(np.arange(10 * PERIOD))
    changes = int((np.diff(sources) != 0).sum())
    assert abs(changes - 5 * PERIOD) < 5 * np.sqrt(10 * PERIOD / 4)
    assert (
        Blend([1, 1], 9).sources(np.arange(PERIOD))[0].tolist()
        != Blend([1, 1], 8).sources(np.arange(PERIOD))[0].tolist()
    )
