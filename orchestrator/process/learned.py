"""Deadlines learned from this run: a factor over the 99th percentile of what a phase's operations took. Pure, O(1).

The configured deadline stays the upper bound, and holds alone until enough was seen; below the floor nothing is a hang.
NVRx takes five times the longest it has seen; a percentile forgets the one step in which the machine was asleep.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from monitors.records import EvalRecord, Record, SnapshotRecord, StepRecord
from trainer.contract.config import DeadlinesConfig
from trainer.contract.liveness import Phase

_BUCKETS_PER_OCTAVE = 4
_LEAST_S = 1e-3
_ENOUGH = 50  # operations of a phase; fewer have no 99th percentile worth the name
_FORGET_AFTER = 2000  # then the past counts half
_QUANTILE = 0.99


@dataclass(slots=True)
class _Durations:
    """A histogram in steps of a fifth: how often an operation took so long."""

    counts: dict[int, float] = field(default_factory=dict)
    total: float = 0.0

    def add(self, seconds: float) -> None:
        bucket = math.ceil(_BUCKETS_PER_OCTAVE * math.log2(max(seconds, _LEAST_S) / _LEAST_S))
        self.counts[bucket] = self.counts.get(bucket, 0.0) + 1.0
        self.total += 1.0
        if self.total >= _FORGET_AFTER:
            self.counts = {one: count / 2 for one, count in self.counts.items() if count > 1.0}
            self.total = sum(self.counts.values())

    def quantile_s(self) -> float:
        """The upper edge of the bucket in which it lies."""
        left = _QUANTILE * self.total
        for bucket in sorted(self.counts):
            left -= self.counts[bucket]
            if left <= 0:
                return float(_LEAST_S * 2.0 ** (bucket / _BUCKETS_PER_OCTAVE))
        return 0.0


@dataclass(slots=True)
class Learned:
    """What the operations of each phase took, over all attempts that this supervisor has seen."""

    _phases: dict[Phase, _Durations] = field(default_factory=dict)

    def observe(self, record: Record) -> None:
        """A step, an evaluation or the stall of a save; other records say nothing of a phase."""
        match record:
            case StepRecord(step_time_s=taken) if taken is not None:
                self._add(Phase.TRAIN, taken.total)
            case EvalRecord():
                self._add(Phase.EVALUATE, record.seconds)
            case SnapshotRecord():
                self._add(Phase.SAVE, record.stall_s)
            case _:
                pass

    def observe_all(self, records: Iterable[Record]) -> None:
        """Those of an earlier supervisor."""
        for record in records:
            self.observe(record)

    def _add(self, phase: Phase, seconds: float) -> None:
        if math.isfinite(seconds) and seconds >= 0:
            self._phases.setdefault(phase, _Durations()).add(seconds)

    def limit_s(self, deadlines: DeadlinesConfig, phase: Phase, configured_s: float) -> float:
        """The longest silence of a phase: what is configured, or less where this run has shown that less is normal."""
        seen = self._phases.get(phase)
        if deadlines.learn_factor is None or seen is None or seen.total < _ENOUGH:
            return configured_s
        return min(configured_s, max(deadlines.learn_floor_s, deadlines.learn_factor * seen.quantile_s()))
