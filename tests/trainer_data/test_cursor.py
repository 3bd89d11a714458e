"""Consumed = the raw range minus skips minus quarantines, none twice or missing, through restarts and batch sizes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.plan import Quarantine, SkipRange
from trainer.data.cursor import Cursor, Fate
from trainer.data.errors import ExhaustedError
from trainer.data.order import I64

NUM_SHARDS = 4


def shard_of(positions: I64) -> I64:
    """A stand-in for the order: runs of five positions a shard."""
    return positions // 5 % NUM_SHARDS


skip_ranges = st.builds(
    lambda begin, length, then: SkipRange(begin=begin, end=begin + length, then=then),
    st.integers(0, 200),
    st.integers(1, 60),
    st.sampled_from(["defer", "drop"]),
)
skip_plans = st.lists(skip_ranges, max_size=4).map(tuple)
quarantine_plans = st.lists(
    st.builds(Quarantine, shard=st.integers(0, NUM_SHARDS - 2), from_position=st.integers(0, 200)), max_size=3
).map(tuple)
batch_sizes = st.lists(st.integers(1, 17), min_size=1, max_size=25)


def _is_out(position: int, skips: tuple[SkipRange, ...], quarantines: tuple[Quarantine, ...]) -> bool:
    """The rule, said slowly."""
    shard = int(shard_of(np.asarray([position]))[0])
    return any(s.begin <= position < s.end for s in skips) or any(
        q.shard == shard and position >= q.from_position for q in quarantines
    )


def _cursor(
    position: int, skips: tuple[SkipRange, ...], quarantines: tuple[Quarantine, ...], planned: int | None = None
) -> Cursor:
    cursor = Cursor(shard_of, position, planned, lambda _: frozenset(range(NUM_SHARDS)))
    cursor.apply(skips, quarantines)
    return cursor


@given(skip_plans, quarantine_plans, batch_sizes, st.integers(0, 100))
def test_consumed_is_the_range_minus_skips_minus_quarantines(
    skips: tuple[SkipRange, ...], quarantines: tuple[Quarantine, ...], sizes: list[int], start: int
) -> None:
    """With a restart after every batch and another batch size each time; consecutive ranges tile."""
    position, consumed = start, []
    for size in sizes:
        take = _cursor(position, skips, quarantines).take(size)
        assert take.begin == position
        assert len(take.positions) == size
        position = take.end
        consumed += take.positions.tolist()
    assert consumed == [p for p in range(start, position) if not _is_out(p, skips, quarantines)]


@given(skip_plans, quarantine_plans, st.integers(1, 60), st.integers(1, 60))
def test_batch_sizes_do_not_change_what_comes(
    skips: tuple[SkipRange, ...], quarantines: tuple[Quarantine, ...], one: int, two: int
) -> None:
    """Two batches read what one of their size together reads."""
    parts = _cursor(0, skips, quarantines)
    split = [*parts.take(one).positions.tolist(), *parts.take(two).positions.tolist()]
    assert split == _cursor(0, skips, quarantines).take(one + two).positions.tolist()


@given(skip_plans, quarantine_plans, batch_sizes)
def test_a_later_plan_changes_nothing_that_was_read(
    skips: tuple[SkipRange, ...], quarantines: tuple[Quarantine, ...], sizes: list[int]
) -> None:
    """Skips and quarantines that begin at the cursor leave the past as it was, so a restart finds the same data."""
    cursor = _cursor(0, (), ())
    before = [cursor.take(size).positions.tolist() for size in sizes]
    at = cursor.position
    later = tuple(SkipRange(begin=at + s.begin, end=at + s.end, then=s.then) for s in skips)
    shut = tuple(Quarantine(shard=q.shard, from_position=at + q.from_position) for q in quarantines)
    again = _cursor(0, later, shut)
    assert [again.take(size).positions.tolist() for size in sizes] == before
    cursor.apply(later, shut)
    assert cursor.take(9).positions.tolist() == again.take(9).positions.tolist()


@given(skip_plans, batch_sizes)
def test_deferred_samples_are_read_after_the_planned_end_once(skips: tuple[SkipRange, ...], sizes: list[int]) -> None:
    """With `then: defer` nothing of the plan is missing in the end, nothing is read twice; with `drop` it is gone."""
    planned = 300  # beyond every skip, so that none lies where deferred samples are read
    cursor = _cursor(0, skips, (), planned)
    read: list[int] = []
    number = 0
    while cursor.position < planned or len(read) < planned:
        take = _cursor(cursor.position, skips, (), planned).take(sizes[number % len(sizes)])
        cursor.position = take.end
        read += take.sources.tolist()
        number += 1
    dropped = {p for s in skips if s.then == "drop" for p in range(s.begin, s.end)}
    assert len(set(read)) == len(read)
    assert {p for p in read if p < planned} == set(range(planned)) - dropped
    late = [p for p in range(planned) if _is_out(p, skips, ()) and p not in dropped]
    at_end = [p for p in read[planned - len(late) - len(dropped) :] if p < planned]
    assert at_end == late


@given(skip_plans, batch_sizes)
def test_an_extended_run_goes_on_where_the_raw_order_was_left(skips: tuple[SkipRange, ...], sizes: list[int]) -> None:
    """Behind the deferred samples: with more steps than were planned nothing is missing and nothing comes twice."""
    planned = 300
    read: list[int] = []
    position = number = 0
    while len(read) < 2 * planned:
        take = _cursor(position, skips, (), planned).take(sizes[number % len(sizes)])
        position = take.end
        read += take.sources.tolist()
        number += 1
    dropped = {p for s in skips if s.then == "drop" for p in range(s.begin, s.end)}
    assert len(set(read)) == len(read)
    assert set(read) | dropped == set(range(max(read) + 1))


@given(skip_plans, quarantine_plans, st.integers(100, 300))
def test_the_inverse_says_when_each_sample_is_read(
    skips: tuple[SkipRange, ...], quarantines: tuple[Quarantine, ...], planned: int
) -> None:
    """For every sample of the raw order: the position at which `take` gives it, or why it never does."""
    cursor = _cursor(0, skips, quarantines, planned)
    take = cursor.take(900)
    sources = np.arange(500)
    positions, fates = cursor.read_at(sources, shard_of(sources))
    taken = dict(zip(take.sources.tolist(), take.positions.tolist(), strict=True))
    for source, position, fate in zip(sources.tolist(), positions.tolist(), fates.tolist(), strict=True):
        if fate in (Fate.READ, Fate.DEFERRED):
            assert taken[source] == position
        else:
            assert source not in taken


def test_deferred_samples_of_a_quarantined_shard_stay_out() -> None:
    """A quarantine outlives a deferral."""
    skips = (SkipRange(begin=0, end=10),)  # shards 0 and 1
    take = _cursor(40, skips, (Quarantine(shard=0, from_position=20),), planned=40).take(5)
    assert take.sources.tolist() == [5, 6, 7, 8, 9]
    assert take.shards.tolist() == [1] * 5


def test_peeking_leaves_the_cursor() -> None:
    """Reading ahead consumes nothing."""
    cursor = _cursor(0, (SkipRange(begin=3, end=9),), ())
    seen = cursor.peek(6).positions.tolist()
    assert cursor.position == 0
    assert cursor.take(6).positions.tolist() == seen == [0, 1, 2, 9, 10, 11]


def test_nothing_left_is_an_error_not_a_search_for_ever() -> None:
    """All shards quarantined, from now or from a position on."""
    shut = tuple(Quarantine(shard=shard, from_position=10) for shard in range(NUM_SHARDS))
    cursor = _cursor(0, (), shut)
    assert cursor.take(10).end == 10
    with pytest.raises(ExhaustedError, match="quarantined"):
        cursor.take(1)
