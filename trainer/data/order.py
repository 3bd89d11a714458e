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
Bools = npt.NDArray[np.bool_]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SALTS = tuple(np.uint64((number * 0x9E3779B97F4A7C15) % 2**64) for number in range(1, 7))  # one for each round
_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)


def _mix(values: U64) -> U64:
    """The 64-bit finaliser of MurmurHash3."""
    values = (values ^ (values >> np.uint64(33))) * _MIX_1
    values = (values ^ (values >> np.uint64(33))) * _MIX_2
    return values ^ (values >> np.uint64(33))


def key(*parts: "int | I64") -> U64:
    """Keys from several numbers, or arrays of them; the last says what a key is for."""
    mixed = np.zeros(1, dtype=np.uint64)
    for part in parts:
        number = np.asarray([part % 2**64], dtype=np.uint64) if isinstance(part, int) else part.astype(np.uint64)
        mixed = _mix(mixed + _GOLDEN + number)
    return mixed


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
        base = epoch * self.total
        return self._map(np.asarray(samples, dtype=np.int64) + base, inverse=True) + base

    def extent(self, shard: int) -> tuple[int, int]:
        """Sample numbers [first, last) of a shard."""
        return int(self._starts[shard]), int(self._starts[shard + 1])

    def shards_of(self, samples: I64) -> tuple[I64, I64]:
        """(shard index, sample within the shard) of sample numbers."""
        shards = np.searchsorted(self._starts, samples, side="right").astype(np.int64) - 1
        return shards, samples - self._starts[shards]

    def block_extents(self, samples: I64, shards: I64) -> tuple[I64, I64]:
        """Samples [first, last) of its shard that lie in the block of each sample."""
        starts, begins = self._starts[shards], samples // self.block_samples * self.block_samples
        ends = np.minimum(begins + self.block_samples, self._starts[shards + 1])
        return np.maximum(begins, starts) - starts, ends - starts

    def _map(self, positions: I64, *, inverse: bool) -> I64:
        """All epochs at once, each under its own keys. The last, shorter block keeps its place at the end."""
        epochs = positions // self.total
        values = (positions - epochs * self.total).astype(np.uint64)
        end = self.total // self.block_samples * self.block_samples
        tail = values >= np.uint64(end)
        result = np.empty_like(values)
        result[tail] = self._tail(values[tail], epochs[tail], end, inverse=inverse)
        if end:
            result[~tail] = self._inner(values[~tail], epochs[~tail], inverse=inverse)
        return result.astype(np.int64)

    def _inner(self, values: U64, epochs: I64, *, inverse: bool) -> U64:
        block = np.uint64(self.block_samples)
        if inverse:
            slots = self._blocks(values // block, epochs, inverse=True)
            return self._windows(slots * block + values % block, epochs, inverse=True)
        within = self._windows(values, epochs, inverse=False)
        return self._blocks(within // block, epochs, inverse=False) * block + within % block

    def _keys(self, epochs: I64, purpose: int) -> U64:
        if epochs.size and (epochs == epochs[0]).all():  # as a rule
            return np.full(epochs.shape, key(self.seed, int(epochs[0]), purpose), dtype=np.uint64)
        different, which = np.unique(epochs, return_inverse=True)
        return key(self.seed, different, purpose)[which]

    def _tail(self, values: U64, epochs: I64, begin: int, *, inverse: bool) -> U64:
        """Permute the samples of the last, shorter block among themselves."""
        base = np.uint64(begin)
        return base + permute(values - base, self.total - begin, self._keys(epochs, 4), inverse=inverse)

    def _blocks(self, slots: U64, epochs: I64, *, inverse: bool) -> U64:
        return permute(slots, self.total // self.block_samples, self._keys(epochs, 1), inverse=inverse)

    def _windows(self, values: U64, epochs: I64, *, inverse: bool) -> U64:
        """Permute samples within windows; the last window may be shorter."""
        window = self.window_blocks * self.block_samples
        numbers = values // np.uint64(window)
        keys = _mix(self._keys(epochs, 2) + numbers * _GOLDEN)
        end = self.total // self.block_samples * self.block_samples
        full = end // window * window
        result = np.empty_like(values)
        for inside, length in ((values < np.uint64(full), window), (values >= np.uint64(full), end - full)):
            if inside.any():
                base = numbers[inside] * np.uint64(window)
                result[inside] = base + permute(values[inside] - base, length, keys[inside], inverse=inverse)
        return result
