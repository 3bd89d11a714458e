"""The order is a permutation of every epoch, has an inverse, keeps its locality and looks random."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import Order

FIRST_EIGHT = [513, 783, 482, 177, 774, 186, 493, 492]

orders = st.builds(
    Order,
    shard_samples=st.lists(st.integers(0, 90), min_size=1, max_size=6).map(tuple).filter(lambda s: sum(s) > 0),
    seed=st.integers(0, 2**63 - 1),
    block_samples=st.integers(1, 20),
    window_blocks=st.integers(1, 6),
)


@given(orders, st.integers(0, 5))
def test_every_epoch_reads_every_sample_once(order: Order, epoch: int) -> None:
    """A bijection, whatever the shards, blocks and windows."""
    begin = epoch * order.total
    samples = order.samples(np.arange(begin, begin + order.total))
    assert sorted(samples.tolist()) == list(range(order.total))


@given(orders, st.integers(0, 5))
def test_the_inverse_finds_the_position(order: Order, epoch: int) -> None:
    """Which position reads this sample: in constant time, too."""
    positions = np.arange(epoch * order.total, (epoch + 1) * order.total)
    assert (order.positions(order.samples(positions), epoch) == positions).all()


@given(orders, st.data())
def test_a_position_alone_gives_what_a_range_gives(order: Order, data: st.DataObject) -> None:
    """Independent of how many are asked for at once, over epoch borders: batch sizes cannot shift the data."""
    begin = data.draw(st.integers(0, 3 * order.total))
    together = order.samples(np.arange(begin, begin + 30))
    assert together.tolist() == [int(order.samples([position])[0]) for position in range(begin, begin + 30)]


@given(orders)
def test_samples_belong_to_their_shards(order: Order) -> None:
    """(shard, sample within it) is within bounds, and shards without samples never come up."""
    shards, numbers = order.shards_of(np.arange(order.total))
    counts = np.bincount(shards, minlength=len(order.shard_samples))
    assert counts.tolist() == list(order.shard_samples)
    assert (numbers < np.asarray(order.shard_samples)[shards]).all()


def test_pure_function_of_its_arguments_and_different_by_epoch_and_seed() -> None:
    """Equal for equal arguments; epochs and seeds differ. The numbers are fixed: a change would reorder every run."""
    one, two = (Order((500, 300), 7, 16, 4) for _ in range(2))
    first = one.samples(np.arange(800))
    assert (first == two.samples(np.arange(800))).all()
    assert (first != one.samples(np.arange(800, 1600))).mean() > 0.9
    assert (first != Order((500, 300), 8, 16, 4).samples(np.arange(800))).mean() > 0.9
    assert first[:8].tolist() == FIRST_EIGHT


def test_a_batch_draws_on_few_shards() -> None:
    """Within a window of blocks only those blocks' shards are read, which ties a bad shard to its batches."""
    order = Order((1000,) * 16, 3, 10, 4)
    for begin in range(0, 8000, 40):
        shards, _ = order.shards_of(order.samples(np.arange(begin, begin + 40)))
        assert len(set(shards.tolist())) <= 4


def test_a_deep_position_costs_nothing() -> None:
    """Position 10^12 of 10^11 samples: no index in memory, no replay."""
    order = Order((10**9,) * 100, 1, 64, 4)
    samples = order.samples(np.arange(10**12, 10**12 + 512))
    assert len(set(samples.tolist())) == 512
    assert (order.positions(samples, 10) == np.arange(10**12, 10**12 + 512)).all()


def _chi2(values: np.ndarray[tuple[int, ...], np.dtype[np.int64]], total: int, bins: int = 100) -> float:
    counts = np.bincount(values * bins // total, minlength=bins)
    expected = len(values) / bins
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_windows_of_the_permutation_look_like_a_true_shuffle(seed: int) -> None:
    """Chi-squared of windows of 1,000 in 100 bins: mean 99 and deviation 14 ideally; 39 was too regular (research)."""
    total = 1_000_000
    samples = Order((total,), seed, 1, 1).samples(np.arange(200_000))
    found = [_chi2(window, total) for window in samples.reshape(-1, 1000)]
    assert 95 < np.mean(found) < 103
    assert 11 < np.std(found) < 17


def test_neighbours_in_a_window_are_unrelated() -> None:
    """Differences between neighbours take many values: a linear congruence has two."""
    samples = Order((100_000,), 5, 1000, 100).samples(np.arange(100_000))
    assert len({b - a for a, b in itertools.pairwise(samples.tolist())}) > 50_000


def test_small_permutations_reach_every_place() -> None:
    """Of four blocks each comes first about equally often over seeds."""
    firsts = np.bincount([int(Order((4,), seed, 1, 1).samples([0])[0]) for seed in range(800)], minlength=4)
    assert ((firsts > 140) & (firsts < 260)).all(), firsts
