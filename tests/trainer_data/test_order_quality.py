"""Each level of the order cannot be told from a true shuffle, by tests that a weak one fails; seeks are cheap."""

import cProfile
import pstats
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import I64, Order, permute

SIZE = 100_000
BINS, WINDOW = 100, 1000
SIGMAS = 5.0

Shuffle = Callable[[int], I64]


def _keyed(size: int, seed: int, *, inverse: bool = False, values: I64 | None = None) -> I64:
    wanted = np.arange(size) if values is None else values
    keys = np.full(wanted.shape, seed, dtype=np.uint64)
    return permute(wanted.astype(np.uint64), size, keys, inverse=inverse).astype(np.int64)


def test_a_bijection_with_an_inverse_at_every_small_size() -> None:
    """Exhaustively: cycle walking must come home from every value."""
    for size in range(1, 400):
        image = _keyed(size, size)
        assert np.bincount(image, minlength=size).tolist() == [1] * size
        assert (_keyed(size, size, inverse=True, values=image) == np.arange(size)).all()


@settings(max_examples=40)
@given(st.integers(1, 10_000), st.integers(0, 2**63 - 1))
def test_a_bijection_with_an_inverse_at_any_size(size: int, seed: int) -> None:
    """Powers of four and what lies just beyond them included."""
    image = _keyed(size, seed)
    assert len(np.unique(image)) == size
    assert image.min() == 0
    assert image.max() == size - 1
    assert (_keyed(size, seed, inverse=True, values=image) == np.arange(size)).all()


def _blocks(epoch: int) -> I64:
    """The permutation of blocks alone: blocks and windows of one."""
    return Order((SIZE,), 11, 1, 1).samples(np.arange(epoch * SIZE, (epoch + 1) * SIZE))


def _samples(epoch: int) -> I64:
    """The permutation of samples within a window alone: one window holds everything."""
    return Order((SIZE,), 11, 1000, SIZE // 1000).samples(np.arange(epoch * SIZE, (epoch + 1) * SIZE))


def _tail(epoch: int) -> I64:
    """The permutation within the last, shorter block alone: it holds everything."""
    return Order((SIZE,), 11, SIZE + 1, 4).samples(np.arange(epoch * SIZE, (epoch + 1) * SIZE))


def _numpys(epoch: int) -> I64:
    """A true shuffle: the tests must let it pass."""
    return np.random.default_rng(epoch).permutation(SIZE).astype(np.int64)


def _congruence(epoch: int) -> I64:
    """A linear congruence, as some loaders use: a bijection, and no shuffle."""
    return (np.arange(SIZE, dtype=np.int64) * 61_803 + 7 + 1013 * epoch) % SIZE


def _faults(shuffle: Shuffle) -> list[str]:
    """What tells permutations of 0..SIZE-1 from true shuffles; expectations are those of sampling without replacement.

    Windows: a window of m of n values in B equal bins has E[chi2] = (B-1)(n-m)/(n-1) and about the variance of
    chi-squared, scaled alike. Neighbours: of n differences 2n/e are distinct, with a variance of 0.4n (each difference
    d comes Poisson((n-|d|)/n) times). Epochs: their correlation has deviation 1/sqrt(n-1), equal places are Poisson(1).
    """
    one, two = shuffle(0), shuffle(1)
    scale = (SIZE - WINDOW) / (SIZE - 1)
    counts = np.stack([np.bincount(w * BINS // SIZE, minlength=BINS) for w in one.reshape(-1, WINDOW)])
    chi2 = ((counts - WINDOW / BINS) ** 2 / (WINDOW / BINS)).sum(axis=1)
    deviation = np.sqrt(2 * (BINS - 1)) * scale
    found = {
        "window mean": (chi2.mean() - (BINS - 1) * scale) / (deviation / np.sqrt(len(chi2))),
        "window deviation": (chi2.std() / deviation - 1) * np.sqrt(2 * len(chi2)),
        "neighbours": (len(np.unique(np.diff(one))) - 2 * SIZE / np.e) / np.sqrt(0.4 * SIZE),
        "epochs": np.corrcoef(one, two)[0, 1] * np.sqrt(SIZE - 1),
        "same places": float((one == two).sum()) - 1,
    }
    return [f"{name}: {value:.1f} sigma" for name, value in found.items() if abs(value) > SIGMAS]


@pytest.mark.parametrize("shuffle", [_blocks, _samples, _tail, _numpys])
def test_every_level_looks_like_a_true_shuffle(shuffle: Shuffle) -> None:
    """Windows, neighbours and epochs; numpy's own shuffle passes the same tests."""
    assert not _faults(shuffle)


def test_a_weak_permutation_is_found_out() -> None:
    """The same tests fail a linear congruence, so they can fail."""
    assert {fault.split(":")[0] for fault in _faults(_congruence)} >= {"window mean", "neighbours", "epochs"}


def _spread(keys: I64, size: int) -> float:
    """By how many sigma the places of one sample over seeds are not uniform (chi-squared, size - 1 degrees)."""
    places = permute(np.full(keys.shape, 5, dtype=np.uint64), size, keys.astype(np.uint64))
    expected = len(keys) / size
    chi2 = ((np.bincount(places.astype(np.int64), minlength=size) - expected) ** 2 / expected).sum()
    return float((chi2 - (size - 1)) / np.sqrt(2 * (size - 1)))


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_one_sample_comes_everywhere_alike_over_seeds(size: int) -> None:
    """No seed-independent favourite place; with a single key it would always be the same."""
    keys = np.random.default_rng(3).integers(0, 2**62, 100 * size)
    assert abs(_spread(keys, size)) < SIGMAS
    assert _spread(np.zeros_like(keys), size) > SIGMAS


def test_samples_of_a_window_mix_among_its_blocks() -> None:
    """With default blocks and windows: the place of a sample in its window says nothing about its block."""
    order = Order((64 * 4000,), 5, 64, 4)
    samples = order.samples(np.arange(order.total)).reshape(-1, 256)
    blocks = samples // 64
    assert all(len(np.unique(row)) == 4 for row in blocks)
    firsts = np.asarray([np.argsort(np.unique(row))[np.searchsorted(np.unique(row), row[:64])] for row in blocks])
    counts = np.bincount(firsts.ravel(), minlength=4)
    assert (abs(counts - firsts.size / 4) < SIGMAS * np.sqrt(firsts.size * 3 / 16)).all()


def test_a_batch_at_default_settings_draws_on_few_shards() -> None:
    """Of 200 shards a batch of 64 sees at most those of two windows of four blocks, and four as a rule."""
    order = Order((10_000,) * 200, 3, 64, 4)
    seen = []
    for begin in range(0, 64 * 500, 64):
        shards, _ = order.shards_of(order.samples(np.arange(begin, begin + 64)))
        seen.append(len(np.unique(shards)))
    assert max(seen) <= 8
    assert np.mean(seen) < 4.1


def test_a_seek_deep_into_the_order_computes_and_holds_next_to_nothing() -> None:
    """Position 10^9 of 2 x 10^9: a few dozen passes of the network over one batch, kilobytes, whatever the depth."""
    order = Order((10**7,) * 200, 1, 64, 4)
    tracemalloc.start()
    profile = cProfile.Profile()
    profile.enable()
    samples = order.samples(np.arange(10**9, 10**9 + 64))
    profile.disable()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    passes = int(pstats.Stats(profile).get_stats_profile().func_profiles["_feistel"].ncalls)
    assert len(np.unique(samples)) == 64
    assert 2 <= passes <= 60
    assert peak_bytes < 100_000
