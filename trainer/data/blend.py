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
        sources, indices = np.empty_like(positions), np.empty_like(positions)
        periods = positions // PERIOD
        for period in np.unique(periods).tolist():
            chosen = periods == period
            slots = positions[chosen] - period * PERIOD
            pattern, ranks = self._pattern(period)
            sources[chosen] = pattern[slots]
            indices[chosen] = np.asarray(self._quotas(period), dtype=np.int64)[pattern[slots]] + ranks[slots]
        return sources, indices

    def counts(self, position: int) -> list[int]:
        """How many samples of each source come before a position."""
        period, slot = divmod(position, PERIOD)
        if len(self._weights) == 1:
            return [position]
        seen = np.bincount(self._pattern(period)[0][:slot], minlength=len(self._weights)).tolist()
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
            slots = np.flatnonzero(self._pattern(period)[0] == source)
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

    def _pattern(self, period: int) -> tuple[I64, I64]:
        """The source at each slot of a period, and how often it came before within the period."""
        sizes = np.subtract(self._quotas(period + 1), self._quotas(period))
        keys = np.full(PERIOD, key(self._seed, period, 3), dtype=np.uint64)
        slots = permute(np.arange(PERIOD, dtype=np.uint64), PERIOD, keys).astype(np.int64)
        pattern = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)[slots]
        in_order = np.argsort(pattern, kind="stable")
        ranks = np.empty(PERIOD, dtype=np.int64)
        ranks[in_order] = np.arange(PERIOD) - (np.cumsum(sizes) - sizes)[pattern[in_order]]
        return pattern, ranks
