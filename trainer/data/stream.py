"""The data as the loop sees it: batches of tokens from a raw position on, under a plan.

torchdata's StatefulDataLoader is the loader around our own stateful sampler; the cursor that a checkpoint keeps is ours
(its own state takes seconds to a minute to restore at a deep position, and ties a run to its worker count).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.contract.config import DataConfig
from trainer.contract.plan import Quarantine, Segment, SkipRange
from trainer.data.book import Book, bring_up, segments_of, timeline_of
from trainer.data.cursor import Cursor, Take
from trainer.data.errors import DataError, ExhaustedError
from trainer.data.loader import batches_of
from trainer.data.manifest import Place, load_manifest
from trainer.data.order import I64, Order
from trainer.data.patience import Patience
from trainer.data.reading import BlockCache, Shelf, TokenBatch
from trainer.data.timeline import Spots, Timeline


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch: tokens (B, T+1); per sequence its raw position and shard; the raw range [begin, end) it used up."""

    tokens: TokenBatch
    positions: I64
    shards: I64
    begin: int
    end: int


class DataStream:
    """Training data from a raw position on, under a plan's segments, skips and quarantines.

    Args:
        config: the data section.
        sample_tokens: T, inputs of a sample; a row of a batch has T + 1 tokens.
        book: the shards of the run, compared with what is there (`bring_up`); None: those that are there.
        segments: the plan's; empty means one segment as configured.
        skips: raw ranges that are not read where they lie.
        quarantines: shards that are not read from a position on.
        position: where to begin.
        planned_samples: raw position from which deferred samples are read; None: there are none.
        cache_dir: where blocks of remote shards are kept on local disk; None: nowhere.
        patience: with outages of the storage; None: as configured.

    Raises:
        DataError: the data is not there, not whole, or not what the plan's segments were made for.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        sample_tokens: int,
        book: Book | None = None,
        segments: tuple[Segment, ...] = (),
        skips: tuple[SkipRange, ...] = (),
        quarantines: tuple[Quarantine, ...] = (),
        position: int = 0,
        planned_samples: int | None = None,
        cache_dir: Path | None = None,
        patience: Patience | None = None,
    ) -> None:
        book = book if book is not None else bring_up(config, None)
        self.segments = segments_of(segments, book, config, sample_tokens)
        self.vocab_size, self.shard_names = book.vocab_size, book.names()
        shelf = _shelf(book, config, sample_tokens)
        self.shard_samples = shelf.samples
        self._timeline = timeline_of(self.segments, book, config)
        self._blocks = BlockCache(shelf, config, cache_dir=cache_dir, patience=patience)
        self._cursor = Cursor(self._timeline.shards_of, position, planned_samples, self._timeline.shards_from)
        self._cursor.apply(skips, quarantines)
        self._ahead = _Ahead(self._cursor, self._timeline, self._blocks.ahead_samples if self._blocks.is_remote else 0)
        self._wanted = 0
        self._batches = batches_of(self._take, self._fetch)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of all shards that are read now."""
        return self._timeline.samples_per_epoch

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
        self._ahead.forget()

    def close(self) -> None:
        """Stop reading ahead."""
        self._blocks.close()

    def _take(self) -> tuple[Take, Spots]:
        return self._ahead.take(self._wanted)

    def _fetch(self, taken: tuple[Take, Spots]) -> Batch:
        take, spots = taken
        tokens = self._blocks.rows(spots)
        if self._blocks.is_remote:
            self._blocks.read_ahead(self._ahead.upcoming())
        return Batch(tokens, take.positions, take.shards, take.begin, take.end)


_LOOKED_UP = 2048  # samples


class _Ahead:
    """What the cursor takes next and where that lies, for many samples at once: for one it costs about as much."""

    def __init__(self, cursor: Cursor, timeline: Timeline, upcoming: int) -> None:
        """`upcoming` samples are known beyond what is taken, if the plan has them."""
        self._cursor = cursor
        self._timeline = timeline
        self._upcoming = upcoming
        self.forget()

    def forget(self) -> None:
        """The plan is another one."""
        self._known, self._spots, self._used = 0, Spots.empty(0), 0

    def take(self, count: int) -> tuple[Take, Spots]:
        """As `Cursor.take`, and where the samples lie."""
        if self._known - self._used < count + self._upcoming:
            self._look_up(count)
        first, self._used = self._used, self._used + count
        take = self._found.part(first, self._used, self._cursor.position)
        self._cursor.position = take.end
        return take, self._spots.part(slice(first, self._used))

    def upcoming(self) -> Spots:
        """Where the samples lie that are taken next."""
        return self._spots.part(slice(self._used, self._used + self._upcoming))

    def _look_up(self, count: int) -> None:
        try:
            self._found = self._cursor.peek(count + self._upcoming + _LOOKED_UP)
        except ExhaustedError:  # further on; a batch that is still sound is handed out
            self._found = self._cursor.peek(count)
        self._spots = self._timeline.spots(self._found.sources)
        self._known, self._used = len(self._found.positions), 0


def validation_batches(
    config: DataConfig,
    sample_tokens: int,
    sequences: int,
    batch: int,
    *,
    cache_dir: Path | None = None,
    patience: Patience | None = None,
) -> Iterator[TokenBatch]:
    """The held-out samples, the same every time: evenly spread over the validation shards, (up to batch, T + 1) each.

    Raises:
        DataError: there is no validation data, or it cannot be used.
    """
    if config.validation is None:
        raise DataError("no validation data is configured", "set data.validation")
    place = Place.of(config.validation, config.storage_options)
    patience = patience or Patience(config.timeout_s)
    manifest = patience.outlast(lambda _: load_manifest(place, config))
    names = [shard.name for shard in manifest.shards]
    shelf = Shelf([place] * len(names), manifest.shards, names, manifest.vocab_size, sample_tokens)
    order = Order(shelf.samples, config.seed, config.block_samples, config.window_blocks)
    if not order.total:
        what = f"{config.validation}: no shard holds even one sample of {sample_tokens + 1} tokens"
        raise DataError(what, "prepare more data, or lower batch.sequence_tokens")
    samples = np.unique(np.linspace(0, order.total - 1, min(sequences, order.total)).round().astype(np.int64))
    shards, numbers = order.shards_of(samples)
    spots = Spots(shards, numbers, *order.block_extents(samples, shards), np.zeros_like(shards))
    cache = BlockCache(shelf, config, cache_dir=cache_dir, patience=patience)
    try:
        for begin in range(0, len(samples), batch):
            yield cache.rows(spots.part(slice(begin, begin + batch)))
    finally:
        cache.close()


def _shelf(book: Book, config: DataConfig, sample_tokens: int) -> Shelf:
    """Sources that are no longer configured are looked for where they were last: a rollback may go back to them."""
    urls = book.places | {source.source: source.url for source in config.sources}
    places = {name: Place.of(url, config.storage_options) for name, url in urls.items()}
    shards = [row.shard for row in book.shards]
    return Shelf([places[row.source] for row in book.shards], shards, book.names(), book.vocab_size, sample_tokens)
