"""Predictions against the truth: who is right how often, how late, and what being wrong would have cost.

A truth and a prediction meet when their spans do, give or take a few logged steps. Of several that meet a truth the
worst counts: one that acts where nothing should have been done, else the one with the right name, else the first.
"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.diagnosis.synthetic import Run, Truth
from benchmarks.diagnosis.watch import Prediction
from monitors.taxonomy import IncidentClass

NOTHING = "healthy"
_REACH_ROWS = 4
_REACH_STEPS = 20
_WILSON_Z = 1.96
#: The shipped policy's first rung: a margin of 100 steps run again and 300 batches passed over.
_ROLLBACK_COST_STEPS = 400


@dataclass
class Score:
    """Of one detector over many runs."""

    confusion: Counter[tuple[str, str]] = field(default_factory=Counter)
    delays: dict[str, list[int]] = field(default_factory=dict)
    healthy_steps: int = 0
    false_incidents: int = 0
    false_rollbacks: int = 0
    cost_steps: int = 0
    due: int = 0
    in_time: int = 0
    mistakes: list[str] = field(default_factory=list)

    def add(self, run: Run, predictions: Sequence[Prediction], harmful: frozenset[IncidentClass]) -> None:
        """Take one run in."""
        self.healthy_steps += run.healthy_steps
        reach = max(_REACH_STEPS, _REACH_ROWS * _every(run))
        left = list(predictions)
        for truth in run.truths:
            met = [one for one in left if _meet(truth, one, reach)]
            chosen = _chosen(truth, met, truth.cls in harmful)
            left = [one for one in left if one not in met]
            self._judge(run, truth, chosen, truth.cls in harmful)
        for one in left:
            self.confusion[NOTHING, one.cls.value] += 1
            self.false_incidents += 1
            self.false_rollbacks += one.acts
            self.cost_steps += (_ROLLBACK_COST_STEPS + one.detected_step - one.onset_step) if one.acts else 0
            kind = "false rollback" if one.acts else "false incident"
            self.mistakes.append(f"{kind}: {run.name}: {one.cls} at {one.onset_step} where nothing was: {one.why}")

    def _judge(self, run: Run, truth: Truth, chosen: Prediction | None, harmful: bool) -> None:
        said = NOTHING if chosen is None else chosen.cls.value
        self.confusion[truth.cls.value, said] += 1
        if chosen is not None and chosen.cls is truth.cls:
            if truth.due_step is not None:
                self.due += 1
                self.in_time += chosen.detected_step <= truth.due_step
            self.delays.setdefault(truth.cls.value, []).append(chosen.detected_step - truth.onset_step)
            return
        why = "" if chosen is None else f": {chosen.why}"
        where = f"{truth.onset_step}-{truth.end_step} ({truth.nats:.2f} nats)"
        self.mistakes.append(f"{run.name}: {truth.cls} at {where} taken for {said}{why}")
        if chosen is not None and chosen.acts and not harmful:
            self.false_rollbacks += 1
            self.cost_steps += _ROLLBACK_COST_STEPS + chosen.detected_step - chosen.onset_step
        if harmful and (chosen is None or not chosen.acts):
            self.cost_steps += run.steps - truth.onset_step

    def classes(self) -> list[str]:
        """Every class that was there or was named."""
        return sorted({name for pair in self.confusion for name in pair} - {NOTHING})

    def per_class(self, cls: str) -> dict[str, Any]:
        """Precision, recall with its Wilson interval, F1 and delay of one class."""
        hit = self.confusion[cls, cls]
        there = sum(count for (truth, _), count in self.confusion.items() if truth == cls)
        named = sum(count for (_, said), count in self.confusion.items() if said == cls)
        precision, recall = hit / named if named else 0.0, hit / there if there else 0.0
        delays = sorted(self.delays.get(cls, []))
        low, high = wilson(hit, there)
        return {
            "n": there,
            "precision": round(precision, 4),
            "recall": round(recall, 4),
            "recall_interval": [round(low, 4), round(high, 4)],
            "f1": round(2 * precision * recall / (precision + recall), 4) if hit else 0.0,
            "delay_median": statistics.median(delays) if delays else None,
            "delay_p95": delays[math.ceil(0.95 * len(delays)) - 1] if delays else None,
        }

    def figures(self) -> dict[str, Any]:
        """For the result line."""
        classes = {cls: self.per_class(cls) for cls in self.classes()}
        there = [numbers["f1"] for numbers in classes.values() if numbers["n"]]
        millions = max(self.healthy_steps, 1) / 1e6
        return {
            "macro_f1": round(statistics.fmean(there), 4) if there else None,
            "classes": classes,
            "slow_divergences_in_time": round(self.in_time / self.due, 4) if self.due else None,
            "healthy_steps": self.healthy_steps,
            "false_incidents_per_million": round(self.false_incidents / millions, 2),
            "false_rollbacks": self.false_rollbacks,
            "false_rollbacks_per_million": round(self.false_rollbacks / millions, 3),
            "cost_of_wrong_decisions_steps": self.cost_steps,
        }


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if trials == 0:
        return 0.0, 1.0
    share, z = hits / trials, _WILSON_Z
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(0.0, middle - half), min(1.0, middle + half)


def _every(run: Run) -> int:
    steps = [record.step for record in run.records[:50] if record.kind == "step"]
    gaps = [late - early for early, late in itertools.pairwise(steps)]
    return int(statistics.median(gaps)) if gaps else 1


def _meet(truth: Truth, one: Prediction, reach: int) -> bool:
    begins_before_its_end = one.onset_step <= truth.end_step + reach
    return begins_before_its_end and (one.end_step is None or one.end_step >= truth.onset_step - reach)


def _chosen(truth: Truth, met: list[Prediction], harmful: bool) -> Prediction | None:
    acting = [one for one in met if one.acts and not harmful]
    right = [one for one in met if one.cls is truth.cls]
    return next(iter(acting or right or met), None)
