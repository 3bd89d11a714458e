"""The policy engine: a fold of events into decisions, and the only door through which a run's state changes.

`fold` is pure in effect: same state, policy and event, same result. Time is `event.at_s`, made monotonic here. The
shell journals what goes in and what comes out, and carries decisions out (DESIGN 1). `assert_never` makes the type
checker prove that every event is handled.
"""

from collections.abc import Iterable
from typing import Literal, assert_never

from pydantic import BaseModel, ConfigDict

from monitors.diagnosis import Diagnosis
from monitors.records import (
    CommitFailedRecord,
    CommitRecord,
    EvalRecord,
    PlanAppliedRecord,
    Record,
    SnapshotRecord,
    StartedRecord,
    StepRecord,
)
from monitors.taxonomy import Finding, IncidentClass
from orchestrator.policy import attempts, diagnose, health, stretch
from orchestrator.policy.context import Context
from orchestrator.policy.decisions import EXIT_CODES, CaptureEvidence, Decision, EndRun, SendCommand, StopAttempt
from orchestrator.policy.events import (
    AttemptExited,
    AttemptSpawned,
    CheckpointRequested,
    CheckpointsPruned,
    Event,
    FindingMade,
    HangConfirmed,
    HangSuspected,
    RecordReceived,
    ResumeRequested,
    RunOpened,
    StepsPassed,
    StopRequested,
    Ticked,
)
from orchestrator.policy.model import Policy
from orchestrator.policy.respond import expire_evaluations, on_evaluation, on_finding, respond
from orchestrator.policy.state import ENDED, EngineState, Incident, Recovery, ReplayRow, RunFacts, RunStatus
from orchestrator.recovery.target import needed
from trainer.contract.commands import CheckpointNow
from trainer.contract.plan import overlay_factor


class _Snapshot(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    version: Literal[1] = 1
    state: EngineState
    diagnosis: dict[str, object]


class Engine:
    """State and fold of one run. `policy` should already have the shipped rules behind its own."""

    def __init__(self, policy: Policy, facts: RunFacts) -> None:
        self.policy = policy
        self.facts = facts
        self.state = EngineState()
        self._diagnosis = Diagnosis(policy.detect, planned_changes=facts.planned_changes)

    def fold(self, event: Event) -> list[Decision]:  # noqa: C901  one arm per kind of event
        """Take one event in and return what is to be done about it, in order."""
        self._tell_time(event.at_s)
        ctx = Context(self.state, self.policy, self.facts)
        match event:
            case RunOpened():
                self._opened(ctx, event)
            case RecordReceived():
                self._record(ctx, event.record)
            case StepsPassed():
                self._steps(ctx, event)
            case FindingMade():
                if event.attempt == self.state.attempt and self.state.replay is None:
                    self._found(ctx, [event.finding])
            case AttemptSpawned():
                self.state.spawned = event.attempt == self.state.attempt
            case AttemptExited():
                incident = attempts.on_exit(ctx, event)
                if incident is not None:
                    respond(ctx, incident)
            case HangSuspected():
                if event.attempt == self.state.attempt:
                    ctx.decide(CaptureEvidence(attempt=event.attempt))
            case HangConfirmed():
                self._hang(ctx, event)
            case StopRequested():
                self._stop(ctx, event)
            case ResumeRequested():
                self._resume(ctx, event)
            case CheckpointRequested():
                if self.state.alive:
                    command = CheckpointNow(id=ctx.next_command())
                    ctx.decide(SendCommand(attempt=self.state.attempt, command=command))
            case CheckpointsPruned():
                self.state.commits = [commit for commit in self.state.commits if commit.id not in event.commits]
            case Ticked():
                self._overdue(ctx)
            case _:
                assert_never(event)
        return ctx.decisions

    def _tell_time(self, at_s: float) -> None:
        """A clock that was wrong and is put right must neither stop time nor make a later start wait for it."""
        state = self.state
        state.clock_set_back_s = max(state.clock_set_back_s, state.now_s - at_s)
        state.now_s = max(state.now_s, at_s + state.clock_set_back_s)

    # -- events -------------------------------------------------------------------------------------------------

    def _opened(self, ctx: Context, event: RunOpened) -> None:
        state = self.state
        if state.policy_digest and (state.config_digest, state.policy_digest) != (
            event.config_digest,
            event.policy_digest,
        ):
            ctx.notify("info", "configuration changed", "run.yaml or policy differ from those of the last launch")
        if event.order is not None:
            state.order = event.order
        state.config_digest, state.policy_digest = event.config_digest, event.policy_digest
        if event.moved is not None:
            health.on_moved(ctx, event.moved)
        if state.phase == "new":
            attempts.start(ctx, Recovery(kind="restart", because="first launch"))
        elif state.phase in ("stopped", "preempted", "failed"):
            self._restart(ctx, "launched again")
        elif state.phase in ("halted", "budget_used_up"):
            because = "halted: look at `longwatch incidents`, then `longwatch resume RUN --because TEXT`"
            ctx.decide(EndRun(state=state.phase, exit_code=EXIT_CODES[state.phase], because=because))
        elif state.phase == "finished" and self.facts.total_steps > state.step:
            self._restart(ctx, f"{self.facts.total_steps} steps are planned now, {state.step} are done")
        elif state.phase == "finished":
            ctx.decide(
                EndRun(state="finished", exit_code=EXIT_CODES["finished"], because="the run is finished already")
            )

    def _restart(self, ctx: Context, because: str) -> None:
        attempts.go_on(ctx, Recovery(kind="restart", because=because))

    def _record(self, ctx: Context, record: Record) -> None:
        state = self.state
        if isinstance(record, CommitRecord | CommitFailedRecord):
            health.on_save_ended(ctx, record)  # also of an attempt that is history: its last save may still arrive
        if record.attempt != state.attempt:
            return  # a late datagram of an attempt that is history
        replaying = state.replay is not None and state.pending is None
        match record:
            case StepRecord():
                if record.replay or replaying:
                    grad_norm = record.grad_norm if record.grad_norm is not None else 0.0
                    skipped = record.skip_reason == "non_finite"
                    row = ReplayRow(loss=record.loss, grad_norm=grad_norm, skipped=skipped)
                    diagnose.on_replay_step(state, record.step, row)
                    return
                health.on_step(ctx, record)
                expire_evaluations(ctx)
                self._overdue(ctx)
            case StartedRecord():
                if replaying and state.replay is not None:
                    state.replay.runs.append({})
                if replaying or record.replay:  # of a replay that was stopped while it loaded
                    return
                health.on_started(ctx, record)
                quarantined = tuple(quarantine.shard for quarantine in state.quarantines)
                self._diagnosis.rewind(record.step, expect_same=self._same_expected(), quarantined=quarantined)
                self._diagnosis.note_overlays(self._overlay_spans())
            case PlanAppliedRecord() if not replaying:
                health.on_plan_applied(ctx, record)
            case SnapshotRecord(next_steps=int() as steps):
                state.save_every, state.save_because = steps, record.because
            case EvalRecord() if not replaying:
                self._evaluated(ctx, record)
        if not replaying:
            self._observe(ctx, record)

    def _evaluated(self, ctx: Context, record: EvalRecord) -> None:
        state = self.state
        state.last_eval = (record.step, record.loss)
        state.evals = [*state.evals[-63:], (record.step, record.loss)]
        if record.command is not None and state.pending is None:
            on_evaluation(ctx, record.command, record.loss)

    def _steps(self, ctx: Context, event: StepsPassed) -> None:
        state = self.state
        if event.attempt != state.attempt:
            for save in event.saves:
                health.on_save_ended(ctx, save)
        elif event.replay or (state.replay is not None and state.pending is None):
            stretch.replay_steps(ctx, event)
        else:
            stretch.pass_steps(ctx, event, lambda: expire_evaluations(ctx), lambda: self._overdue(ctx))

    def _observe(self, ctx: Context, record: Record) -> None:
        self._found(ctx, self._diagnosis.observe(record))

    def _found(self, ctx: Context, findings: Iterable[Finding]) -> None:
        overlays = len(self.state.overlays)
        for finding in findings:
            if self.state.pending is None:  # what comes after the decision to leave belongs to a dead branch
                on_finding(ctx, finding)
        if len(self.state.overlays) != overlays:
            self._diagnosis.note_overlays(self._overlay_spans())

    def _same_expected(self) -> bool:
        """An exact resume: nothing was skipped, cut or reseeded for the incident that this attempt answers."""
        incident = next((i for i in reversed(self.state.incidents) if i.state == "recovering"), None)
        return incident is None or incident.cls in _EXACT_RESUMES

    def _overlay_spans(self) -> tuple[tuple[int, int], ...]:
        """Where the LR ramps back, the loss rises by intention; while it is held down, a rise is as real as ever."""
        ramps = (overlay for overlay in self.state.overlays if not overlay.keep)
        return tuple((ramp.hold_until_step, ramp.hold_until_step + ramp.ramp_steps) for ramp in ramps)

    def _hang(self, ctx: Context, event: HangConfirmed) -> None:
        state = self.state
        if event.attempt != state.attempt or not state.alive:
            return
        state.hang_phase = event.phase
        because = f"no progress in phase {event.phase} for {event.silent_s:.0f} s"
        ctx.decide(StopAttempt(attempt=event.attempt, how="kill", because=because))

    def _stop(self, ctx: Context, event: StopRequested) -> None:
        state = self.state
        if state.phase in ENDED:
            return
        kind: Literal["stop", "preempt"] = "stop" if event.by == "operator" else "preempt"
        because = "stopped by the operator" if kind == "stop" else "the machine asked us to leave"
        if not state.spawned:  # between attempts, or waiting to start one: there is nothing to save
            state.alive = False
            attempts.stop(ctx, kind, because)
            return
        asked_before = state.pending is not None and state.pending.kind in ("stop", "preempt")
        leaving_bad_state = (state.pending is not None and not asked_before) or state.replay is not None
        if state.pending is None or state.pending.kind in ("restart", "diagnose"):
            state.pending = Recovery(kind=kind, because=because)
            state.replay = None
        state.phase = "stopping"
        how: Literal["save", "leave"] = "leave" if leaving_bad_state or not event.save else "save"
        ctx.decide(StopAttempt(attempt=state.attempt, how=how, because=because))

    def _resume(self, ctx: Context, event: ResumeRequested) -> None:
        state = self.state
        if state.phase not in ("halted", "budget_used_up"):
            return
        state.attempts_without_progress, state.last_failure = 0, None
        state.restarts_at_s.clear()
        state.rollbacks_used = 0
        state.warm_up_rollbacks = 0
        state.discarded_steps = 0
        halted = next((incident for incident in reversed(state.incidents) if incident.outcome == "halted"), None)
        if halted is not None and halted.cls is IncidentClass.LOSS_DISCONTINUITY:
            self._diagnosis.accept_other_losses()  # or every resume would end in the same comparison
        ctx.notify("info", "resumed by a person", event.because)
        self._restart(ctx, f"resumed by a person: {event.because}")

    def _overdue(self, ctx: Context) -> None:
        state, facts = self.state, self.facts
        stored = [commit.step for commit in state.commits if commit.where == "store"]
        every = facts.checkpoint_every or state.save_every
        if state.phase != "running" or not stored or every is None or facts.trace:
            return
        since = stored[-1]
        silent = state.step - since
        overdue, told = silent >= ctx.policy.guards.checkpoint_overdue_factor * every, state.overdue_told
        state.overdue_told = overdue
        if overdue and not told:  # once an outage, also while what has gathered is on its way
            why = f"{silent} steps since the last checkpoint in the store, one is due every {every}"
            respond(ctx, ctx.open_incident(IncidentClass.CHECKPOINT_OVERDUE, since, state.step, why))

    # -- what the shell and people read ---------------------------------------------------------------------------

    def incidents(self) -> list[Incident]:
        """Every incident of the run, oldest first."""
        return self.state.incidents

    def status(self) -> RunStatus:
        """The run as it stands."""
        state, budgets = self.state, self.policy.budgets
        good = [commit.step for commit in state.commits if commit.standing == "good" and not commit.tainted]
        return RunStatus(
            state=_PUBLIC_STATE[state.phase],
            step=state.step,
            total_steps=self.facts.total_steps,
            attempt=state.attempt,
            loss=state.last_loss,
            lr=state.last_lr,
            tokens=state.tokens,
            tokens_per_s=state.tokens_per_s,
            validation=state.last_eval,
            last_good_step=max(good, default=None),
            last_commit_step=max((c.step for c in state.commits), default=None),
            last_stored_step=max((c.step for c in state.commits if c.where == "store"), default=None),
            checkpoint_interval=self._interval_text(),
            rollbacks_left=budgets.training.rollbacks - state.rollbacks_used,
            restarts_left=budgets.process.restarts - len(state.restarts_at_s),
            open_incidents=sum(incident.is_open for incident in state.incidents),
            incidents=len(state.incidents),
            lr_factor=overlay_factor(tuple(state.overlays), state.step + 1),
            mode=self.policy.mode,
            quarantined_shards=[self._shard_name(q.shard) for q in state.quarantines],
        )

    def _interval_text(self) -> str:
        if self.facts.checkpoint_every is not None:
            return f"every {self.facts.checkpoint_every:,} steps, as configured"
        if self.state.save_every is None:
            return "automatic, nothing is measured yet"
        return f"every {self.state.save_every:,} steps: {self.state.save_because}"

    def _shard_name(self, shard: int) -> str:
        names = self.state.shard_names
        return names[shard] if shard < len(names) else str(shard)

    def needed(self) -> tuple[str, ...]:
        """What a recovery of this moment would load, and so does not leave the local disk before it is stored."""
        state = self.state
        awaited = state.undelivered.candidates[:1] if state.undelivered is not None else []
        return needed(state.commits, Context(state, self.policy, self.facts).tainted_from(), awaited)

    # -- snapshots ------------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """The whole state as JSON."""
        snapshot = _Snapshot(state=self.state, diagnosis=self._diagnosis.to_state())
        return snapshot.model_dump_json().encode()

    @classmethod
    def restore(cls, policy: Policy, facts: RunFacts, snapshot: bytes) -> "Engine":
        """The engine as it was when the snapshot was taken, under the policy and facts of now.

        Raises:
            pydantic.ValidationError: it is not a snapshot of this version.
        """
        parsed = _Snapshot.model_validate_json(snapshot)
        engine = cls(policy, facts)
        engine.state = parsed.state
        engine._diagnosis = Diagnosis.from_state(policy.detect, parsed.diagnosis, planned_changes=facts.planned_changes)
        return engine


#: What is answered by an exact resume, so that the same data must give the same losses again. After an `lr_mismatch`
#: it must not: the recorded losses were those of another learning rate.
_EXACT_RESUMES = frozenset(
    {IncidentClass.CRASH, IncidentClass.HANG, IncidentClass.PREEMPTION, IncidentClass.LOSS_DISCONTINUITY}
)
_PUBLIC_STATE: dict[str, Literal["starting", "running", "recovering", "stopped", "halted", "finished", "failed"]] = {
    "new": "starting",
    "starting": "starting",
    "running": "running",
    "recovering": "recovering",
    "stopping": "running",
    "finished": "finished",
    "halted": "halted",
    "stopped": "stopped",
    "preempted": "stopped",
    "failed": "failed",
    "budget_used_up": "halted",
}
