"""From samples to tokens: whole blocks are read from wherever their shards lie, and kept while they are in use.

Sample i of a shard is tokens [iT, iT + T + 1), so that inputs and targets tile. Blocks of remote shards are read ahead
by threads, once each and in hope; only the block that is needed now is insisted on, through an outage, up to the total
deadline. So there is one clock for patience, and it runs where the loop waits.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.contract.config import DataConfig
from trainer.data.cache import DiskCache
from trainer.data.errors import DataError, DataUnreachableError, TokenRangeError
from trainer.data.formats import Tokens, read_tokens
from trainer.data.manifest import Place, Shard
from trainer.data.patience import Patience
from trainer.data.storage import CALL_TIMEOUT_S, is_local, is_remote, missing, version_of
from trainer.data.timeline import Spots

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

    def check(self, rows: TokenBatch, spots: Spots) -> None:
        """Only what is handed out is judged: a bad sample that is skipped stops nobody.

        Raises:
            TokenRangeError: a token lies outside the vocabulary.
        """
        unsigned = rows.view(np.uint64)  # negative ones are huge there: one pass finds both kinds
        if unsigned.max(initial=0) >= self.vocab_size:
            row, column = (int(i) for i in np.argwhere(unsigned >= self.vocab_size)[0])
            name = self.names[int(spots.shards[row])]
            raise TokenRangeError(name, int(spots.numbers[row]), int(rows[row, column]), self.vocab_size)


_READERS = 4  # threads that read ahead
_Unit = tuple[int, int, int]  # samples [first, last) of a shard: a block, or its part of one that spans shards


class Reader:
    """One attempt at a block: from the disk cache, or from where its shard lies.

    Args:
        shelf: the shards.
        disk: keeps blocks of remote shards; None: nothing does.
    """

    def __init__(self, shelf: Shelf, disk: DiskCache | None) -> None:
        self._shelf = shelf
        self._disk = disk
        self._versions: dict[int, str] = {}

    def read(self, unit: _Unit, timeout_s: float = CALL_TIMEOUT_S) -> Tokens:
        """The tokens of a unit's samples, unchecked, in the shard's own dtype.

        Raises:
            DataError: the shard is missing, damaged or was written to.
            DataUnreachableError: its storage gave no answer in time.
        """
        shard, first, last = unit
        place, entry, length = self._shelf.places[shard], self._shelf.shards[shard], self._shelf.sample_tokens
        path = place.path(entry.name)
        begin, count = first * length, (last - first) * length + 1
        try:
            if is_local(place.fs):
                self._refuse_rewritten(shard, path, version_of(place.fs, path))
            elif self._disk is not None and is_remote(place.fs):
                if shard not in self._versions:
                    self._versions[shard] = version_of(place.fs, path, timeout_s)
                key = _key(place.url, entry, self._versions[shard], begin, count)
                kept = self._disk.get(key, count * np.dtype(entry.dtype).itemsize)
                if kept is not None:
                    return np.frombuffer(kept, dtype=entry.dtype)
                tokens = read_tokens(place.fs, path, entry.layout, begin, count, timeout_s)
                self._disk.put(key, tokens.tobytes())
                return tokens
        except FileNotFoundError as error:
            raise missing(path) from error
        return read_tokens(place.fs, path, entry.layout, begin, count, timeout_s)

    def _refuse_rewritten(self, shard: int, path: str, version: str) -> None:
        if self._versions.setdefault(shard, version) != version:
            raise DataError(
                f"{path}: was written to while the run reads it", "bring back the shard as it was", shard=path
            )


class BlockCache:
    """Whole blocks in memory: those in use, and those read ahead where the place is remote.

    Args:
        shelf: the shards.
        config: the data section.
        cache_dir: where blocks of remote shards are kept on local disk; None: nowhere.
        patience: with outages; None: as configured.
    """

    def __init__(
        self, shelf: Shelf, config: DataConfig, *, cache_dir: Path | None = None, patience: Patience | None = None
    ) -> None:
        self._shelf = shelf
        streams = len(config.sources)  # each source is in a window of its own
        self._most = 2 * (2 * config.window_blocks * streams + config.read_ahead_blocks + 2)
        self._units: OrderedDict[_Unit, Tokens | Future[Tokens]] = OrderedDict()
        self.ahead_samples = config.read_ahead_blocks * config.block_samples
        self.is_remote = any(is_remote(place.fs) for place in shelf.places)
        keeps = self.is_remote and cache_dir is not None and config.cache_bytes
        self._reader = Reader(shelf, DiskCache(cache_dir, config.cache_bytes) if cache_dir and keeps else None)
        self._patience = patience or Patience(config.timeout_s)
        self._pool = ThreadPoolExecutor(_READERS, "read-ahead") if self.is_remote else None
        self._pid = os.getpid()

    def rows(self, spots: Spots) -> TokenBatch:
        """One row of T + 1 tokens for each sample.

        Raises:
            DataError: a shard is missing or damaged, or holds a token outside the vocabulary.
        """
        self._refuse_fork()
        length = self._shelf.sample_tokens
        result = np.empty((len(spots.shards), length + 1), dtype=np.int64)
        blocks: dict[_Unit, Tokens] = {}
        for row, unit, number in zip(result, _units(spots), spots.numbers.tolist(), strict=True):
            if unit not in blocks:
                blocks[unit] = self._tokens(unit)
            begin = (number - unit[1]) * length
            row[:] = blocks[unit][begin : begin + length + 1]
        self._shelf.check(result, spots)
        return result

    def read_ahead(self, spots: Spots) -> None:
        """Begin to read the blocks of these samples."""
        if self._pool is None:
            return
        for unit in dict.fromkeys(_units(spots)):
            if unit not in self._units and is_remote(self._shelf.places[unit[0]].fs):
                self._keep(unit, self._pool.submit(self._reader.read, unit))

    def close(self) -> None:
        """Let the readers go; a call that is under way ends by its own deadline, and nobody waits for it."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _tokens(self, unit: _Unit) -> Tokens:
        found = self._units.get(unit)
        if found is None or isinstance(found, Future):
            found = self._insist(unit, found)
            self._keep(unit, found)
        self._units.move_to_end(unit)
        return found

    def _insist(self, unit: _Unit, running: "Future[Tokens] | None") -> Tokens:
        """What the reader ahead brings, and if that fails, what attempts of its own bring."""

        def attempt(timeout_s: float) -> Tokens:
            nonlocal running
            if running is None:
                return self._reader.read(unit, timeout_s)
            ahead, running = running, None
            try:
                return ahead.result(timeout_s)
            except TimeoutError as error:
                name = self._shelf.names[unit[0]]
                what = f"{name}: no answer within {timeout_s:g} s"
                raise DataUnreachableError(what, "see whether the place is reachable", shard=name) from error

        return self._patience.outlast(attempt)

    def _keep(self, unit: _Unit, tokens: "Tokens | Future[Tokens]") -> None:
        self._units[unit] = tokens
        while len(self._units) > self._most:
            self._units.popitem(last=False)

    def _refuse_fork(self) -> None:
        """The threads that read ahead stay with the parent, and so does s3fs's: waiting for them would never end."""
        if self._pool is not None and os.getpid() != self._pid:
            raise RuntimeError("a stream of remote data does not survive a fork; open another one in the child")


def _key(url: str, entry: Shard, version: str, begin: int, count: int) -> str:
    facts = f"{url}/{entry.name} {entry.dtype} {entry.offset} {entry.crc32c} {version} {begin} {count}"
    return hashlib.sha256(facts.encode()).hexdigest()


def _units(spots: Spots) -> list[_Unit]:
    return list(zip(spots.shards.tolist(), spots.firsts.tolist(), spots.lasts.tolist(), strict=True))
