"""Segments: nothing that was read is reordered by what is added, sources keep their orders, and all has an inverse."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.contract.plan import Segment, Share
from trainer.data.timeline import SourceShard, Timeline

Pair = tuple[int, int]


def _segment(begin: int, num_shards: int, weights: dict[str, float], seed: int = 3) -> Segment:
    mix = tuple(Share(source=name, weight=weight) for name, weight in weights.items())
    return Segment(from_position=begin, manifest="x", num_shards=num_shards, mix=mix, seed=seed, sample_tokens=8)


def _timeline(segments: list[Segment], shards: list[SourceShard]) -> Timeline:
    return Timeline(segments, shards, block_samples=4, window_blocks=2)


def _read(timeline: Timeline, begin: int, end: int) -> list[Pair]:
    spots = timeline.spots(np.arange(begin, end))
    return list(zip(spots.shards.tolist(), spots.numbers.tolist(), strict=True))


def _of(source: str, pairs: list[Pair], shards: list[SourceShard]) -> list[Pair]:
    return [pair for pair in pairs if shards[pair[0]].source == source]


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Segment], list[SourceShard]]:
    """Shards are appended and sources come, go and are re-weighted at random places."""
    shards = [SourceShard("a", draw(st.integers(1, 30)))]
    segments = [_segment(0, 1, {"a": 1.0})]
    begin = 0
    for _ in range(draw(st.integers(0, 4))):
        begin += draw(st.integers(1, 90))
        shards += draw(st.lists(st.builds(SourceShard, st.sampled_from("abc"), st.integers(1, 30)), max_size=3))
        known = sorted({shard.source for shard in shards})
        names = draw(st.lists(st.sampled_from(known), min_size=1, unique=True))
        segments.append(_segment(begin, len(shards), {name: draw(st.integers(1, 4)) * 1.0 for name in names}))
    return segments, shards


@settings(max_examples=60, deadline=None)
@given(histories())
def test_a_segment_changes_nothing_before_it(history: tuple[list[Segment], list[SourceShard]]) -> None:
    """So a rollback over a boundary reads the old data again, as it was."""
    segments, shards = history
    end = segments[-1].from_position
    assert _read(_timeline(segments, shards), 0, end) == _read(_timeline(segments[:-1] or segments, shards), 0, end)


@settings(max_examples=60, deadline=None)
@given(histories())
def test_each_source_goes_on_in_its_own_order(history: tuple[list[Segment], list[SourceShard]]) -> None:
    """Whatever stands beside it: each epoch reads each of its shards' samples once, and a new one begins only then."""
    segments, shards = history
    timeline = _timeline(segments, shards)
    spots = timeline.spots(np.arange(segments[-1].from_position + 400))
    for source in {share.source for segment in segments for share in segment.mix}:
        mine = np.asarray([shards[shard].source == source for shard in spots.shards.tolist()])
        epochs = spots.epochs[mine]
        pairs = list(zip(spots.shards[mine].tolist(), spots.numbers[mine].tolist(), strict=True))
        assert (np.diff(epochs) >= 0).all()
        for epoch in range(int(epochs.max(initial=0))):
            read = [pair for pair, number in zip(pairs, epochs.tolist(), strict=True) if number == epoch]
            assert len(set(read)) == len(read)
            assert len(read) == sum(shards[shard].samples for shard in {shard for shard, _ in read})
        assert np.unique(epochs).tolist() == list(range(len(np.unique(epochs))))


@settings(max_examples=60, deadline=None)
@given(histories(), st.data())
def test_the_inverse_finds_every_place(history: tuple[list[Segment], list[SourceShard]], data: st.DataObject) -> None:
    """All raw positions below a horizon at which a sample comes, with its source's epochs, and no others."""
    segments, shards = history
    timeline = _timeline(segments, shards)
    horizon = segments[-1].from_position + 300
    shard = data.draw(st.integers(0, len(shards) - 1))
    number = data.draw(st.integers(0, shards[shard].samples - 1))
    spots = timeline.spots(np.arange(horizon))
    numbers = np.unique([number, shards[shard].samples - 1])
    at = np.flatnonzero((spots.shards == shard) & np.isin(spots.numbers, numbers))
    found = timeline.positions_of(shard, numbers, horizon)
    in_order = np.argsort(found.positions)
    assert found.positions[in_order].tolist() == at.tolist()
    assert found.epochs[in_order].tolist() == spots.epochs[at].tolist()
    assert found.numbers[in_order].tolist() == spots.numbers[at].tolist()


def test_a_source_that_is_added_moves_the_others_but_not_their_order() -> None:
    """What the first source reads is the same sequence with and without a neighbour."""
    shards = [SourceShard("a", 40), SourceShard("a", 25), SourceShard("b", 30)]
    alone = _timeline([_segment(0, 2, {"a": 1})], shards)
    beside = _timeline([_segment(0, 2, {"a": 1}), _segment(33, 3, {"a": 3, "b": 1})], shards)
    read = _of("a", _read(beside, 0, 400), shards)
    assert read == _read(alone, 0, len(read))
    assert abs(len(_of("b", _read(beside, 33, 33 + 256), shards)) - 64) <= 1


def test_sources_of_equal_size_are_not_walked_in_step() -> None:
    """Their orders are drawn with different keys."""
    shards = [SourceShard("a", 200), SourceShard("b", 200)]
    read = _read(_timeline([_segment(0, 2, {"a": 1, "b": 1})], shards), 0, 400)
    one, two = ([n for _, n in _of(source, read, shards)] for source in "ab")
    assert sum(x == y for x, y in zip(one, two, strict=False)) < 20


def test_added_shards_are_read_from_the_next_epoch_on() -> None:
    """The epoch that has begun is finished first; nothing of it is lost or read twice."""
    shards = [SourceShard("a", 40), SourceShard("a", 10)]
    timeline = _timeline([_segment(0, 1, {"a": 1}), _segment(7, 2, {"a": 1})], shards)
    assert sorted(_read(timeline, 0, 40)) == [(0, n) for n in range(40)]
    assert sorted(_read(timeline, 40, 90)) == [(0, n) for n in range(40)] + [(1, n) for n in range(10)]
    assert timeline.shards_from(7) == {0, 1}


def test_a_seek_into_a_blend_of_billions_holds_one_chunk() -> None:
    """Deep in a blend of large sources; positions and their inverse agree."""
    shards = [SourceShard("a", 10**7)] * 120 + [SourceShard("b", 10**7)] * 80
    timeline = _timeline([_segment(0, 200, {"a": 0.7, "b": 0.3})], shards)
    spots = timeline.spots(np.arange(10**9, 10**9 + 3))
    for offset in range(3):
        found = timeline.positions_of(int(spots.shards[offset]), spots.numbers[offset : offset + 1], 10**9 + 3)
        assert 10**9 + offset in found.positions
