"""Which raw positions a batch takes: skips jumped over, quarantined shards left out, deferred samples read at the end.

Pure. Positions are absolute, so that restarts and changes of batch or world size shift nothing. Nothing that is skipped
or quarantined is read where it lies. A skip with `then: defer` is read once the run is past its planned end: from
position `planned` on, the i-th position reads the i-th deferred one, so that a single-epoch run does not run dry; and
behind the last of them the raw order goes on where it was left, should the run be extended.
A skip must begin at or behind the cursor of the moment it is decided: then nothing that was read changes its meaning.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from trainer.contract.plan import Quarantine, SkipRange
from trainer.data.errors import ExhaustedError
from trainer.data.order import I64, Bools

ShardOf = Callable[[I64], I64]
ShardsFrom = Callable[[int], frozenset[int]]  # those that may come at or after a raw position


class Fate(IntEnum):
    """What a plan makes of a sample."""

    READ = 0
    DEFERRED = 1  # read, but at the end of the plan
    SKIPPED = 2
    QUARANTINED = 3


@dataclass(frozen=True, slots=True)
class Take:
    """A batch: the raw positions `[begin, end)` it used up, and for each sample where it lies in the raw order."""

    positions: I64
    sources: I64
    shards: I64
    begin: int
    end: int

    def part(self, first: int, last: int, begin: int) -> "Take":
        """Of its samples those in [first, last), at least one, as if taken alone at `begin`: one that ends a batch is
        never left out, so the cursor stands right behind it."""
        at = slice(first, last)
        return Take(self.positions[at], self.sources[at], self.shards[at], begin, int(self.positions[last - 1]) + 1)


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those that touch or overlap as one."""
    result: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


class Cursor:
    """Walks the raw order under a plan."""

    def __init__(
        self, shard_of: ShardOf, position: int = 0, planned: int | None = None,
        shards_from: ShardsFrom | None = None,
    ) -> None:  # fmt: skip
        self.position = position
        self._shard_of = shard_of
        self._planned = planned
        self._shards_from = shards_from  # None: not known
        self._skips: list[tuple[int, int]] = []
        self._deferred: I64 = np.empty(0, dtype=np.int64)
        self._quarantines: dict[int, int] = {}

    def apply(self, skips: tuple[SkipRange, ...], quarantines: tuple[Quarantine, ...]) -> None:
        """Take over a plan's skips and quarantines."""
        self._skips = merged([(skip.begin, skip.end) for skip in skips])
        self._quarantines = {}
        for quarantine in quarantines:
            known = self._quarantines.get(quarantine.shard, quarantine.from_position)
            self._quarantines[quarantine.shard] = min(known, quarantine.from_position)
        deferred = merged([(skip.begin, skip.end) for skip in skips if skip.then == "defer"])
        dropped = merged([(skip.begin, skip.end) for skip in skips if skip.then == "drop"])
        parts = [np.arange(begin, end, dtype=np.int64) for begin, end in deferred]
        values = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        for begin, end in dropped:
            values = values[(values < begin) | (values >= end)]
        self._deferred = values if self._planned is None else values[values < self._planned]

    def take(self, count: int) -> Take:
        """The next `count` samples; the cursor stands behind the last one.

        Raises:
            ExhaustedError: every shard is quarantined.
        """
        begin = self.position
        positions: list[I64] = []
        sources: list[I64] = []
        shards: list[I64] = []
        missing = count
        while missing:
            self._refuse_to_search_for_ever()
            candidates = self._run(missing)
            source = self.sources(candidates)
            shard = self._shard_of(source)
            wanted = ~self._quarantined(candidates, shard)
            positions.append(candidates[wanted])
            sources.append(source[wanted])
            shards.append(shard[wanted])
            missing -= int(wanted.sum())
        return Take(np.concatenate(positions), np.concatenate(sources), np.concatenate(shards), begin, self.position)

    def peek(self, count: int) -> Take:
        """What `take` would give; the cursor stays.

        Raises:
            ExhaustedError: every shard is quarantined.
        """
        position = self.position
        try:
            return self.take(count)
        finally:
            self.position = position

    def read_at(self, sources: I64, shards: I64) -> tuple[I64, I64]:
        """The inverse of `take`, for samples where they lie in the raw order: when each is read, and its `Fate`.

        Of those that are never read the position is the one at which they would have been.
        """
        planned = self._planned if self._planned is not None else 1 << 62
        late = np.searchsorted(self._deferred, sources)
        deferred = np.isin(sources, self._deferred) & (self._planned is not None)
        shifted = sources + np.where(sources >= planned, self._deferred.size, 0)
        positions = np.where(deferred, planned + late, shifted)
        fates = np.where(deferred, Fate.DEFERRED, Fate.READ).astype(np.int64)
        for begin, end in self._skips:
            fates[(positions >= begin) & (positions < end)] = Fate.SKIPPED
        fates[self._quarantined(positions, shards)] = Fate.QUARANTINED
        return positions, fates

    def _refuse_to_search_for_ever(self) -> None:
        if self._shards_from is None or not self._quarantines:
            return
        out = {shard for shard, from_position in self._quarantines.items() if from_position <= self.position}
        left = self._shards_from(self.position)
        if left <= out:
            raise ExhaustedError(
                f"all {len(left)} shards are quarantined at raw position {self.position}",
                "unquarantine some, or add other data",
            )

    def _run(self, most: int) -> I64:
        """Up to `most` positions in a row from here, jumping over skips first; the cursor moves behind them."""
        start = self.position
        for begin, end in self._skips:
            if begin <= start < end:
                start = end
        next_skip = next((begin for begin, _ in self._skips if begin > start), start + most)
        stop = min(start + most, next_skip)
        if self._planned is not None and start < self._planned:
            stop = min(stop, self._planned)
        self.position = stop
        return np.arange(start, stop, dtype=np.int64)

    def sources(self, positions: I64) -> I64:
        """Where in the raw order lies what is read at these: past the planned end, deferred positions come first."""
        if self._planned is None or not self._deferred.size:
            return positions
        index = positions - self._planned
        late = (index >= 0) & (index < self._deferred.size)
        result = np.where(index >= self._deferred.size, positions - self._deferred.size, positions)
        result[late] = self._deferred[index[late]]
        return result

    def _quarantined(self, positions: I64, shards: I64) -> Bools:
        out = np.zeros(positions.shape, dtype=np.bool_)
        for shard, from_position in self._quarantines.items():
            out |= (shards == shard) & (positions >= from_position)
        return out
