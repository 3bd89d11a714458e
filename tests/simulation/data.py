"""Which raw positions updates take under a plan: in whole stretches, not sample by sample.

The same rules as `trainer.data.cursor`: skips are jumped over, the blocks of a quarantined shard are left out from its
position on, and the cursor stands right behind the last sample that was taken. Past the plan's end raw positions go on
by the same rules (what is read there is the real cursor's business and not looked at here).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.contract.plan import Quarantine, SkipRange

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """Shards lie in blocks, one after another, again and again: shard s owns the blocks s, s + num_shards, ..."""

    block_samples: int
    num_shards: int

    def blocks(self, shard: int, begin: int, end: int) -> Iterator[Span]:
        """The shard's blocks that overlap [begin, end), cut to it."""
        round_samples = self.block_samples * self.num_shards
        first = shard * self.block_samples
        number = max(0, (begin - first - self.block_samples) // round_samples)
        while (at := first + number * round_samples) < end:
            low, high = max(at, begin), min(at + self.block_samples, end)
            if low < high:
                yield low, high
            number += 1


@dataclass(frozen=True, slots=True)
class Chunk:
    """Updates that took `[begin, end)` in all; `jumped` are the parts of it that were not read."""

    steps: int
    begin: int
    end: int
    jumped: tuple[Span, ...] = ()


class Walk:
    """The raw order under a plan."""

    def __init__(
        self, layout: Layout, batch: int, skips: tuple[SkipRange, ...], quarantines: tuple[Quarantine, ...]
    ) -> None:
        self._layout = layout
        self._batch = batch
        self._skips = sorted((skip.begin, skip.end) for skip in skips)
        self._quarantines = quarantines

    def chunks(self, position: int, steps: int) -> Iterator[Chunk]:
        """So many updates from a position on, as few chunks as give all of one chunk the same size."""
        while steps:
            blocked = self._next(position, position + steps * self._batch)
            whole = steps if blocked is None else min(steps, max(0, blocked[0] - position) // self._batch)
            if whole:
                yield Chunk(whole, position, position + whole * self._batch)
                position, steps = position + whole * self._batch, steps - whole
                continue
            end, jumped = self._one(position)
            yield Chunk(1, position, end, tuple(jumped))
            position, steps = end, steps - 1

    def _one(self, position: int) -> tuple[int, list[Span]]:
        missing, jumped = self._batch, []
        while (blocked := self._next(position, position + missing)) is not None:
            missing -= blocked[0] - position
            jumped.append(blocked)
            position = blocked[1]
        return position + missing, jumped

    def _next(self, begin: int, end: int) -> Span | None:
        """The first part that is left out of what begins in [begin, end), or holds `begin`."""
        found = [(max(b, begin), e) for b, e in self._skips if b < end and e > begin]
        for quarantine in self._quarantines:
            low = max(begin, quarantine.from_position)
            far = end + self._layout.block_samples * self._layout.num_shards
            found += [span for span in self._layout.blocks(quarantine.shard, low, far) if span[0] < end][:1]
        return min(found, default=None)
