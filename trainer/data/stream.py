"""The data as the loop sees it: batches of tokens from a raw position on, read ahead in whole blocks.

torchdata's StatefulDataLoader is the loader around our own stateful sampler; the cursor that a checkpoint keeps is ours
(its own state takes seconds to a minute to restore at a deep position, and ties a run to its worker count).
"""

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.contract.config import DataConfig
from trainer.contract.plan import Quarantine, Segment, SkipRange
from trainer.data.cursor import Cursor, Take
from trainer.data.errors import DataError, ExhaustedError, TokenRangeError
from trainer.data.formats import Tokens, read_tokens
from trainer.data.loader import batches_of
from trainer.data.manifest import DataManifest, Place, load_manifest
from trainer.data.order import I64, Order

TokenBatch = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch: tokens (B, T+1); per sequence its raw position and shard; the raw range [begin, end) it used up."""

    tokens: TokenBatch
    positions: I64
    shards: I64
    begin: int
    end: int


class _Source:
    """Samples of a set of shards: sample i of a shard is tokens [iT, iT + T + 1), so that inputs and targets tile."""

    def __init__(self, url: str, config: DataConfig, sample_tokens: int) -> None:
        self.place = Place.of(url, config.storage_options)
        self.manifest = load_manifest(self.place, config)
        self.sample_tokens = sample_tokens
        self.shard_samples = tuple(max(0, (s.tokens - 1) // sample_tokens) for s in self.manifest.shards)
        if not sum(self.shard_samples):
            raise DataError(
                f"{url}: no shard holds even one sample of {sample_tokens + 1} tokens",
                "prepare more data, or lower batch.sequence_tokens",
            )

    def read(self, shard: int, first: int, count: int) -> Tokens:
        """The tokens of samples [first, first + count) of a shard, unchecked, in its own dtype."""
        entry, length = self.manifest.shards[shard], self.sample_tokens
        path = self.place.path(entry.name)
        return read_tokens(self.place.fs, path, entry.layout, first * length, count * length + 1)

    def check(self, rows: TokenBatch, shards: I64, numbers: I64) -> None:
        """Only what is handed out is judged: a bad sample that is skipped stops nobody.

        Raises:
            TokenRangeError: a token lies outside the vocabulary.
        """
        bad = (rows >= self.manifest.vocab_size) | (rows < 0)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            name = self.manifest.shards[int(shards[row])].name
            raise TokenRangeError(name, int(numbers[row]), int(rows[row, column]), self.manifest.vocab_size)


class DataStream:
    """Training data from a raw position on, under a plan's skips and quarantines.

    Args:
        config: the data section.
        sample_tokens: T, inputs of a sample; a row of a batch has T + 1 tokens.
        segments: the plan's; empty means one segment as configured.
        skips: raw ranges that are not read where they lie.
        quarantines: shards that are not read from a position on.
        position: where to begin.
        planned_samples: raw position from which deferred samples are read; None: there are none.

    Raises:
        DataError: the data is not there, not whole, or not what the plan's segments were made for.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        sample_tokens: int,
        segments: tuple[Segment, ...] = (),
        skips: tuple[SkipRange, ...] = (),
        quarantines: tuple[Quarantine, ...] = (),
        position: int = 0,
        planned_samples: int | None = None,
    ) -> None:
        self._source = _Source(config.train, config, sample_tokens)
        self.manifest: DataManifest = self._source.manifest
        seed = _seed_of(segments, self.manifest, config, sample_tokens)
        self._order = Order(self._source.shard_samples, seed, config.block_samples, config.window_blocks)
        self._lookup = _Lookup(self._order)
        self._blocks = _BlockCache(self._source, self._order, config)
        shards = frozenset(number for number, samples in enumerate(self._source.shard_samples) if samples)
        self._cursor = Cursor(self._shard_of, position, planned_samples, shards)
        self._cursor.apply(skips, quarantines)
        self._wanted = 0
        self._batches = batches_of(self._take, self._fetch)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch."""
        return self._order.total

    @property
    def shard_samples(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return self._source.shard_samples

    @property
    def position(self) -> int:
        """The raw cursor: the first position that is not consumed."""
        return self._cursor.position

    def next_batch(self, sequences: int) -> Batch:
        """The next batch.

        Raises:
            DataError: a shard is missing or damaged, or holds a token outside the vocabulary.
        """
        self._wanted = sequences
        return next(self._batches)

    def apply(self, *, skips: tuple[SkipRange, ...], quarantines: tuple[Quarantine, ...]) -> None:
        """Another plan, from the current position on."""
        self._cursor.apply(skips, quarantines)

    def close(self) -> None:
        """Stop reading ahead."""
        self._blocks.close()

    def _shard_of(self, positions: I64) -> I64:
        return self._order.shards_of(self._lookup.samples(positions))[0]

    def _take(self) -> Take:
        return self._cursor.take(self._wanted)

    def _fetch(self, take: Take) -> Batch:
        tokens = self._blocks.rows(self._lookup.samples(take.sources))
        self._read_ahead()
        return Batch(tokens, take.positions, take.shards, take.begin, take.end)

    def _read_ahead(self) -> None:
        """Begin to read what the plan takes next, and nothing that it leaves out."""
        if self._blocks.is_remote:
            try:
                upcoming = self._cursor.peek(self._blocks.ahead_samples)
            except ExhaustedError:
                return  # this batch is sound; the next one says so
            self._blocks.read_ahead(self._lookup.samples(upcoming.sources))


_CHUNK_POSITIONS = 4096
_KEPT_CHUNKS = 8


class _Lookup:
    """The order in chunks of positions: a call costs milliseconds for one sample as for thousands."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._chunks: OrderedDict[int, I64] = OrderedDict()

    def samples(self, positions: I64) -> I64:
        """As `Order.samples`."""
        result = np.empty_like(positions)
        numbers = positions // _CHUNK_POSITIONS
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            result[chosen] = self._chunk(number)[positions[chosen] - number * _CHUNK_POSITIONS]
        return result

    def _chunk(self, number: int) -> I64:
        if number not in self._chunks:
            begin = number * _CHUNK_POSITIONS
            self._chunks[number] = self._order.samples(np.arange(begin, begin + _CHUNK_POSITIONS, dtype=np.int64))
            if len(self._chunks) > _KEPT_CHUNKS:
                self._chunks.popitem(last=False)
        return self._chunks[number]


_Unit = tuple[int, int]  # (block, shard): a block that spans shards is read one by one, so that none drags in another


class _BlockCache:
    """Whole blocks in memory: those in use, and those read ahead where the place is remote."""

    def __init__(self, source: _Source, order: Order, config: DataConfig) -> None:
        self._source = source
        self._order = order
        self._size = config.block_samples
        self._most = 2 * (2 * config.window_blocks + config.read_ahead_blocks + 2)
        self._units: OrderedDict[_Unit, Tokens | Future[Tokens]] = OrderedDict()
        self.ahead_samples = config.read_ahead_blocks * config.block_samples
        self.is_remote = not _is_local(source.place)
        self._pool = ThreadPoolExecutor(4, "read-ahead") if self.is_remote else None

    def rows(self, samples: I64) -> TokenBatch:
        """One row of T + 1 tokens for each sample number.

        Raises:
            DataError: a shard is missing or damaged, or holds a token outside the vocabulary.
        """
        length = self._source.sample_tokens
        result = np.empty((len(samples), length + 1), dtype=np.int64)
        shards, numbers = self._order.shards_of(samples)
        units = self._units_of(samples)
        for row, (unit, number) in enumerate(zip(units, numbers.tolist(), strict=True)):
            begin = (number - self._extent(unit)[0]) * length
            result[row] = self._tokens(unit)[begin : begin + length + 1]
        self._source.check(result, shards, numbers)
        return result

    def read_ahead(self, samples: I64) -> None:
        """Begin to read the blocks of these samples."""
        if self._pool is None:
            return
        for unit in dict.fromkeys(self._units_of(samples)):
            if unit not in self._units:
                self._keep(unit, self._pool.submit(self._read, unit))

    def close(self) -> None:
        """Stop the readers."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _units_of(self, samples: I64) -> list[_Unit]:
        shards, _ = self._order.shards_of(samples)
        return list(zip((samples // self._size).tolist(), shards.tolist(), strict=True))

    def _extent(self, unit: _Unit) -> tuple[int, int]:
        """Samples [first, last) of the shard that lie in the block."""
        block, shard = unit
        start, end = self._order.extent(shard)
        return max(block * self._size, start) - start, min((block + 1) * self._size, end) - start

    def _tokens(self, unit: _Unit) -> Tokens:
        found = self._units.get(unit)
        if found is None:
            found = self._read(unit)
            self._keep(unit, found)
        elif isinstance(found, Future):
            found = found.result()
            self._units[unit] = found
        self._units.move_to_end(unit)
        return found

    def _keep(self, unit: _Unit, tokens: "Tokens | Future[Tokens]") -> None:
        self._units[unit] = tokens
        while len(self._units) > self._most:
            self._units.popitem(last=False)

    def _read(self, unit: _Unit) -> Tokens:
        first, last = self._extent(unit)
        return self._source.read(unit[1], first, last - first)


def validation_batches(config: DataConfig, sample_tokens: int, sequences: int, batch: int) -> Iterator[TokenBatch]:
    """The held-out samples, the same every time: evenly spread over the validation shards, (up to batch, T + 1) each.

    Raises:
        DataError: there is no validation data, or it cannot be used.
    """
    if config.validation is None:
        raise DataError("no validation data is configured", "set data.validation")
    source = _Source(config.validation, config, sample_tokens)
    order = Order(source.shard_samples, config.seed, config.block_samples, config.window_blocks)
    count = min(sequences, order.total)
    samples = np.unique(np.linspace(0, order.total - 1, count).round().astype(np.int64))
    cache = _BlockCache(source, order, config)
    try:
        for begin in range(0, len(samples), batch):
            yield cache.rows(samples[begin : begin + batch])
    finally:
        cache.close()


def _seed_of(segments: tuple[Segment, ...], manifest: DataManifest, config: DataConfig, sample_tokens: int) -> int:
    if not segments:
        return config.seed
    if len(segments) > 1:
        raise DataError("a plan with several data segments", "this version reads one; finish the run with its own data")
    (segment,) = segments
    if segment.manifest != manifest.digest or segment.sample_tokens != sample_tokens:
        raise DataError(
            f"{config.train}: is not the data that this run began with (digest {manifest.digest[:12]}, plan "
            f"{segment.manifest[:12]})",
            "bring the data back, or start a new run",
        )
    return segment.seed


def _is_local(place: Place) -> bool:
    protocol = place.fs.protocol
    names = (protocol,) if isinstance(protocol, str) else tuple(protocol)
    return bool({"file", "local", "memory"} & set(names))
