"""Which source a raw position reads, where several are blended: a pure function of (weights, seed, position).

Positions are cut into periods. Of x positions (whole periods) the heaviest source gets floor(x w1 / W), of the rest the
next heaviest its part of what is left of the weights, and so on; the last gets what remains. So no count ever falls,
nothing drifts, and of K sources none is ever more than 1 + ln K samples away from its exact share (the i-th is off by
at most the i-th harmonic number); after a whole number of common denominators there is no difference at all.
Within a period the sources come in an order drawn by the keyed permutation, so that no rank of a batch is tied to one
source. A source's own samples are counted up as they come: what it has read by then is a prefix of its own order.
Weights are taken as the decimal fractions they are written as, so that no rounding differs from machine to machine.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from trainer.data.order import I64, key, permute

PERIOD = 256
_MOST_OFF = 8  # 1 + ln K of a thousand sources


class Blend:
    """The schedule of sources with these weights; positions count from its own beginning."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = [Fraction(str(weight)) for weight in weights]
        scale = lcm(*(share.denominator for share in shares))
        self._weights = [int(share * scale) for share in shares]
        self._heaviest_first = sorted(range(len(weights)), key=lambda number: -shares[number])
        self._seed = seed

    def sources(self, positions: I64) -> tuple[I64, I64]:
        """(source, how many samples of it came before) at each position."""
        if len(self._weights) == 1:
            return np.zeros_like(positions), positions
        periods, which = np.unique(positions // PERIOD, return_inverse=True)
        sources, indices = self._patterns(periods)
        slots = positions % PERIOD
        return sources[which, slots], indices[which, slots]

    def counts(self, position: int) -> list[int]:
        """How many samples of each source come before a position."""
        period, slot = divmod(position, PERIOD)
        if len(self._weights) == 1:
            return [position]
        seen = np.bincount(self._patterns(np.asarray([period]))[0][0, :slot], minlength=len(self._weights)).tolist()
        return [quota + count for quota, count in zip(self._quotas(period), seen, strict=True)]

    def positions(self, source: int, indices: I64) -> I64:
        """The inverse: where a source's samples with these numbers come."""
        if len(self._weights) == 1:
            return indices
        found = np.empty_like(indices)
        in_order = np.argsort(indices)
        ordered, done = indices[in_order], 0
        while done < len(indices):
            period = self._period_of(source, int(indices[in_order[done]]))
            base, end = self._quotas(period)[source], self._quotas(period + 1)[source]
            stop = int(np.searchsorted(ordered, end))
            slots = np.flatnonzero(self._patterns(np.asarray([period]))[0][0] == source)
            mine = in_order[done:stop]
            found[mine] = period * PERIOD + slots[indices[mine] - base]
            done = stop
        return found

    def _period_of(self, source: int, index: int) -> int:
        earliest = (index - _MOST_OFF) * sum(self._weights) // self._weights[source]
        period = max(0, earliest // PERIOD - 1)
        while self._quotas(period + 1)[source] <= index:
            period += 1
        return period

    def _quotas(self, period: int) -> list[int]:
        """How many samples of each source come before a period."""
        counts = [0] * len(self._weights)
        left, weight_left = period * PERIOD, sum(self._weights)
        for number in self._heaviest_first:
            counts[number] = left * self._weights[number] // weight_left
            left -= counts[number]
            weight_left -= self._weights[number]
        return counts

    def _patterns(self, periods: I64) -> tuple[I64, I64]:
        """(period, slot) -> the source read there, and how many samples of it came before."""
        keys = np.repeat(key(self._seed, periods, 3), PERIOD)
        values = np.tile(np.arange(PERIOD, dtype=np.uint64), len(periods))
        slots = permute(values, PERIOD, keys).astype(np.int64).reshape(-1, PERIOD)
        quotas = np.asarray([self._quotas(period) for period in periods.tolist()], dtype=np.int64)
        sizes = np.asarray([self._quotas(period + 1) for period in periods.tolist()], dtype=np.int64) - quotas
        in_turn = np.stack([np.repeat(np.arange(len(row), dtype=np.int64), row) for row in sizes])
        sources = np.take_along_axis(in_turn, slots, 1)
        in_order = np.argsort(sources, axis=1, kind="stable")
        befores = quotas - (np.cumsum(sizes, axis=1) - sizes)
        indices = np.empty_like(sources)
        np.put_along_axis(indices, in_order, np.arange(PERIOD) + np.take_along_axis(befores, in_turn, 1), 1)
        return sources, indices
