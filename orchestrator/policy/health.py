"""What becomes of checkpoints and recoveries as healthy steps pass: promotion, lineage, outcome. Pure."""

from monitors.records import CommitFailedRecord, CommitRecord, PlanAppliedRecord, StartedRecord, StepRecord
from monitors.taxonomy import TAINTING, IncidentClass
from orchestrator.policy import budgets, rows
from orchestrator.policy.aftercare import judge_recoveries, keep_course
from orchestrator.policy.context import Context
from orchestrator.policy.decisions import PruneCheckpoints, WriteVerdict
from orchestrator.policy.events import Moved
from orchestrator.policy.state import Commit, HistoryRow
from orchestrator.recovery.retention import Checkpoint, plan_retention
from trainer.contract.manifest import parse_commit_id

_ACCEPTED_AFTER_STEPS = 500  # as many as prove a checkpoint good after a slow divergence (DESIGN 6)


def on_step(ctx: Context, record: StepRecord) -> None:
    """Keep the position and promote what has proven itself."""
    state = ctx.state
    seconds = record.step_time_s.total if record.step_time_s is not None else 0.0
    if record.tokens and seconds > 0:
        state.tokens_per_s = record.tokens / seconds
    state.trained_s += seconds
    state.tokens += record.tokens or 0
    state.last_loss, state.last_lr = record.loss, record.lr
    row = HistoryRow(
        step=record.step,
        end=record.data.end if record.data is not None else state.position,
        at_s=state.now_s,
        loss=record.loss,
        grad_norm=record.grad_norm if record.grad_norm is not None else 0.0,
        skipped=record.skip_reason == "non_finite",
    )
    unhealthy = record.skipped or (record.prevention is not None and record.prevention.gave_in)
    came_to(ctx, row, healthy=not unhealthy)


def came_to(ctx: Context, row: HistoryRow, *, healthy: bool) -> None:
    """Updates were done, the last of them `row.step`; what follows from that for checkpoints and recoveries."""
    state = ctx.state
    state.phase, state.stepped = "running" if state.pending is None else state.phase, True
    state.step, state.position = row.step, row.end
    state.highest_step = max(state.highest_step, row.step)
    rows.keep(state.history, row)
    if not healthy:
        state.unhealthy_until_step = row.step
    if state.pending is not None:
        return  # the last steps of an attempt that is to leave prove nothing
    _accept_damage(ctx)
    _promote(ctx)
    judge_recoveries(ctx)


def _accept_damage(ctx: Context) -> None:
    """What nobody has undone (observe mode, or an evaluation that refuted it) is in the end the run's own course."""
    state = ctx.state
    if state.never_back_from is None:
        return
    tainting = any(i.is_open and i.cls in TAINTING for i in state.incidents[-64:])
    healthy_from = max(state.never_back_from, state.unhealthy_until_step)
    if not tainting and state.step - healthy_from >= _ACCEPTED_AFTER_STEPS:
        state.never_back_from = None


def _promote(ctx: Context) -> None:
    """Good = K healthy steps beyond it, nothing open or suspected that may reach back to it (DESIGN 9)."""
    state, needed = ctx.state, ctx.facts.good_after_steps
    waiting = [commit for commit in state.commits if commit.standing == "committed" and not commit.tainted]
    tainted_from = ctx.tainted_from() if waiting else None
    promoted = False
    for commit in waiting:
        proven = state.step - max(commit.step, state.unhealthy_until_step)
        if proven < needed or (tainted_from is not None and commit.step >= tainted_from):
            continue
        commit.standing, promoted = "good", True
        why = f"{proven} healthy steps beyond it"
        ctx.decide(WriteVerdict(commit=commit.id, verdict="good", why=why))
        budgets.on_good(ctx, commit)
    if promoted:
        _prune(ctx)


def _prune(ctx: Context) -> None:
    state = ctx.state
    if ctx.facts.trace:
        return
    restoring = [i.target_step for i in state.incidents[-64:] if i.is_open]
    plan = plan_retention(
        (_as_checkpoint(commit) for commit in state.commits if commit.where == "store"),
        keep_good=ctx.facts.keep_good,
        restoring=[commit.id for commit in state.commits if commit.step in restoring],
        keep_for=ctx.facts.keep_for,
        now_s=state.now_s,
    )
    doomed = list(plan.delete)
    if not any(incident.is_open for incident in state.incidents[-64:]):
        doomed, state.abandoned = doomed + state.abandoned, []
    if doomed:
        state.commits = [commit for commit in state.commits if commit.id not in doomed]
        ctx.decide(PruneCheckpoints(commits=tuple(doomed), epoch=state.epoch))


def _as_checkpoint(commit: Commit) -> Checkpoint:
    standing = "committed" if commit.tainted and commit.standing == "good" else commit.standing
    return Checkpoint(
        id=commit.id, step=commit.step, epoch=0, attempt=0, state=standing, verified=standing == "good",
        pinned=False, in_lineage=True, bytes=0, committed_at_s=commit.committed_at_s,
    )  # fmt: skip


def on_save_ended(ctx: Context, record: CommitRecord | CommitFailedRecord) -> None:
    """A save has come a place further, or to nothing. Of an attempt that is history, only what is known counts."""
    state = ctx.state
    known = next((commit for commit in state.commits if commit.id == record.commit), None)
    match record:
        case CommitRecord() if known is not None:
            known.where = "store" if record.tier == "store" else known.where
        case CommitRecord() if record.attempt == state.attempt:
            _on_commit(ctx, record)
        case CommitFailedRecord(gone=True) if known is not None and known.where == "disk":
            state.commits.remove(known)


def on_moved(ctx: Context, moved: Moved) -> None:
    """Another machine's disk is gone, and with it what had come no further; what it had claimed stays claimed."""
    state = ctx.state
    state.epoch = max(state.epoch, moved.claimed_epoch)
    state.commits = [commit for commit in state.commits if commit.id in moved.commits]
    for commit in state.commits:
        commit.where = "store"


def _on_commit(ctx: Context, record: CommitRecord) -> None:
    """A checkpoint exists."""
    state = ctx.state
    commit = Commit(
        id=record.commit, step=record.step, position=record.position, tokens=record.tokens, where=record.tier,
        committed_at_s=state.now_s,
    )  # fmt: skip
    if record.step == 0:
        commit.standing = "good"  # nothing was trained that could be wrong
        ctx.decide(WriteVerdict(commit=commit.id, verdict="good", why="initial state"))
    tainted_from = ctx.tainted_from()
    unrecovered = any(
        i.state in ("open", "evaluating", "diagnosing") and i.cls is not IncidentClass.TRANSIENT_SPIKE
        for i in ctx.taints()
    )
    commit.tainted = unrecovered and tainted_from is not None and record.step >= max(1, tainted_from)
    commit.tainted |= state.never_back_from is not None and record.step >= state.never_back_from
    state.commits.append(commit)
    state.commits.sort(key=lambda known: known.step)
    budgets.on_durable(ctx, commit)


def on_started(ctx: Context, record: StartedRecord) -> None:
    """A state is loaded: everything that lay beyond it leaves the lineage."""
    state = ctx.state
    for condemned in record.condemned:
        _condemn(ctx, condemned.commit, condemned.why)
    lost = max(0, state.step - record.step)
    tokens_lost = max(0, state.tokens - record.tokens)
    incident = next(
        (i for i in reversed(state.incidents) if i.state == "recovering" and i.attempt < state.attempt), None
    )
    if incident is not None and incident.cost.restart_s == 0.0:
        incident.cost.steps, incident.cost.tokens = lost, tokens_lost
        incident.cost.restart_s = max(0.0, state.now_s - incident.opened_at_s)
        if incident.resume_step is None:
            incident.resume_step = state.step
        if incident.target_step is not None:
            keep_course(ctx, incident, record.step)
    _settle_overtaken(ctx, record)
    left = [c for c in state.commits if c.step > record.step and parse_commit_id(c.id).attempt < record.attempt]
    state.abandoned += [commit.id for commit in left if commit.standing != "bad"]
    state.commits = [commit for commit in state.commits if commit not in left]
    state.evals = [row for row in state.evals if row[0] <= record.step]
    state.history = rows.up_to(state.history, record.step)
    if state.reanchoring:
        _reanchor(ctx, record, lost)
    else:
        _take_effect(ctx, (len(state.quarantines), len(state.overlays)), record.step, record.position)
    state.plans_sent.clear()
    state.undelivered = None
    if state.never_back_from is not None and record.step < state.never_back_from:
        state.never_back_from = None
    state.step, state.position, state.tokens = record.step, record.position, record.tokens
    state.loaded_step = record.step
    state.unhealthy_until_step = min(state.unhealthy_until_step, record.step)
    state.peak_lr, state.precision = record.peak_lr, record.precision
    state.total_samples = record.total_samples
    state.shard_names, state.shard_samples = list(record.shards), list(record.shard_samples)


def on_plan_applied(ctx: Context, record: PlanAppliedRecord) -> None:
    """A running trainer obeys at its next boundary: what is new holds from there, whoever runs those steps again."""
    counts = ctx.state.plans_sent.pop(record.command, None)
    if counts is not None:
        _take_effect(ctx, counts, record.step, record.position)


def _take_effect(ctx: Context, counts: tuple[int, int], step: int, position: int) -> None:
    state = ctx.state
    quarantines, overlays = state.in_effect
    state.quarantines[quarantines : counts[0]] = [
        q.model_copy(update={"from_position": max(q.from_position, position)})
        for q in state.quarantines[quarantines : counts[0]]
    ]
    state.overlays[overlays : counts[1]] = [
        o.model_copy(update={"from_step": max(o.from_step, step + 1)}) for o in state.overlays[overlays : counts[1]]
    ]
    state.in_effect = (max(quarantines, counts[0]), max(overlays, counts[1]))


def _settle_overtaken(ctx: Context, record: StartedRecord) -> None:
    """What was going on when an attempt ended is left behind: the state is from before it, the diagnosis starts anew.

    If it is still there it will be found again, as a new incident.
    """
    for incident in ctx.state.incidents[-64:]:
        if incident.attempt < record.attempt and incident.is_open and incident.state != "recovering":
            incident.state, incident.outcome, incident.end_step = "closed", "superseded", ctx.state.step
            incident.key = None
            for commit in ctx.state.commits:  # only if nothing older was left to load
                commit.tainted |= incident.cls in TAINTING and commit.step >= max(1, incident.onset_step)


def _reanchor(ctx: Context, record: StartedRecord, lost: int) -> None:
    """A training rollback: quarantines and overlays that began later hold from here; a crash leaves them be."""
    state = ctx.state
    state.discarded_steps += lost
    state.best_durable_step = min(state.best_durable_step, record.step)
    state.quarantines = [
        q.model_copy(update={"from_position": min(q.from_position, record.position)}) for q in state.quarantines
    ]
    state.overlays = [o.model_copy(update={"from_step": min(o.from_step, record.step + 1)}) for o in state.overlays]
    state.in_effect = (len(state.quarantines), len(state.overlays))


def _condemn(ctx: Context, commit_id: str, why: str) -> None:
    for commit in ctx.state.commits:
        if commit.id == commit_id:
            commit.standing = "bad"
    ctx.decide(WriteVerdict(commit=commit_id, verdict="bad", why=why))
    ctx.notify("warning", f"checkpoint {commit_id} condemned", why)
