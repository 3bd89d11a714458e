"""Tokens a second from page cache, in one process: Longwatch's stream beside a plain loop and a plain DataLoader.

`python -m benchmarks.data [--megatokens N] [--rounds N]`. Longwatch's figure includes everything that a step does: the
order, the cursor, the loader, the copy to int64 and the check of every token against the vocabulary. Measured for a
batch that is mostly copying and for one that is mostly overhead.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import Stats, measure, report
from trainer.contract.config import DataConfig
from trainer.data.stream import DataStream

OURS, LOOP = "longwatch", "plain loop over memmap"
_SHAPES = ((32, 1024), (8, 256))  # sequences, tokens of each
_TARGET_TOKENS_PER_S = 100e6
_VOCABULARY = 50_304
_SHARDS = 8
_HEADER_BYTES = 1024


@dataclass
class Bench:
    """Shards on disk, and one open reader of each kind."""

    root: Path
    sequences: int
    length: int
    batches: int

    def __post_init__(self) -> None:
        config = DataConfig(train=str(self.root), vocab_size=_VOCABULARY)
        self._stream = DataStream(config, sample_tokens=self.length)
        self._shards = [
            np.memmap(path, dtype="<u2", mode="r", offset=_HEADER_BYTES) for path in sorted(self.root.glob("*.bin"))
        ]
        for shard in self._shards:  # all of it into page cache
            int(shard.sum(dtype=np.int64))
        self._rng = np.random.default_rng(1)
        self._loaders = {workers: _endless(self._loader(workers)) for workers in (0, 2)}

    def longwatch(self) -> float:
        """Tokens a second of the whole stream."""
        return self._timed(lambda: self._stream.next_batch(self.sequences).tokens)

    def loop(self) -> float:
        """Random windows, gathered one by one in the training process."""

        def batch() -> np.ndarray[Any, Any]:
            shards = self._rng.integers(0, len(self._shards), self.sequences)
            starts = self._rng.integers(0, len(self._shards[0]) - self.length - 1, self.sequences)
            rows = [self._shards[s][b : b + self.length + 1] for s, b in zip(shards, starts, strict=True)]
            return np.stack(rows).astype(np.int64)

        return self._timed(batch)

    def loader(self, workers: int) -> float:
        """The same windows through torch's DataLoader, whole batches at a time."""
        return self._timed(lambda: next(self._loaders[workers]))

    def _loader(self, workers: int) -> "DataLoader[Any]":
        return DataLoader(
            _Windows(self._shards, self.length),
            batch_size=self.sequences,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            collate_fn=lambda batch: batch,
            persistent_workers=workers > 0,
        )

    def _timed(self, batch: Callable[[], Any]) -> float:
        begun_s = time.perf_counter()
        for _ in range(self.batches):
            batch()
        return self.batches * self.sequences * self.length / (time.perf_counter() - begun_s)

    def close(self) -> None:
        """End the workers."""
        self._loaders.clear()
        self._stream.close()


class _Windows(Dataset[Any]):
    def __init__(self, shards: list[Any], length: int) -> None:
        self._shards = shards
        self._length = length
        self._each = (len(shards[0]) - 1) // length

    def __len__(self) -> int:
        return self._each * len(self._shards)

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        rows = []
        for index in indices:
            shard, number = divmod(index, self._each)
            begin = number * self._length
            rows.append(self._shards[shard][begin : begin + self._length + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def _endless(loader: "DataLoader[Any]") -> Iterator[Any]:
    while True:
        yield from loader


def write_shards(root: Path, num_tokens: int) -> None:
    """llm.c shards of random tokens."""
    rng = np.random.default_rng(0)
    each = num_tokens // _SHARDS
    for number in range(_SHARDS):
        header = np.zeros(256, dtype="<i4")
        header[:3] = (20240520, 1, each)
        tokens = rng.integers(0, _VOCABULARY, each, dtype=np.uint16)
        (root / f"shard-{number}.bin").write_bytes(header.tobytes() + tokens.tobytes())


def table(found: dict[str, Stats]) -> str:
    """Millions of tokens a second, as markdown."""
    lines = ["| case | M tokens/s: min / median / max | to the plain loop |", "|---|---|---|"]
    for name, stats in found.items():
        three = " / ".join(f"{value / 1e6:.0f}" for value in (stats.min, stats.median, stats.max))
        lines.append(f"| {name} | {three} | {stats.median / found[LOOP].median:.2f} |")
    return "\n".join(lines)


def compare(root: Path, shape: tuple[int, int], batches: int, rounds: int) -> dict[str, Stats]:
    """All cases beside each other, for one shape of batch."""
    bench = Bench(root, *shape, batches)
    cases = {
        OURS: bench.longwatch,
        LOOP: bench.loop,
        "DataLoader, no workers": lambda: bench.loader(0),
        "DataLoader, 2 workers": lambda: bench.loader(2),
    }
    try:
        measure(cases, 1)
        return measure(cases, rounds)
    finally:
        bench.close()


def figures_of(found: dict[str, Stats]) -> dict[str, Any]:
    """Of one shape, for the result line."""
    return {
        "tokens_per_s": found[OURS].median,
        "to_plain_loop": round(found[OURS].median / found[LOOP].median, 3),
        "cases": {name: stats.as_figure() for name, stats in found.items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megatokens", type=float, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=300, help="of each case in a round")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(directory)
        write_shards(root, int(arguments.megatokens * 1e6))
        found = {
            f"{shape[0]}x{shape[1]}": compare(root, shape, arguments.batches, arguments.rounds) for shape in _SHAPES
        }
    figures = {name: figures_of(stats) for name, stats in found.items()}
    targets = {name: {"tokens_per_s": _TARGET_TOKENS_PER_S} for name in found}
    met = all(stats[OURS].median >= _TARGET_TOKENS_PER_S for stats in found.values())
    report("data", figures, targets, met, "\n\n".join(f"## {n}\n\n{table(stats)}" for n, stats in found.items()))


if __name__ == "__main__":
    main()
