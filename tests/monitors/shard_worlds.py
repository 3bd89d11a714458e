"""Made runs over many shards, for the test that ties spikes to shards: compositions, noises, poison. One seed, one run.

Losses are nats a token; a batch has 64 sequences of `width` shards. What one sequence has over the trend is noise of a
family, its shard's kind, what the state does to the whole batch, and what is wrong with its shard.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from monitors.detect.shards import Conviction, ShardDetector
from monitors.records import StepRecord
from monitors.settings import DetectSettings
from monitors.window import Band

SHARDS = 1000
SEQUENCES = 64
TREND = 3.0
FAMILIES = ("normal", "heavy", "hard_samples", "kinds", "state", "bursts")
COMPOSITIONS = ("shuffled", "windows")
_WINDOW = 12  # batches that read the same shards, where blocks are shuffled within windows
_BAND = Band(anchor_step=0.0, level=TREND, slope=0.0, scale=0.05, reach=1.0)


def batch(
    step: int, shards: dict[int, tuple[int, float]], loss: float = TREND, worst: tuple[int, float] | None = None
) -> StepRecord:
    """A step record of these shards; not validated, because these tests make hundreds of thousands."""
    return StepRecord.model_construct(seq=step, attempt=1, at_s=0.0, step=step, loss=loss, shards=shards, worst=worst)


@dataclass(frozen=True, slots=True)
class World:
    """One run. `poison` is shard -> nats; `losses` False: the trainer tells which shards, not how they fared."""

    seed: int
    width: int
    family: str = "normal"
    composition: str = "shuffled"
    poison: tuple[tuple[int, float], ...] = ()
    losses: bool = True

    def steps(self, count: int) -> Iterator[tuple[StepRecord, bool]]:
        """Records in order, and whether a spike begins with each. `over` is (shards, sequences of each)."""
        rng = np.random.default_rng((self.seed, self.width, FAMILIES.index(self.family)))
        kinds = np.where(rng.random(SHARDS) < 0.3, -1.0, rng.normal(0, 0.3, SHARDS)) if self.family == "kinds" else None
        poison, poisoned = dict(self.poison), frozenset(dict(self.poison))
        shards = np.zeros(0, dtype=np.int64)
        burst_until, up = 0, False
        for step in range(1, count + 1):
            if self.composition == "shuffled" or step % _WINDOW == 1:
                shards = rng.choice(SHARDS, self.width, replace=False)
                if step == 1 and poisoned:  # every run meets its poison, or it would have nothing to say
                    shards[0] = min(poisoned)
            if self.family == "bursts" and rng.random() < 0.004:
                burst_until = step + 60
            rate = {"state": 0.02, "bursts": 0.25 if step < burst_until else 0.0}.get(self.family, 0.0)
            lifted = 1.5 * rng.uniform(0.7, 1.3, self.width) if rng.random() < rate else np.zeros(self.width)
            over = self._noise(rng) + (lifted + (kinds[shards] if kinds is not None else 0.0))[:, None]
            for place in [place for place, shard in enumerate(shards.tolist()) if shard in poisoned]:
                over[place] += poison[int(shards[place])]
            was_up, up = up, bool(over.mean() > 6 * _BAND.scale)
            yield self._record(step, shards, over), up and not was_up

    def _noise(self, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        each = SEQUENCES // self.width
        if self.family == "heavy":
            drawn = 0.2 * rng.standard_t(3, (self.width, each))
        else:
            drawn = rng.normal(0, 0.3, (self.width, each))
        if self.family == "hard_samples":
            drawn += 8.0 * (rng.random((self.width, each)) < 1 / 3000)
        return np.asarray(drawn)

    def _record(self, step: int, shards: npt.NDArray[np.int64], over: npt.NDArray[np.float64]) -> StepRecord:
        each = SEQUENCES // self.width
        sums = (TREND + over).sum(axis=1).tolist() if self.losses else [math.nan] * self.width
        told = {shard: (each, total) for shard, total in zip(shards.tolist(), sums, strict=True)}
        worst = (step * SEQUENCES, TREND + float(over.max())) if self.losses else None
        return batch(step, told, TREND + float(over.mean()), worst)


def convictions(world: World, count: int, *, until: int | None = None) -> list[tuple[Conviction, dict[int, int]]]:
    """Who was convicted, each with how often every poisoned shard had been read by then; `until` so many of them."""
    detector = ShardDetector(DetectSettings())
    detector.declare(SHARDS)
    reads = {shard: 0 for shard, _ in world.poison}
    found: list[tuple[Conviction, dict[int, int]]] = []
    for record, spikes in world.steps(count):
        for shard in reads.keys() & record.shards.keys():
            reads[shard] += 1
        convicted = detector.observe(record, _BAND)
        if convicted is None and spikes:
            convicted = detector.on_onset(record.step)
        if convicted is not None:
            found.append((convicted, dict(reads)))
        if until is not None and len(found) >= until:
            break
    return found
