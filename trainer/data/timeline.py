"""The raw order of a whole run: for each raw position source, shard and sample, through all segments; and the inverse.

A segment fixes from which shards, in which proportions, the order draws from a position on. Each source walks its own
order through its own epochs, whatever stands beside it: a source that comes, goes or is re-weighted moves only when
the others are read, never what they read next. Shards that were added to a source are read from its next epoch on,
since an epoch that has begun would otherwise be reordered. Shards have one number for the whole run.
"""

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import count

import numpy as np

from trainer.contract.plan import Segment
from trainer.data.blend import Blend
from trainer.data.order import I64, Bools, Order

_CHUNK_POSITIONS = 4096
_KEPT_CHUNKS = 8


@dataclass(frozen=True, slots=True)
class Spots:
    """Where samples lie: shard, sample within it, and samples [first, last) of the shard that lie in its block."""

    shards: I64
    numbers: I64
    firsts: I64
    lasts: I64
    epochs: I64

    @classmethod
    def empty(cls, size: int) -> "Spots":
        """Room for so many."""
        return cls(*(np.empty(size, dtype=np.int64) for _ in range(5)))

    def part(self, at: "I64 | slice") -> "Spots":
        """Some of them."""
        return Spots(self.shards[at], self.numbers[at], self.firsts[at], self.lasts[at], self.epochs[at])

    def put(self, where: "I64 | Bools", found: "Spots", at: "I64 | slice" = slice(None)) -> None:
        """Take over what was found elsewhere, or some of it."""
        for item in fields(self):
            getattr(self, item.name)[where] = getattr(found, item.name)[at]


@dataclass(frozen=True, slots=True)
class Reads:
    """Samples of one shard with the raw positions at which they come, and in which epoch of their source."""

    epochs: I64
    numbers: I64
    positions: I64

    @classmethod
    def none(cls) -> "Reads":
        """No sample comes."""
        return cls(*(np.empty(0, dtype=np.int64) for _ in range(3)))

    def and_more(self, others: "Reads") -> "Reads":
        """These and others."""
        pairs = ((getattr(self, item.name), getattr(others, item.name)) for item in fields(self))
        return Reads(*(np.concatenate(pair) for pair in pairs))


@dataclass(frozen=True, slots=True)
class SourceShard:
    """A shard as the order sees it: of which source it is and how many samples it holds."""

    source: str
    samples: int


@dataclass(frozen=True, slots=True)
class _Generation:
    """A set of shards of a source, in force from one of its epochs on. `first` counts the source's own samples."""

    first: int
    epoch: int
    order: Order
    shards: I64

    def spots(self, indices: I64) -> Spots:
        positions = indices - self.first + self.epoch * self.order.total
        samples = self.order.samples(positions)
        local, numbers = self.order.shards_of(samples)
        firsts, lasts = self.order.block_extents(samples, local)
        return Spots(self.shards[local], numbers, firsts, lasts, positions // self.order.total)


class _Walk:
    """One source through its epochs."""

    def __init__(self) -> None:
        self.generations: list[_Generation] = []

    def extend(self, shards: list[int], order: Order, read: int) -> None:
        """From the first epoch on that has not begun after `read` samples, the order is this one."""
        last = self.generations[-1] if self.generations else None
        if last is not None and last.shards.tolist() == shards:
            return
        first, epoch = 0, 0
        if last is not None:
            epochs = -(-max(0, read - last.first) // last.order.total)
            first, epoch = last.first + epochs * last.order.total, last.epoch + epochs
            if epochs == 0:
                self.generations.pop()
        self.generations.append(_Generation(first, epoch, order, np.asarray(shards, dtype=np.int64)))

    def spots(self, indices: I64) -> Spots:
        if len(self.generations) == 1:
            return self.generations[0].spots(indices)
        result = Spots.empty(len(indices))
        which = np.searchsorted([g.first for g in self.generations], indices, side="right") - 1
        for number in np.unique(which).tolist():
            chosen = which == number
            result.put(chosen, self.generations[number].spots(indices[chosen]))
        return result

    def indices(self, shard: int, numbers: I64, epoch: int) -> I64 | None:
        """Which of the source's samples these are in an epoch; None if that epoch does not have them."""
        found = self.generations[bisect_right([g.epoch for g in self.generations], epoch) - 1]
        at = np.flatnonzero(found.shards == shard)
        if not at.size:
            return None
        samples = found.order.extent(int(at[0]))[0] + numbers
        return found.order.positions(samples, epoch) - found.epoch * found.order.total + found.first

    def is_settled(self, epoch: int) -> bool:
        """Whether every later epoch has the shards of this one."""
        return epoch >= self.generations[-1].epoch


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A segment: its blend, and how much of each of its sources had been read before it."""

    begin: int
    sources: list[str]
    blend: Blend
    starts: list[int]


class Timeline:
    """The order under a plan's segments.

    Args:
        segments: in order, the first from position 0 on.
        shards: of the run, by number.
        block_samples: samples that stay together.
        window_blocks: blocks among which samples are permuted.
    """

    def __init__(
        self, segments: Sequence[Segment], shards: Sequence[SourceShard], *, block_samples: int, window_blocks: int
    ) -> None:
        self._shards = shards
        self._walks: dict[str, _Walk] = {}
        self._stretches: list[_Stretch] = []
        self._reachable: list[frozenset[int]] = []  # by segment: in it or in a later one
        self._chunks: OrderedDict[int, Spots] = OrderedDict()
        read: dict[str, int] = {}
        for segment in segments:
            read |= self._read_in_last(segment.from_position)
            members = {share.source: self._members(share.source, segment.num_shards) for share in segment.mix}
            for name, numbers in members.items():
                sizes = tuple(shards[number].samples for number in numbers)
                order = Order(sizes, source_seed(segment.seed, name), block_samples, window_blocks)
                self._walks.setdefault(name, _Walk()).extend(numbers, order, read.get(name, 0))
            blend = Blend([share.weight for share in segment.mix], segment.seed)
            starts = [read.get(name, 0) for name in members]
            self._stretches.append(_Stretch(segment.from_position, list(members), blend, starts))
            self._reachable.append(frozenset(n for numbers in members.values() for n in numbers if shards[n].samples))
        for number in reversed(range(len(segments) - 1)):
            self._reachable[number] |= self._reachable[number + 1]
        self._begins = [stretch.begin for stretch in self._stretches]

    @property
    def samples_per_epoch(self) -> int:
        """Samples of all shards that the last segment draws from."""
        return sum(self._shards[number].samples for number in self._reachable[-1])

    def spots(self, positions: I64) -> Spots:
        """Where the samples at raw positions lie. In chunks: one sample costs what thousands cost, milliseconds."""
        numbers = positions // _CHUNK_POSITIONS
        if numbers.size and (numbers == numbers[0]).all():  # as a rule
            return self._chunk(int(numbers[0])).part(positions - numbers[0] * _CHUNK_POSITIONS)
        result = Spots.empty(len(positions))
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            result.put(chosen, self._chunk(number), positions[chosen] - number * _CHUNK_POSITIONS)
        return result

    def shards_of(self, positions: I64) -> I64:
        """The shards at raw positions."""
        return self.spots(positions).shards

    def shards_from(self, position: int) -> frozenset[int]:
        """Shards with samples that may come at or after a raw position."""
        return self._reachable[bisect_right(self._begins, position) - 1]

    def positions_of(self, shard: int, numbers: I64, until: int) -> Reads:
        """Every time that samples of a shard come before a raw position."""
        name, found = self._shards[shard].source, Reads.none()
        walk = self._walks.get(name)
        for epoch in count():
            indices = walk.indices(shard, numbers, epoch) if walk is not None else None
            if walk is None or (indices is None and walk.is_settled(epoch)):
                return found
            if indices is not None:
                came, positions = self._positions(name, indices)
                if not came.any() and indices.min() >= self._last_index(name):
                    return found
                if positions.size and positions.min() >= until:
                    return found
                wanted = positions < until
                epochs = np.full(int(wanted.sum()), epoch, dtype=np.int64)
                found = found.and_more(Reads(epochs, numbers[came][wanted], positions[wanted]))
        raise AssertionError("epochs do not end")

    def _positions(self, name: str, indices: I64) -> tuple[Bools, I64]:
        """Which of a source's samples come at all (it may leave before), and where."""
        came, positions = np.zeros(len(indices), dtype=np.bool_), np.empty_like(indices)
        for number, stretch in enumerate(self._stretches):
            if name in stretch.sources:
                source = stretch.sources.index(name)
                end = self._end_index(number, source)
                inside = (indices >= stretch.starts[source]) & (indices < end)
                local = stretch.blend.positions(source, indices[inside] - stretch.starts[source])
                positions[inside] = stretch.begin + local
                came |= inside
        return came, positions[came]

    def _end_index(self, number: int, source: int) -> int:
        """How much of a source has been read at the end of a stretch."""
        stretch = self._stretches[number]
        if number + 1 == len(self._stretches):
            return 1 << 62
        return stretch.starts[source] + stretch.blend.counts(self._begins[number + 1] - stretch.begin)[source]

    def _last_index(self, name: str) -> int:
        """How much of a source is ever read."""
        last = max(number for number, stretch in enumerate(self._stretches) if name in stretch.sources)
        return self._end_index(last, self._stretches[last].sources.index(name))

    def _read_in_last(self, until: int) -> dict[str, int]:
        """How much of each source of the last stretch is read before a position."""
        if not self._stretches:
            return {}
        last = self._stretches[-1]
        counts = last.blend.counts(until - last.begin)
        return {name: start + more for name, start, more in zip(last.sources, last.starts, counts, strict=True)}

    def _members(self, source: str, num_shards: int) -> list[int]:
        return [number for number in range(num_shards) if self._shards[number].source == source]

    def _chunk(self, number: int) -> Spots:
        if number not in self._chunks:
            begin = number * _CHUNK_POSITIONS
            self._chunks[number] = self._found(np.arange(begin, begin + _CHUNK_POSITIONS, dtype=np.int64))
            if len(self._chunks) > _KEPT_CHUNKS:
                self._chunks.popitem(last=False)
        return self._chunks[number]

    def _found(self, positions: I64) -> Spots:
        result = Spots.empty(len(positions))
        which = np.searchsorted(self._begins, positions, side="right") - 1
        for number in np.unique(which).tolist():
            stretch = self._stretches[number]
            inside = np.flatnonzero(which == number)
            sources, counts = stretch.blend.sources(positions[inside] - stretch.begin)
            for source in np.unique(sources).tolist():
                mine = sources == source
                indices = counts[mine] + stretch.starts[source]
                result.put(inside[mine], self._walks[stretch.sources[source]].spots(indices))
        return result


def source_seed(seed: int, source: str) -> int:
    """Of a source's own order: sources of equal size must not be walked in step."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{source}".encode()).digest()[:8], "little")
