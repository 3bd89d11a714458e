"""The order of the data: a pure function of (manifest, seed, epoch), reached at any position in constant time.

Samples are numbered through all shards and cut into blocks that lie together. Blocks are permuted, then samples within
windows of consecutive permuted blocks, so that a batch draws on few shards. A permutation is a keyed Feistel network of
6 rounds with cycle walking: no index in memory, and an inverse. (Measured in research: 6 rounds with a murmur-type mix
are indistinguishable from a true shuffle in window statistics; 5 rounds of a weaker mix were not.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SALTS = tuple(np.uint64((number * 0x9E3779B97F4A7C15) % 2**64) for number in range(1, 7))  # one for each round
_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)


def _mix(values: U64) -> U64:
    """The 64-bit finaliser of MurmurHash3."""
    values = (values ^ (values >> np.uint64(33))) * _MIX_1
    values = (values ^ (values >> np.uint64(33))) * _MIX_2
    return values ^ (values >> np.uint64(33))


def _key(*parts: int) -> np.uint64:
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = _mix(key + _GOLDEN + np.asarray([part % 2**64], dtype=np.uint64))
    return np.uint64(key[0])


def _half_bits(size: int) -> int:
    return max(1, ((max(size, 2) - 1).bit_length() + 1) // 2)


def _feistel(values: U64, keys: U64, half: int, *, inverse: bool) -> U64:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for number in reversed(_SALTS) if inverse else _SALTS:
        salt = keys + number
        if inverse:
            left, right = right ^ (_mix(left ^ salt) & mask), left
        else:
            left, right = right, left ^ (_mix(right ^ salt) & mask)
    return (left << shift) | right


def permute(values: U64, size: int, keys: U64, *, inverse: bool = False) -> U64:
    """A keyed permutation of [0, size), or its inverse, at every value; one key for each value.

    Cycle walking: the network permutes a power of four of at most 4 x size; what falls outside goes through again.
    """
    half = _half_bits(size)
    result = _feistel(values, keys, half, inverse=inverse)
    limit = np.uint64(size)
    outside = np.flatnonzero(result >= limit)
    while outside.size:
        result[outside] = _feistel(result[outside], keys[outside], half, inverse=inverse)
        outside = outside[result[outside] >= limit]
    return result


@dataclass(frozen=True, slots=True)
class Order:
    """The order of one set of shards.

    Args:
        shard_samples: samples of each shard, by shard index.
        seed: of the permutation.
        block_samples: samples that stay together.
        window_blocks: blocks among which samples are permuted.
    """

    shard_samples: tuple[int, ...]
    seed: int
    block_samples: int
    window_blocks: int
    total: int = field(init=False)
    _starts: I64 = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        starts = np.concatenate([[0], np.cumsum(np.asarray(self.shard_samples, dtype=np.int64))])
        object.__setattr__(self, "_starts", starts)
        object.__setattr__(self, "total", int(starts[-1]))

    def samples(self, positions: Sequence[int] | I64) -> I64:
        """Sample numbers (through all shards) at raw positions, epochs concatenated."""
        return self._map(np.asarray(positions, dtype=np.int64), inverse=False)

    def positions(self, samples: Sequence[int] | I64, epoch: int) -> I64:
        """The inverse: raw positions at which an epoch reads these samples."""
        numbers = np.asarray(samples, dtype=np.int64) + epoch * self.total
        return self._map(numbers, inverse=True) + epoch * self.total

    def extent(self, shard: int) -> tuple[int, int]:
        """Sample numbers [first, last) of a shard."""
        return int(self._starts[shard]), int(self._starts[shard + 1])

    def shards_of(self, samples: I64) -> tuple[I64, I64]:
        """(shard index, sample within the shard) of sample numbers."""
        shards = np.searchsorted(self._starts, samples, side="right").astype(np.int64) - 1
        return shards, samples - self._starts[shards]

    def _map(self, positions: I64, *, inverse: bool) -> I64:
        result = np.empty_like(positions)
        epochs = positions // self.total
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            local = (positions[chosen] % self.total).astype(np.uint64)
            result[chosen] = self._map_epoch(local, int(epoch), inverse=inverse).astype(np.int64)
        return result

    def _map_epoch(self, values: U64, epoch: int, *, inverse: bool) -> U64:
        """Within an epoch. The last, shorter block keeps its place at the end; all others are permuted."""
        block = np.uint64(self.block_samples)
        num_blocks = self.total // self.block_samples
        result = values.copy()
        inner = values < np.uint64(num_blocks * self.block_samples)
        if not inner.any():
            return result
        chosen = values[inner]
        if inverse:
            slots = self._blocks(chosen // block, num_blocks, epoch, inverse=True)
            result[inner] = self._windows(slots * block + chosen % block, num_blocks, epoch, inverse=True)
        else:
            within = self._windows(chosen, num_blocks, epoch, inverse=False)
            blocks = self._blocks(within // block, num_blocks, epoch, inverse=False)
            result[inner] = blocks * block + within % block
        return result

    def _blocks(self, slots: U64, num_blocks: int, epoch: int, *, inverse: bool) -> U64:
        keys = np.full(slots.shape, _key(self.seed, epoch, 1), dtype=np.uint64)
        return permute(slots, num_blocks, keys, inverse=inverse)

    def _windows(self, values: U64, num_blocks: int, epoch: int, *, inverse: bool) -> U64:
        """Permute samples within windows; the last window may be shorter."""
        window = self.window_blocks * self.block_samples
        numbers = values // np.uint64(window)
        keys = _mix(_key(self.seed, epoch, 2) + numbers * _GOLDEN)
        full = (num_blocks // self.window_blocks) * window
        result = np.empty_like(values)
        for inside, size in ((values < np.uint64(full), window), (values >= np.uint64(full), None)):
            if inside.any():
                length = size or num_blocks * self.block_samples - full
                base = numbers[inside] * np.uint64(window)
                result[inside] = base + permute(values[inside] - base, length, keys[inside], inverse=inverse)
        return result
