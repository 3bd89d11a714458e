"""From what the loop knows to what its records say: pure functions, no I/O."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitors.records import Condemned, DataRange, StepTime
from trainer.setup import Machinery, Workplace
from trainer.step import StepResult


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What the host knows of a step beside its result."""

    step: int
    begin: int
    end: int
    positions: NDArray[np.int64]
    shards: NDArray[np.int64]
    tokens: int
    lr: float
    lr_planned: float


def step_fields(facts: StepFacts, result: StepResult, times: StepTime, *, replay: bool) -> dict[str, Any]:
    """Fields of a `StepRecord`."""
    details = result.details
    return {
        "step": facts.step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "clipped": result.clipped,
        "lr": facts.lr,
        "lr_planned": facts.lr_planned,
        "update_ratio": result.update_ratio,
        "tokens": facts.tokens,
        "step_time_s": times,
        "data": DataRange(begin=facts.begin, end=facts.end),
        "shards": losses_by_shard(facts.shards, result.losses),
        "worst": worst_sequence(facts.positions, result.losses),
        "skipped": result.skipped,
        "prevention": result.prevention,
        "scaler": result.scale,
        "replay": replay,
        "grad_norms": details.grad_norms if details else None,
        "attention_logit_max": details.attention_logit_max if details else None,
        "log_z": details.log_z if details else None,
        "second_moment_ratio": details.second_moment_ratio if details else None,
    }


def losses_by_shard(shards: NDArray[np.int64], losses: tuple[float, ...]) -> dict[int, tuple[int, float]]:
    """Shard -> (sequences, sum of their mean losses); a NaN stays within its shard."""
    values = np.asarray(losses, dtype=np.float64)
    return {
        int(shard): (int((shards == shard).sum()), float(values[shards == shard].sum())) for shard in np.unique(shards)
    }


def worst_sequence(positions: NDArray[np.int64], losses: tuple[float, ...]) -> tuple[int, float] | None:
    """(raw position, loss) of the worst sequence; one that is not a number is worse than any."""
    if not losses:
        return None
    worst = int(np.argmax(np.asarray(losses)))  # argmax stops at the first NaN
    return int(positions[worst]), losses[worst]


def started_fields(at: Workplace, machinery: Machinery, probe_loss: float) -> dict[str, Any]:
    """Fields of the `StartedRecord`."""
    config, start = at.config, machinery.start
    stream = machinery.stream
    return {
        "step": start.progress.step,
        "position": start.progress.position,
        "tokens": start.progress.tokens,
        "loaded": start.loaded.manifest.commit if start.loaded is not None else None,
        "condemned": tuple(Condemned(commit=commit, why=why) for commit, why in start.condemned),
        "precision": machinery.precision.name,
        "device": str(machinery.device),
        "parameters": sum(parameter.numel() for parameter in machinery.model.parameters()),
        "vocab_size": stream.vocab_size,
        "batch_samples": config.batch.sequences,
        "sample_tokens": config.batch.sequence_tokens,
        "total_steps": config.steps,
        "total_samples": stream.samples_per_epoch,
        "shards": stream.shard_names,
        "shard_samples": stream.shard_samples,
        "peak_lr": config.optimizer.peak_lr,
        "warmup_steps": config.schedule.warmup_steps,
        "probe_loss": probe_loss,
        "probe_expected": start.loaded.manifest.health.probe_loss if start.loaded is not None else None,
        "fresh_guards": start.fresh_guards,
        "replay": machinery.plan.replay is not None,
    }
