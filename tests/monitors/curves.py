"""Synthetic losses for the diagnosis: a power law with noise, and what can go wrong with it."""

import math
import random
from collections.abc import Callable, Iterable

from monitors.diagnosis import Diagnosis
from monitors.records import DataRange, EvalRecord, Record, StepRecord
from monitors.taxonomy import Finding, IncidentClass

LR = 1e-3
BATCH = 8

Shape = Callable[[int], float]
"""step -> loss"""


def healthy(seed: int = 0, *, noise: float = 0.02, floor: float = 2.0, height: float = 6.0) -> Shape:
    """A loss that falls from `floor + height` to `floor` by a power law, with normal noise of `noise` nats."""

    def loss(step: int) -> float:
        return floor + height * math.pow(1 + step / 50, -0.6) + random.Random(seed * 1_000_003 + step).gauss(0, noise)

    return loss


def bump(base: Shape, begin: int, length: int, height: float, *, decay: bool = False) -> Shape:
    """`height` nats more over `length` steps from `begin` on; falling linearly to nothing if it decays."""

    def loss(step: int) -> float:
        within = step - begin
        if not 0 <= within < length:
            return base(step)
        return base(step) + height * (1 - within / length if decay else 1.0)

    return loss


def climb(base: Shape, begin: int, nats_per_step: float) -> Shape:
    """A rise without a jump."""
    return lambda step: base(step) + max(0, step - begin) * nats_per_step


def step_record(step: int, loss: float, **fields: object) -> StepRecord:
    """One step, as the trainer would record it."""
    known: dict[str, object] = {
        "seq": step + 1, "attempt": 1, "at_s": float(step), "step": step, "loss": loss, "grad_norm": None,
        "lr": LR, "lr_planned": LR, "data": DataRange(begin=(step - 1) * BATCH, end=step * BATCH),
    }  # fmt: skip
    return StepRecord.model_validate({**known, **fields})


def eval_record(step: int, loss: float) -> EvalRecord:
    """One evaluation."""
    return EvalRecord(seq=1, attempt=1, at_s=float(step), step=step, loss=loss, perplexity=1.0, seconds=0.1)


def records(shape: Shape, steps: Iterable[int]) -> list[Record]:
    """Step records of a shape."""
    return [step_record(step, shape(step)) for step in steps]


def watch(diagnosis: Diagnosis, stream: Iterable[Record]) -> list[Finding]:
    """Everything that the diagnosis says of a stream."""
    return [finding for record in stream for finding in diagnosis.observe(record)]


def settled(findings: Iterable[Finding]) -> dict[int, Finding]:
    """The last word on each anomaly, dismissed ones left out."""
    last = {finding.key: finding for finding in findings}
    return {key: finding for key, finding in last.items() if finding.kind != "dismissed"}


def classes(findings: Iterable[Finding]) -> list[IncidentClass]:
    """Settled classes in the order of their keys."""
    return [finding.cls for _, finding in sorted(settled(findings).items())]
