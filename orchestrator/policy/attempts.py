"""The life of attempts: what is started, and what follows when one has ended. Pure."""

import hashlib
from typing import Literal

from monitors.taxonomy import IncidentClass
from orchestrator.policy import diagnose
from orchestrator.policy.budgets import allow_restart, backoff_s
from orchestrator.policy.context import Context
from orchestrator.policy.decisions import EXIT_CODES, CaptureEvidence, EndRun, StartAttempt
from orchestrator.policy.events import AttemptExited
from orchestrator.policy.model import Actions, Backoff
from orchestrator.policy.rules import choose
from orchestrator.policy.state import EngineState, Failure, Incident, Recovery
from orchestrator.recovery.target import process_candidates
from trainer.contract.plan import ResumePlan, Segment

#: What a program does by itself: the same again from the same state is no bad luck. Of the others the world may change.
_OF_THE_PROGRAM = frozenset({"error", "user_error", "cuda_oom", "native_crash", "gpu"})
_IDLE_MOST_S = 300.0
_ASSUMED_S = 86_400.0
_GRACEFUL = ("preempted", "orphaned", "left")
#: What passes by waiting and says nothing about the state: no older one is tried for it, only the budget ends it.
_OUTAGES = ("data_unreachable",)


def start(ctx: Context, recovery: Recovery, wait_s: float = 0.0) -> None:
    """Decide the next attempt. Without any checkpoint of this run it starts fresh, with one it never does."""
    assert recovery.candidates or not ctx.state.commits
    state = ctx.state
    state.attempt += 1
    state.epoch += 1
    state.alive, state.spawned, state.stepped, state.loaded_step = True, False, False, None
    state.reanchoring = recovery.reanchor
    state.phase = "starting" if recovery.incident is None else "recovering"
    plan = ResumePlan(
        run_id=ctx.facts.run_id,
        attempt=state.attempt,
        epoch=state.epoch,
        candidates=tuple(recovery.candidates),
        fresh=not recovery.candidates,
        branch=state.branch,
        reanchor=recovery.reanchor,
        segments=_segments(ctx),
        skips=tuple(state.skips),
        deferred_from=state.deferred_from,
        quarantines=tuple(state.quarantines),
        overlays=tuple(state.overlays),
        failure_every_s=failure_every_s(state),
        incident=recovery.incident,
        because=recovery.because,
    )
    if recovery.kind == "diagnose" and state.replay is not None:
        plan = diagnose.planned(state.replay, plan)
    not_before_s = state.now_s - state.clock_set_back_s + wait_s
    ctx.decide(StartAttempt(plan=plan, not_before_s=not_before_s, wait_s=wait_s, incident=recovery.incident))


def failure_every_s(state: EngineState) -> float:
    """Mean time between failures of the process: observed, with one failure a day assumed beforehand."""
    failures = sum(incident.cls in (IncidentClass.CRASH, IncidentClass.HANG) for incident in state.incidents)
    return (state.trained_s + _ASSUMED_S) / (failures + 1)


def _segments(ctx: Context) -> tuple[Segment, ...]:
    """The order of the data. Another one begins where nothing was read, nor anything decided by position."""
    state = ctx.state
    if state.order is not None and (not state.segments or state.segments[-1].spec != state.order):
        begin = max([state.position, *(skip.end for skip in state.skips)])
        kept = [segment for segment in state.segments if segment.from_position < begin]
        state.segments = kept
        if not kept or kept[-1].spec != state.order:  # else back to what it was, before anything else was read
            fresh = Segment(from_position=begin if kept else 0, **dict(state.order))
            state.segments = [*kept, fresh]
            if kept:
                ctx.notify("info", "data changed", _said(kept[-1], fresh))
    return tuple(state.segments)


def _said(old: Segment, new: Segment) -> str:
    mix = ", ".join(f"{share.source} {share.weight:g}" for share in new.mix)
    added = new.num_shards - old.num_shards
    return f"from raw position {new.from_position} on: {mix}; {added} shards were added to the {old.num_shards}"


def on_exit(ctx: Context, event: AttemptExited) -> Incident | None:
    """An attempt is dead: carry out what was waiting for it, or answer its cause.

    Returns:
        The incident whose diagnosis has just come to a verdict and that wants its answer, if any.
    """
    state = ctx.state
    if event.attempt != state.attempt or not state.alive:
        return None  # a late report about an attempt that is already history
    state.alive = state.spawned = False
    state.evaluations.clear()
    pending, state.pending = state.pending, None
    if pending is not None and pending.kind != "diagnose":
        _carry_out(ctx, pending, event)
        return None
    if state.replay is not None:
        if pending is None:
            diagnose.conclude(state, completed=event.cause == "replay_done")
        return _next_replay(ctx)
    if event.cause == "finished":
        _end(ctx, "finished", "all planned steps are done and the last checkpoint is committed")
    else:
        _answer(ctx, event)
    return None


def _next_replay(ctx: Context) -> Incident | None:
    """Run the next replay, or hand out the incident whose verdict is settled."""
    state = ctx.state
    assert state.replay is not None
    incident = state.incident(state.replay.incident)
    assert incident is not None
    if incident.verdict is None:
        because = f"diagnosis of incident {incident.id}: {diagnose.said(state.replay)}"
        candidates = state.replay.candidates
        start(ctx, Recovery(kind="diagnose", incident=incident.id, candidates=candidates, because=because))
        return None
    state.replay = None
    return incident


def _carry_out(ctx: Context, pending: Recovery, event: AttemptExited) -> None:
    match pending.kind:
        case "restart":
            start(ctx, pending)
        case "diagnose":
            pass  # handled by the caller
        case "halt" | "budget":
            end_for(ctx, pending)
        case "stop" | "preempt":
            if event.cause == "finished":
                _end(ctx, "finished", "the last step was done when the stop came")
            else:
                stop(ctx, pending.kind, pending.because)


def stop(ctx: Context, kind: Literal["stop", "preempt"], because: str) -> None:
    """End as asked. With a checkpoint to go on from the run can be launched again, and it is said what is not in it."""
    state = ctx.state
    saved = max((commit.step for commit in state.commits if commit.standing != "bad"), default=None)
    phase, signum = ("stopped", 130) if kind == "stop" else ("preempted", 143)
    if saved is None:
        _end(ctx, phase, f"{because}; there is no checkpoint yet", exit_code=signum)
        return
    lost = state.step - saved
    unsaved = f", the {lost} steps after it are not" if lost > 0 else ""
    _end(ctx, phase, f"{because}; checkpoint of step {saved} is saved{unsaved}")


def end_for(ctx: Context, recovery: Recovery) -> None:
    """End the run because the policy says so; a person must take it up again."""
    if recovery.kind == "budget":
        _end(ctx, "budget_used_up", recovery.because)
    else:
        _end(ctx, "halted", recovery.because)


def _answer(ctx: Context, event: AttemptExited) -> None:
    state = ctx.state
    cls = _class_of(event.cause)
    why = f"attempt {event.attempt} ended at step {state.step}: {event.cause}"
    if event.detail:
        why += f" ({event.detail})"
    incident = ctx.open_incident(cls, state.step, state.step, why)
    incident.cause = event.cause
    incident.phase, state.hang_phase = state.hang_phase, None
    incident.resume_step = state.step
    rule = choose(ctx.policy, incident, ctx.facts)
    actions = rule.rungs()[0] if rule else Actions()
    incident.decision = [str(name) for name in actions.names()]
    if actions.capture is not None:
        ctx.decide(CaptureEvidence(attempt=event.attempt, incident=incident.id))
    if actions.notify is not None:
        ctx.notify(actions.notify.level, f"{cls}: {event.cause}", why, incident.id)
    if actions.halt is not None or not (actions.restart or actions.widen_rollback):
        incident.state, incident.outcome, incident.end_step = "closed", "halted", state.step
        _end(ctx, "halted", why)
        return
    if _is_deterministic(ctx, event):
        incident.decision.append("halt")
        incident.state, incident.outcome, incident.end_step = "closed", "halted", state.step
        reason = f"twice the same failure at the same step from the same state, so a third try would fail too: {why}"
        ctx.notify("page", "deterministic failure", reason, incident.id)
        _end(ctx, "halted", reason)
        return
    wait_s = _wait_s(ctx, incident, event.cause, rule.backoff if rule else None)
    if wait_s is not None:
        restart(ctx, incident, wait_s, skip_newest=actions.widen_rollback is not None)


def _is_deterministic(ctx: Context, event: AttemptExited) -> bool:
    """Same cause, exception and frames, within a step, from the same checkpoint, twice in a row (research: ByteRobust
    saw one message from 21 causes of infrastructure and 41 of users' code; only the repetition tells them apart)."""
    state = ctx.state
    exception = event.detail.partition(":")[0] if event.frames else ""
    failure = Failure(
        signature=" ".join((event.cause, str(event.signum or ""), exception, *event.frames)), step=state.step,
        loaded_step=state.loaded_step,
    )  # fmt: skip
    before, state.last_failure = state.last_failure, failure
    told = bool(event.frames) or (event.cause == "native_crash" and state.stepped)  # else there is nothing to compare
    if event.cause not in _OF_THE_PROGRAM or not told or before is None:
        return False
    near = abs(before.step - failure.step) <= 1 and before.loaded_step == failure.loaded_step
    return near and before.signature == failure.signature


def _wait_s(ctx: Context, incident: Incident, cause: str, backoff: Backoff | None) -> float | None:
    """How long to wait before the next attempt; None if there is none, and the run has ended."""
    state = ctx.state
    if incident.cls is IncidentClass.PREEMPTION:  # as often as it likes, but not in a circle
        state.idle_departures = 0 if state.stepped else state.idle_departures + 1
        return min(_IDLE_MOST_S, 2.0**state.idle_departures - 1.0)
    if cause in _OUTAGES:
        failures = state.outages = 1 if state.stepped else state.outages + 1
    else:
        failures = state.attempts_without_progress = state.attempts_without_progress + 1
        if not _may_try_again(ctx, incident):
            return None
    return backoff_s(backoff, failures, _fraction(ctx)) if _has_budget(ctx, incident) else None


def restart(ctx: Context, incident: Incident, wait_s: float = 0.0, *, skip_newest: bool = False) -> None:
    """Start again from the newest state that nothing speaks against; the old attempt is dead."""
    state = ctx.state
    widenings = state.attempts_without_progress // ctx.policy.on_no_progress.attempts + skip_newest
    incident.state = "recovering"
    go_on(ctx, Recovery(kind="restart", incident=incident.id, because=incident.why), widenings, wait_s)


def go_on(ctx: Context, recovery: Recovery, widenings: int = 0, wait_s: float = 0.0) -> None:
    """Start from the newest state that nothing speaks against; a rollback that was decided and not yet loaded holds."""
    state = ctx.state
    names = [commit.id for commit in process_candidates(state.commits, ctx.tainted_from())]
    if state.undelivered is not None:
        present = {commit.id for commit in state.commits if commit.standing != "bad"}
        names = [name for name in state.undelivered.candidates if name in present]
        recovery.reanchor = True
    if state.commits and not names:
        _end(ctx, "halted", f"{recovery.because}; no checkpoint is left that nothing speaks against")
        return
    recovery.candidates = names[min(widenings, max(0, len(names) - 1)) :]
    start(ctx, recovery, wait_s)


def _may_try_again(ctx: Context, incident: Incident) -> bool:
    state, rule = ctx.state, ctx.policy.on_no_progress
    failed = state.attempts_without_progress
    if failed and failed % rule.attempts == 0:
        action = rule.do[min(failed // rule.attempts, len(rule.do)) - 1]
        incident.decision.append(action)
        if action == "halt":
            incident.state, incident.outcome, incident.end_step = "closed", "halted", state.step
            reason = f"{failed} attempts in a row without a new durable step; the last: {incident.why}"
            ctx.notify("page", "no progress", reason, incident.id)
            _end(ctx, "halted", reason)
            return False
    return True


def _has_budget(ctx: Context, incident: Incident) -> bool:
    state = ctx.state
    if not allow_restart(ctx):
        incident.state, incident.outcome, incident.end_step = "closed", "halted", state.step
        budget = ctx.policy.budgets.process
        reason = f"more than {budget.restarts} restarts in {budget.per:.0f} s; the last: {incident.why}"
        ctx.notify("page", "restart budget used up", reason, incident.id)
        _end(ctx, "budget_used_up", reason)
        return False
    return True


def _class_of(cause: str) -> IncidentClass:
    if cause in _GRACEFUL:
        return IncidentClass.PREEMPTION
    if cause in ("data", "data_unreachable"):
        return IncidentClass.DATA_ERROR
    return IncidentClass.HANG if cause == "hang" else IncidentClass.CRASH


def _fraction(ctx: Context) -> float:
    """A number in [0, 1) that differs from run to run and attempt to attempt, yet is a pure function of both."""
    digest = hashlib.sha256(f"{ctx.facts.run_id}/{ctx.state.attempt}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _end(ctx: Context, phase: str, because: str, *, exit_code: int | None = None) -> None:
    code = EXIT_CODES[phase] if exit_code is None else exit_code
    decision = EndRun.model_validate({"state": phase, "exit_code": code, "because": because})
    ctx.state.phase = decision.state
    ctx.decide(decision)
