"""Events and records for tests, with everything filled in that a test does not care about."""

from typing import Any

from monitors.records import DataRange, StartedRecord, StepRecord, StepTime
from orchestrator.policy.events import RecordReceived


def step_record(attempt: int, step: int, seq: int | None = None, **changes: Any) -> StepRecord:
    """One update."""
    fields: dict[str, Any] = {
        "seq": seq or step, "attempt": attempt, "at_s": 1.0, "step": step, "loss": 2.0, "grad_norm": 1.0, "lr": 1e-3,
        "tokens": 8, "step_time_s": StepTime(data=0.1, compute=0.3, other=0.1),
        "data": DataRange(begin=step * 4 - 4, end=step * 4),
    }  # fmt: skip
    return StepRecord.model_validate(fields | changes)


def started_record(attempt: int, step: int, seq: int = 1, **changes: Any) -> StartedRecord:
    """A load, or a fresh start at step 0."""
    fields: dict[str, Any] = {
        "seq": seq, "attempt": attempt, "at_s": 1.0, "step": step, "position": 0, "tokens": 0, "loaded": None,
        "precision": "fp32", "device": "cpu", "parameters": 1, "vocab_size": 2, "batch_samples": 4,
        "sample_tokens": 2, "total_steps": 10, "total_samples": 40, "shards": ("a",), "peak_lr": 1e-3,
        "warmup_steps": 0,
    }  # fmt: skip
    return StartedRecord.model_validate(fields | changes)


def received(record: StepRecord | StartedRecord) -> RecordReceived:
    """As the engine gets it."""
    return RecordReceived(at_s=1.0, record=record)
