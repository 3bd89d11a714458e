"""One line for each thing that happens in a launch: `word key=value ...`, so that grep and awk can read a log.

Text values are quoted as JSON where they have spaces. What is not worth a line has none.
"""

import json
import re

from monitors.records import (
    CommitFailedRecord,
    CommitRecord,
    ErrorRecord,
    EvalRecord,
    FaultRecord,
    PlanAppliedRecord,
    Record,
    StartedRecord,
    StepRecord,
)
from orchestrator.policy.decisions import Decision, EndRun, Notify, StartAttempt, StopAttempt
from orchestrator.policy.events import AttemptExited, Event, HangConfirmed, HangSuspected, RecordReceived
from orchestrator.policy.state import Incident
from trainer.contract.plan import ResumePlan

_PLAIN = re.compile(r"[A-Za-z0-9_.,:/+%@-]+")
Value = str | int | float | None


def line(word: str, **values: Value) -> str:
    """`word key=value ...`; unknown values are left out."""
    parts = [f"{key}={_text(value)}" for key, value in values.items() if value is not None]
    return " ".join([word, *parts])


def step_line(record: StepRecord, tokens_per_s: float | None = None) -> str:
    """What one update gave."""
    return line(
        "step",
        step=record.step,
        loss=round(record.loss, 4),
        grad_norm=record.grad_norm,
        lr=record.lr,
        tokens_per_s=round(tokens_per_s) if tokens_per_s else None,
        skipped=record.skip_reason,
    )


def event_line(event: Event) -> str | None:
    """The line of an event; steps have theirs on a clock (`step_line`)."""
    match event:
        case RecordReceived():
            return _record_line(event.record)
        case AttemptExited():
            return line(
                "exit",
                attempt=event.attempt,
                cause=event.cause,
                code=event.code,
                signal=event.signum,
                detail=event.detail or None,
            )
        case HangSuspected() | HangConfirmed():
            return line(
                event.kind, attempt=event.attempt, phase=event.phase, step=event.step, silent_s=round(event.silent_s, 1)
            )
    return None


def decision_line(decision: Decision) -> str | None:
    """The line of a decision; commands and housekeeping have none."""
    match decision:
        case StartAttempt():
            return _start_line(decision.plan)
        case StopAttempt():
            return line("stop", attempt=decision.attempt, how=decision.how, because=decision.because)
        case Notify():
            return line("notify", level=decision.level, title=decision.title, text=decision.text)
        case EndRun():
            return line("end", state=decision.state, exit_code=decision.exit_code, because=decision.because)
    return None


def _new(why: str, told: str | None) -> str | None:
    """What a `why` says beyond what was told: it grows by clauses."""
    if told is None or not why.startswith(told):
        return why
    return why.removeprefix(told).lstrip("; ") or None


def incident_line(incident: Incident, *, told: str | None = None) -> str:
    """Where an incident stands; `told` is the `why` that was said of it before and need not be said again."""
    return line(
        "incident",
        id=incident.id,
        **{"class": incident.cls.value},
        state=incident.state,
        onset=incident.onset_step,
        detected=incident.detected_step,
        end=incident.end_step,
        did=None if incident.observed else ",".join(incident.decision) or None,
        would_do=(",".join(incident.decision) or None) if incident.observed else None,
        outcome=incident.outcome or None,
        why=_new(incident.why, told),
    )


def _start_line(plan: ResumePlan) -> str:
    """What is resumed, and why: the first candidate is what is tried first."""
    return line(
        "start",
        attempt=plan.attempt,
        resume=plan.candidates[0] if plan.candidates else "fresh",
        skips=len(plan.skips) or None,
        quarantined=",".join(str(quarantine.shard) for quarantine in plan.quarantines) or None,
        overlays=len(plan.overlays) or None,
        because=plan.because or None,
    )


def _record_line(record: Record) -> str | None:
    match record:
        case StartedRecord():
            return line(
                "started",
                attempt=record.attempt,
                step=record.step,
                loaded=record.loaded or "nothing",
                condemned=",".join(one.commit for one in record.condemned) or None,
                precision=record.precision,
                device=record.device,
                parameters=record.parameters,
            )
        case EvalRecord():
            return line("eval", step=record.step, loss=round(record.loss, 4), perplexity=round(record.perplexity, 3))
        case CommitRecord(tier="store"):
            return line("checkpoint", step=record.step, id=record.commit, seconds=round(record.seconds, 2))
        case CommitFailedRecord():
            return line("checkpoint_failed", step=record.step, error=record.error)
        case PlanAppliedRecord():
            return line("plan_applied", step=record.step, position=record.position)
        case ErrorRecord():
            return line("error", step=record.step, type=record.type, message=record.message)
        case FaultRecord():
            return line("fault", step=record.step, fault=record.fault, count=record.count)
    return None


def _text(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
