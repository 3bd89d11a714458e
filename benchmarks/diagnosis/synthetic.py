"""Labelled synthetic runs: healthy curves with what makes them hard to judge, and incidents of stated size in them.

A curve is a warm-up from ln V, a power law, and a cosine's extra fall at the end; its noise is scaled by the batch
size, partly correlated, and normal, heavy-tailed (Student's t, 4 degrees of freedom) or bootstrapped in blocks from
the residuals of healthy recorded runs. Sizes are nats over the trend, lengths are steps. One seed gives one run.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from monitors.records import DataRange, EvalRecord, Record, StartedRecord, StepRecord
from monitors.taxonomy import IncidentClass

Floats = npt.NDArray[np.float64]

BATCH = 64
NOISES = ("normal", "heavy", "recorded")
PHASES = (
    "plain",
    "lr_kink",
    "epoch_drops",
    "resume_jump",
    "planned_change",
    "batch_ramp",
    "missing_points",
    "lr_overlay",
)
NAN_CLASSES = (
    IncidentClass.IMMEDIATE_NAN,
    IncidentClass.SUDDEN_NAN,
    IncidentClass.NAN_AFTER_LOAD,
    IncidentClass.PLATEAU_THEN_NAN,
)
CLASSES = (
    IncidentClass.TRANSIENT_SPIKE,
    IncidentClass.UNRECOVERED_SPIKE,
    IncidentClass.SLOW_DIVERGENCE,
    *NAN_CLASSES,
    IncidentClass.REPEATED_SPIKES_BY_SHARDS,
    IncidentClass.LOSS_IMPLAUSIBLY_LOW,
)


@dataclass(frozen=True, slots=True)
class Truth:
    """One incident that was put in: its class, [onset, end] in steps, and its size in nats (0: not of that kind)."""

    cls: IncidentClass
    onset_step: int
    end_step: int
    nats: float = 0.0
    due_step: int | None = field(default=None, metadata={"why": "a slow divergence is to be seen before this step"})


@dataclass(frozen=True, slots=True)
class Run:
    """A run and the truth about it."""

    name: str
    records: list[Record]
    truths: tuple[Truth, ...]
    planned: tuple[int, ...] = ()
    overlays: tuple[tuple[int, int], ...] = field(default=(), metadata={"why": "(end of the hold, end of the ramp)"})
    steps: int = 0
    warmup_steps: int = 0
    healthy_steps: int = 0
    found: str = field(default="made", metadata={"why": "made here, or recorded by others: reported apart"})


@dataclass
class _Draft:
    """A run on its way: one value for each step, from step 1 on."""

    rng: np.random.Generator
    steps: int
    every: int
    sigma: float
    warmup: int
    loss: Floats
    trend: Floats
    norm: Floats
    planned: tuple[int, ...] = ()
    overlays: tuple[tuple[int, int], ...] = ()
    shards: dict[int, dict[int, tuple[int, float]]] = field(default_factory=dict)
    loaded_at: int | None = None
    validation: Floats | None = None
    missing: float = 0.0


def healthy(seed: int, steps: int, residuals: Floats | None = None) -> Run:
    """A run in which nothing may be rolled back."""
    rng = np.random.default_rng((seed, 0))
    phase = PHASES[int(rng.integers(len(PHASES)))]
    draft = _draft(rng, steps, phase, residuals)
    return _finish(f"healthy/{phase}/{seed}", draft, ())


def with_incident(cls: IncidentClass, seed: int, residuals: Floats | None = None) -> Run:
    """A run with one incident of the class, in the midst of the same nuisances."""
    rng = np.random.default_rng((seed, 1 + CLASSES.index(cls)))
    phase = PHASES[int(rng.integers(len(PHASES)))]
    dense = cls in (IncidentClass.REPEATED_SPIKES_BY_SHARDS, IncidentClass.LOSS_IMPLAUSIBLY_LOW)
    draft = _draft(rng, 4000, phase, residuals, every=1 if dense else None)
    truth = _PLANTS[cls](draft)
    return _finish(f"{cls}/{phase}/{seed}", draft, (truth,))


# -- healthy curves ------------------------------------------------------------------------------------------------


def _draft(
    rng: np.random.Generator, steps: int, phase: str, residuals: Floats | None, every: int | None = None
) -> _Draft:
    every = every or int(rng.choice([1, 1, 1, 10, 100] if steps >= 20_000 else [1, 1, 10]))
    steps = steps if every == 1 else steps * min(every, 4)
    sigma = float(rng.choice([0.006, 0.02, 0.06]))  # global batches of about 4M, 0.5M and 0.06M tokens
    warmup = int(rng.integers(100, 400))
    step = np.arange(1, steps + 1, dtype=np.float64)
    floor, height, power = rng.uniform(1.8, 3.2), rng.uniform(3.0, 6.0), rng.uniform(0.3, 0.6)
    trend = floor + height * np.power(1 + step / (warmup / 2), -power)
    trend -= 0.08 * (1 - np.cos(np.pi * step / steps)) / 2
    trend = _phase_in_trend(rng, trend, phase, sigma)
    noise = _noise(rng, steps, residuals) * sigma
    if phase == "batch_ramp":
        noise[steps // 2 :] *= 0.6
    loss = trend + noise * np.sqrt(np.maximum(trend / floor, 1.0))
    norm = np.exp(rng.normal(0, 0.12, steps)) * (0.3 + 2.0 * np.exp(-step / warmup))
    planned = (int(steps * 0.6),) if phase == "planned_change" else ()
    missing = 0.1 if phase == "missing_points" else 0.0
    overlays = (_overlay(steps),) if phase == "lr_overlay" else ()
    return _Draft(rng, steps, every, sigma, warmup, loss, trend, norm, planned, overlays, missing=missing)


def _phase_in_trend(rng: np.random.Generator, trend: Floats, phase: str, sigma: float) -> Floats:
    steps = len(trend)
    match phase:
        case "lr_kink":
            ahead = np.maximum(np.arange(steps) - int(steps * 0.7), 0)
            return np.asarray(trend - 0.15 * (1 - np.exp(-ahead / (0.1 * steps))))
        case "epoch_drops":
            each = steps // int(rng.integers(2, 5))
            return np.asarray(trend - 0.04 * (np.arange(steps) // each))
        case "resume_jump":
            shift = np.zeros(steps)
            shift[int(steps * 0.5) :] = rng.uniform(-1, 1) * 2 * sigma
            return np.asarray(trend + shift)
        case "lr_overlay":  # lower while the rate is held down, back with it: no incident, and none may be made of it
            hold, back = _overlay(steps)
            at = np.arange(steps, dtype=np.float64)
            eased = 1 - np.exp(-np.maximum(at - steps // 2, 0) / (0.1 * (hold - steps // 2)))
            ramp = np.clip((back - at) / (back - hold), 0.0, 1.0)
            return np.asarray(trend - rng.uniform(0.02, 0.15) * eased * ramp)
        case "planned_change":
            shift = np.zeros(steps)
            shift[int(steps * 0.6) :] = rng.choice([-1, 1]) * rng.uniform(0.05, 0.6)
            return np.asarray(trend + shift)
        case _:
            return trend


def _overlay(steps: int) -> tuple[int, int]:
    """(end of the hold, end of the ramp) of an overlay that begins in the middle."""
    return int(steps * 0.55), int(steps * 0.65)


def _noise(rng: np.random.Generator, steps: int, residuals: Floats | None) -> Floats:
    kind = str(rng.choice(NOISES if residuals is not None else NOISES[:2]))
    if kind == "recorded" and residuals is not None:
        block = 64
        starts = rng.integers(0, len(residuals) - block, steps // block + 1)
        return np.asarray(np.concatenate([residuals[b : b + block] for b in starts])[:steps])
    raw = rng.normal(0, 1, steps) if kind == "normal" else rng.standard_t(4, steps) / np.sqrt(2)
    slow = np.zeros(steps)  # neighbouring batches are alike: a tenth of the variance lasts about twenty steps
    shocks = rng.normal(0, np.sqrt(1 - 0.95**2), steps)
    for i in range(1, steps):
        slow[i] = 0.95 * slow[i - 1] + shocks[i]
    return np.asarray(np.sqrt(0.9) * raw + np.sqrt(0.1) * slow)


# -- incidents -----------------------------------------------------------------------------------------------------


def _onset(draft: _Draft) -> int:
    """In the settled part, where there is room to see it, and not on top of a planned change."""
    low, high = max(draft.warmup * 2, 30 * draft.every, draft.steps // 4), int(draft.steps * 0.55)
    return int(draft.rng.integers(low, high))


def _size(draft: _Draft) -> float:
    """At least 0.3 nats and ten times the noise: smaller ones are not worth a person's attention."""
    return float(max(0.3, 10 * draft.sigma) * np.exp(draft.rng.uniform(0, 2)))


def _after(draft: _Draft, onset: int) -> Floats:
    return np.maximum(np.arange(1, draft.steps + 1) - onset, -1.0)


def _transient(draft: _Draft) -> Truth:
    """Rises within a few steps and decays; in a sparse log it lasts long enough to leave a mark in it."""
    onset, size = _onset(draft) // draft.every * draft.every, _size(draft)
    after = _after(draft, onset)
    if draft.every == 1:
        length, rise = float(draft.rng.uniform(3, 45)), float(draft.rng.uniform(1, 6))
        shape = np.where(after >= 0, np.minimum((after + 1) / rise, 1) * np.exp(-np.maximum(after, 0) * 3 / length), 0)
    else:
        length, rise = float(draft.rng.uniform(1, 3)) * draft.every, 0.0
        shape = np.where((after >= 0) & (after < length), 1.0, 0.0)
    draft.loss += size * shape
    draft.norm *= 1 + 20 * size * shape
    return Truth(IncidentClass.TRANSIENT_SPIKE, onset, int(onset + length + rise), size)


def _unrecovered(draft: _Draft) -> Truth:
    onset, size = _onset(draft), _size(draft)
    after = _after(draft, onset)
    stays = draft.rng.uniform(0.55, 1.0)
    draft.loss += size * np.where(after >= 0, stays + (1 - stays) * np.exp(-np.maximum(after, 0) / 40), 0.0)
    draft.norm *= np.where(after >= 0, draft.rng.uniform(1, 8), 1.0)
    return Truth(IncidentClass.UNRECOVERED_SPIKE, onset, draft.steps, size)


def _slow(draft: _Draft) -> Truth:
    onset, length = _onset(draft), float(draft.rng.uniform(400, 1500)) * (1 if draft.every == 1 else 4)
    size = float(draft.rng.uniform(0.5, 2.0)) + 10 * draft.sigma
    after = np.clip(_after(draft, onset) / length, 0, 2)
    rise = size * (after if draft.rng.random() < 0.5 else (np.exp(1.5 * after) - 1) / (np.exp(1.5) - 1))
    draft.loss += rise
    risen = draft.trend + rise - draft.trend[onset - 1]
    harm = np.flatnonzero((risen > max(0.1, 0.05 * draft.trend[onset - 1])) & (after > 0))
    due = int(harm[0]) + 1 if len(harm) else draft.steps
    return Truth(IncidentClass.SLOW_DIVERGENCE, onset, draft.steps, size, due_step=due)


def _immediate_nan(draft: _Draft) -> Truth:
    onset = int(draft.rng.integers(1, 21))
    draft.loss[onset - 1 :] = np.nan
    return Truth(IncidentClass.IMMEDIATE_NAN, onset, draft.steps)


def _sudden_nan(draft: _Draft) -> Truth:
    onset = int(draft.rng.integers(draft.steps // 10, draft.steps // 4))
    onset = max(onset, 40 * draft.every)
    draft.loss[onset - 1 :] = draft.rng.choice([np.nan, np.inf])
    return Truth(IncidentClass.SUDDEN_NAN, onset, draft.steps)


def _nan_after_load(draft: _Draft) -> Truth:
    draft.every = 1  # "a few steps after the load" is not to be seen in a sparse log
    draft.loaded_at = _onset(draft)
    onset = draft.loaded_at + int(draft.rng.integers(1, 6))
    draft.loss[onset - 1 :] = np.nan
    return Truth(IncidentClass.NAN_AFTER_LOAD, onset, draft.steps)


def _plateau_then_nan(draft: _Draft) -> Truth:
    begin = _onset(draft)
    onset = begin + int(draft.rng.integers(600, 1200)) * (1 if draft.every == 1 else 4)
    level = float(draft.trend[begin])
    draft.loss[begin:] += level - draft.trend[begin:]
    draft.loss[onset - 1 :] = np.nan
    return Truth(IncidentClass.PLATEAU_THEN_NAN, onset, draft.steps)


def _low(draft: _Draft) -> Truth:
    onset = _onset(draft)
    draft.validation = draft.trend.copy()
    share = draft.rng.uniform(0.3, 0.7)
    draft.loss[onset - 1 :] *= share + (1 - share) * np.exp(-np.arange(draft.steps - onset + 1) / 15)
    return Truth(IncidentClass.LOSS_IMPLAUSIBLY_LOW, onset, draft.steps)


def _shards(draft: _Draft) -> Truth:
    """64 sequences from 8 of 200 shards a step; one of the shards is garbage."""
    bad, size, first = int(draft.rng.integers(200)), float(draft.rng.uniform(2.0, 6.0)), _onset(draft)
    steps = range(1, draft.steps + 1)
    reads = [sorted(draft.rng.choice(200, 8, replace=False).tolist()) for _ in steps]
    kinds = draft.rng.normal(0, 0.1, 200)  # code, maths and prose differ for good
    hits: list[int] = []
    for step, shards in zip(steps, reads, strict=True):
        base = float(draft.loss[step - 1])
        extra = {shard: float(kinds[shard] + draft.rng.normal(0, 0.05)) for shard in shards}
        if bad in shards and step >= first:
            extra[bad] += size
            hits.append(step)
        draft.shards[step] = {shard: (8, 8 * (base + extra[shard])) for shard in shards}
        draft.loss[step - 1] = base + sum(extra.values()) / 8
    return Truth(IncidentClass.REPEATED_SPIKES_BY_SHARDS, hits[0], draft.steps, size / 8)


_PLANTS = {
    IncidentClass.TRANSIENT_SPIKE: _transient,
    IncidentClass.UNRECOVERED_SPIKE: _unrecovered,
    IncidentClass.SLOW_DIVERGENCE: _slow,
    IncidentClass.IMMEDIATE_NAN: _immediate_nan,
    IncidentClass.SUDDEN_NAN: _sudden_nan,
    IncidentClass.NAN_AFTER_LOAD: _nan_after_load,
    IncidentClass.PLATEAU_THEN_NAN: _plateau_then_nan,
    IncidentClass.REPEATED_SPIKES_BY_SHARDS: _shards,
    IncidentClass.LOSS_IMPLAUSIBLY_LOW: _low,
}


# -- into records --------------------------------------------------------------------------------------------------


def _finish(name: str, draft: _Draft, truths: tuple[Truth, ...]) -> Run:
    records: list[Record] = []
    attempt = 1
    validation = draft.validation if draft.validation is not None else None
    for step in range(1, draft.steps + 1):
        if draft.loaded_at is not None and step == draft.loaded_at + 1:
            attempt = 2
            records.append(_started(len(records) + 1, draft))
        if validation is not None and step % 100 == 0:
            records.append(_evaluated(len(records) + 1, attempt, step, float(validation[step - 1])))
        first_bad = truths[0].onset_step if truths and truths[0].cls in NAN_CLASSES else None
        seen = step % draft.every == 0 or step == 1 or step == first_bad
        if not seen or (draft.missing and step != first_bad and draft.rng.random() < draft.missing):
            continue
        records.append(_step(len(records) + 1, attempt, step, draft))
        if first_bad is not None and step >= first_bad + 20 * draft.every:
            break  # a run that is non-finite for good would have ended
    healthy_until = truths[0].onset_step if truths else draft.steps
    return Run(
        name,
        records,
        truths,
        draft.planned,
        draft.overlays,
        steps=draft.steps,
        warmup_steps=draft.warmup,
        healthy_steps=healthy_until,
    )


def _step(seq: int, attempt: int, step: int, draft: _Draft) -> StepRecord:
    loss = float(draft.loss[step - 1])
    finite = bool(np.isfinite(loss))
    fields: dict[str, Any] = {
        "version": 1, "seq": seq, "attempt": attempt, "at_s": float(step), "step": step, "loss": loss,
        "grad_norm": float(draft.norm[step - 1]) if finite else float("nan"), "skipped": not finite,
        "data": DataRange(begin=(step - 1) * BATCH, end=step * BATCH), "shards": draft.shards.get(step, {}),
    }  # fmt: skip
    return StepRecord(**fields)


def _evaluated(seq: int, attempt: int, step: int, loss: float) -> EvalRecord:
    return EvalRecord(
        seq=seq, attempt=attempt, at_s=float(step), step=step, loss=loss, perplexity=float(np.exp(loss)), seconds=0.0
    )


def _started(seq: int, draft: _Draft) -> StartedRecord:
    at = draft.loaded_at or 0
    return StartedRecord(
        seq=seq, attempt=2, at_s=float(at), step=at, position=at * BATCH, tokens=at * BATCH, loaded=f"{at:012d}-e1-1",
        precision="bf16", device="cpu", parameters=1, vocab_size=50_304, batch_samples=BATCH, sample_tokens=1024,
        total_steps=draft.steps, total_samples=draft.steps * BATCH, shards=(), peak_lr=1e-3, warmup_steps=draft.warmup,
    )  # fmt: skip
