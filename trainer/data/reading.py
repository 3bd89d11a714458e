"""From samples to tokens: whole blocks are read from wherever their shards lie, and kept while they are in use.

Sample i of a shard is tokens [iT, iT + T + 1), so that inputs and targets tile.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import structlog

from trainer.contract.config import DataConfig
from trainer.data.errors import DataUnreachableError, TokenRangeError
from trainer.data.formats import Tokens, read_tokens
from trainer.data.manifest import Place, Shard
from trainer.data.timeline import Spots

log = structlog.get_logger(__name__)

_FIRST_WAIT_S = 0.5
_MOST_WAIT_S = 30.0

TokenBatch = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shelf:
    """Where shards lie, by number. `names` are what people are shown; T is `sample_tokens`."""

    places: Sequence[Place]
    shards: Sequence[Shard]
    names: Sequence[str]
    vocab_size: int
    sample_tokens: int

    @property
    def samples(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(max(0, (shard.tokens - 1) // self.sample_tokens) for shard in self.shards)

    def is_remote(self, shard: int) -> bool:
        """Whether reading it may take long."""
        protocol = self.places[shard].fs.protocol
        names = (protocol,) if isinstance(protocol, str) else tuple(protocol)
        return not {"file", "local", "memory"} & set(names)

    def read(self, shard: int, first: int, count: int) -> Tokens:
        """The tokens of samples [first, first + count) of a shard, unchecked, in its own dtype."""
        place, entry, length = self.places[shard], self.shards[shard], self.sample_tokens
        return read_tokens(place.fs, place.path(entry.name), entry.layout, first * length, count * length + 1)

    def check(self, rows: TokenBatch, spots: Spots) -> None:
        """Only what is handed out is judged: a bad sample that is skipped stops nobody.

        Raises:
            TokenRangeError: a token lies outside the vocabulary.
        """
        bad = (rows >= self.vocab_size) | (rows < 0)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            name = self.names[int(spots.shards[row])]
            raise TokenRangeError(name, int(spots.numbers[row]), int(rows[row, column]), self.vocab_size)


_Unit = tuple[int, int, int]  # samples [first, last) of a shard: a block, or its part of one that spans shards


class Patience:
    """Tries again while a place does not answer, ever more rarely; what is missing or damaged is said at once."""

    def __init__(self, timeout_s: float, pause: Callable[[float], bool], clock: Callable[[], float]) -> None:
        """`pause` waits so many seconds and says whether there is no point in going on, as `Event.wait` does."""
        self._timeout_s = timeout_s
        self._pause = pause
        self._clock = clock

    def read(self, call: Callable[[], Tokens]) -> Tokens:
        """What the call returns.

        Raises:
            DataUnreachableError: there was no answer for `timeout_s` seconds.
            DataError: the data is missing or damaged.
        """
        deadline_s = self._clock() + self._timeout_s
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                return call()
            except DataUnreachableError as error:
                log.warning("data_unreachable", shard=error.shard, why=error.what, again_in_s=wait_s)
                if self._clock() + wait_s > deadline_s or self._pause(wait_s):
                    raise
            wait_s = min(2 * wait_s, _MOST_WAIT_S)


class BlockCache:
    """Whole blocks in memory: those in use, and those read ahead where the place is remote."""

    def __init__(self, shelf: Shelf, config: DataConfig) -> None:
        self._shelf = shelf
        self._closed = threading.Event()
        self._patience = Patience(config.timeout_s, self._closed.wait, time.monotonic)
        streams = len(config.sources)  # each source is in a window of its own
        self._most = 2 * (2 * config.window_blocks * streams + config.read_ahead_blocks + 2)
        self._units: OrderedDict[_Unit, Tokens | Future[Tokens]] = OrderedDict()
        self.ahead_samples = config.read_ahead_blocks * config.block_samples
        self.is_remote = any(shelf.is_remote(shard) for shard in range(len(shelf.shards)))
        self._pool = ThreadPoolExecutor(4, "read-ahead") if self.is_remote else None

    def rows(self, spots: Spots) -> TokenBatch:
        """One row of T + 1 tokens for each sample.

        Raises:
            DataError: a shard is missing or damaged, or holds a token outside the vocabulary.
        """
        length = self._shelf.sample_tokens
        result = np.empty((len(spots.shards), length + 1), dtype=np.int64)
        for row, (unit, number) in enumerate(zip(_units(spots), spots.numbers.tolist(), strict=True)):
            begin = (number - unit[1]) * length
            result[row] = self._tokens(unit)[begin : begin + length + 1]
        self._shelf.check(result, spots)
        return result

    def read_ahead(self, spots: Spots) -> None:
        """Begin to read the blocks of these samples."""
        if self._pool is None:
            return
        for unit in dict.fromkeys(_units(spots)):
            if unit not in self._units and self._shelf.is_remote(unit[0]):
                self._keep(unit, self._pool.submit(self._read, unit))

    def close(self) -> None:
        """Stop the readers, those too that wait for their place to answer."""
        self._closed.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

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
        shard, first, last = unit
        return self._patience.read(lambda: self._shelf.read(shard, first, last - first))


def _units(spots: Spots) -> list[_Unit]:
    return list(zip(spots.shards.tolist(), spots.firsts.tolist(), spots.lasts.tolist(), strict=True))
