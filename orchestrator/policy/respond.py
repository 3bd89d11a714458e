"""What is done about a finding: the rule is matched, the rung chosen, the guards asked, the actions decided. Pure."""

from monitors.taxonomy import TAINTING, Finding, IncidentClass
from orchestrator.policy import attempts, diagnose
from orchestrator.policy.budgets import allow_rollback
from orchestrator.policy.context import Context
from orchestrator.policy.decisions import CaptureEvidence, SendCommand, StopAttempt
from orchestrator.policy.guards import refusal
from orchestrator.policy.model import Actions, Diagnose, LowerLr, Rule
from orchestrator.policy.rules import choose, needs_validation
from orchestrator.policy.state import Commit, Incident, LadderPlace, Recovery
from orchestrator.recovery.target import training_candidates
from trainer.contract.commands import CheckpointNow, EvaluateNow
from trainer.contract.plan import Overlay, Quarantine, SkipRange, overlay_factor

#: Incidents of the loss share one ladder: a spike after a slow divergence is its relapse.
_LOSS = frozenset({IncidentClass.UNRECOVERED_SPIKE, IncidentClass.SLOW_DIVERGENCE})
_SUSPECT_LEAD = 3  # step onset - 2 is the first whose data is suspected
_SUSPECT_LEAST = 16  # batches: a non-finite loss is seen after three, and bad data may go on
_NON_FINITE = frozenset({IncidentClass.SUDDEN_NAN, IncidentClass.NAN_AFTER_LOAD, IncidentClass.PLATEAU_THEN_NAN})


def on_finding(ctx: Context, finding: Finding) -> None:
    """Keep the incident of a finding up to date and answer it once its class is settled."""
    incident = ctx.adopt_finding(finding)
    if not incident.is_open:
        return
    match finding.kind:
        case "suspected":
            return
        case "classified":
            _taint_commits(ctx, incident)
            if incident.state == "suspected" or not incident.decision:
                respond(ctx, incident)
        case "closed":
            if finding.evidence.get("gave_in"):
                incident.outcome = incident.outcome or "not_recovered"
                ctx.state.never_back_from = min(incident.onset_step, ctx.state.never_back_from or incident.onset_step)
            _close(ctx, incident, finding.end_step if finding.end_step is not None else finding.step)
        case "dismissed":
            incident.state, incident.outcome, incident.end_step = "dismissed", "notice", finding.step


def _close(ctx: Context, incident: Incident, end_step: int) -> None:
    if incident.state == "suspected":
        respond(ctx, incident)
    if incident.state == "recovering" and ctx.enforcing:
        return  # it ended because the state was left behind; the recovery is judged by what comes after
    incident.end_step = end_step
    incident.outcome = incident.outcome or ("came_back" if incident.cls in TAINTING else "notice")
    incident.state = "closed"
    if incident.cls in TAINTING:
        ctx.state.unhealthy_until_step = max(ctx.state.unhealthy_until_step, end_step)


def _taint_commits(ctx: Context, incident: Incident) -> None:
    """Saves from the margin before the onset on are never promoted, good ones among them are demoted (DESIGN 9)."""
    if incident.cls not in TAINTING or incident.cls in (
        IncidentClass.TRANSIENT_SPIKE,
        IncidentClass.REPEATED_SPIKES_BY_SHARDS,
        IncidentClass.ACTIVATION_EXPLOSION,
    ):
        return
    for commit in ctx.state.commits:
        reach = incident.onset_step - (ctx.facts.good_after_steps if commit.standing != "good" else 0)
        if commit.step > 0 and commit.step >= reach:
            commit.tainted = True


def respond(ctx: Context, incident: Incident) -> None:
    """Answer an incident whose class is settled, or whose evaluation or diagnosis has come in."""
    incident.state = "open"
    if needs_validation(ctx.policy, incident, ctx.facts) and not _validated(ctx, incident):
        return
    rule = choose(ctx.policy, incident, ctx.facts)
    if rule is None:
        incident.why += "; no rule of the policy answers it"
        return
    incident.rung, actions = _rung(ctx, incident, rule)
    incident.rungs = len(rule.rungs())
    actions = _without_futile_lr_cut(ctx, incident, actions)
    reason = refusal(ctx, incident, actions)
    if reason is not None:
        incident.refused = reason
        incident.why += f"; {reason}"
        actions = Actions.model_validate({"capture": {}, "notify": {"level": "page"}, "halt": {}})
    _note_decision(ctx, incident, actions)
    if actions.notify is not None:
        ctx.notify(actions.notify.level, _title(incident), incident.why, incident.id)
    if ctx.enforcing:
        _carry_out(ctx, incident, actions)
    elif actions.roll_back is None and actions.lower_lr is None and incident.cls not in TAINTING:
        _settle_notice(incident, actions)


def _validated(ctx: Context, incident: Incident) -> bool:
    """Whether an answer is there; asks for one otherwise."""
    if ctx.facts.trace or not ctx.facts.has_validation:
        incident.validation = "assumed"
        incident.why += "; no evaluation can be made, so it counts as confirmed"
        return True
    if not ctx.enforcing:
        incident.validation = "assumed"
        incident.why += "; observing only, so no evaluation was asked for"
        return True
    number = ctx.next_command()
    ctx.state.evaluations[number] = incident.id
    incident.state = "evaluating"
    incident.decision.append("evaluate")
    command = EvaluateNow(id=number)
    ctx.decide(SendCommand(attempt=ctx.state.attempt, command=command, incident=incident.id))
    return False


def _rung(ctx: Context, incident: Incident, rule: Rule) -> tuple[int, Actions]:
    """One rung further than the incident of the same family that this one is a relapse of; the last one stays.

    The number counts on beyond the ladder's length, because the rule after a diagnosis may have a longer one.
    """
    rungs = rule.rungs()
    if len(rungs) == 1 and _family(incident) not in ("loss", "non_finite"):
        return 0, rungs[0]  # a notice again is no relapse
    place = ctx.state.ladders.get(_family(incident))
    rung = 0
    if place is not None and place.incident == incident.id:
        rung = place.rung  # answered again, after its diagnosis
    elif place is not None and incident.onset_step <= place.relapse_until_step:
        rung = place.rung + 1
        incident.relapse_of = place.incident
        previous = ctx.state.incident(place.incident)
        if previous is not None and previous.outcome != "worked":
            previous.outcome = "relapsed"
            previous.state = "closed"
            previous.end_step = previous.end_step if previous.end_step is not None else incident.onset_step
    return rung, rungs[min(rung, len(rungs) - 1)]


def _family(incident: Incident) -> str:
    if incident.cls in _LOSS:
        return "loss"
    return "non_finite" if incident.cls in _NON_FINITE else str(incident.cls)


def _without_futile_lr_cut(ctx: Context, incident: Incident, actions: Actions) -> Actions:
    state = ctx.state
    if actions.lower_lr is None or not state.peak_lr or state.last_lr is None:
        return actions
    planned = state.last_lr / overlay_factor(tuple(state.overlays), state.step)
    if planned >= ctx.policy.guards.lower_lr_floor * state.peak_lr:
        return actions
    incident.why += f"; the planned LR {planned:.2e} is so low already that it is not lowered"
    return actions.model_copy(update={"lower_lr": None})


def _note_decision(ctx: Context, incident: Incident, actions: Actions) -> None:
    incident.decision = [*incident.decision, *(str(name) for name in actions.names())]
    incident.observed = not ctx.enforcing
    hold = actions.lower_lr.hold_steps + actions.lower_lr.ramp_steps if actions.lower_lr else 0
    until = incident.detected_step + hold + ctx.policy.guards.relapse_steps
    previous = ctx.state.ladders.get(_family(incident))
    ctx.state.ladders[_family(incident)] = LadderPlace(
        rung=incident.rung,
        incident=incident.id,
        relapse_until_step=until,
        factor=_factor(actions.lower_lr, previous, incident.rung),
    )


def _factor(lower: LowerLr | None, previous: LadderPlace | None, rung: int) -> float:
    """Only escalation multiplies, and never below the floor."""
    before = previous.factor if rung > 0 and previous is not None else 1.0
    return before if lower is None else max(lower.factor * before, lower.min_factor)


def _carry_out(ctx: Context, incident: Incident, actions: Actions) -> None:
    state = ctx.state
    if actions.capture is not None:
        ctx.decide(CaptureEvidence(attempt=state.attempt, incident=incident.id))
    if actions.evaluate is not None:
        ask = EvaluateNow(id=ctx.next_command())
        ctx.decide(SendCommand(attempt=state.attempt, command=ask, incident=incident.id))
    if actions.checkpoint is not None:
        command = CheckpointNow(id=ctx.next_command())
        ctx.decide(SendCommand(attempt=state.attempt, command=command, incident=incident.id))
    if actions.halt is not None:
        incident.outcome, incident.end_step, incident.state = "halted", state.step, "closed"
        _leave_for(ctx, Recovery(kind="halt", incident=incident.id, because=incident.why))
    elif actions.diagnose is not None:
        _diagnose(ctx, incident, actions.diagnose)
    elif actions.roll_back is not None:
        _roll_back(ctx, incident, actions, actions.roll_back.margin_steps)
    elif actions.restart is not None or actions.widen_rollback is not None:
        candidates = [c.id for c in state.commits if c.standing != "bad" and not c.tainted][::-1]
        candidates = candidates[1:] if actions.widen_rollback is not None and len(candidates) > 1 else candidates
        incident.resume_step, incident.state = state.step, "recovering"
        because = incident.why
        _leave_for(ctx, Recovery(kind="restart", incident=incident.id, candidates=candidates[:8], because=because))
    else:
        _in_place(ctx, incident, actions)


def _in_place(ctx: Context, incident: Incident, actions: Actions) -> None:
    state = ctx.state
    if actions.quarantine_shards is not None:
        _quarantine(ctx, incident, state.position)
    if actions.lower_lr is not None:
        _lower(ctx, incident, actions.lower_lr, from_step=state.step + 1)
    if actions.quarantine_shards is not None or actions.lower_lr is not None:
        ctx.apply_plan(incident.id)
    if actions.lower_lr is None:
        _settle_notice(incident, actions)


def _settle_notice(incident: Incident, actions: Actions) -> None:
    """Notices, and shards that are quarantined, need no watching; a spike that goes on does."""
    if incident.cls in TAINTING and actions.quarantine_shards is None:
        return
    incident.state, incident.end_step = "closed", incident.detected_step
    incident.outcome = "worked" if actions.quarantine_shards is not None else "notice"


def _roll_back(ctx: Context, incident: Incident, actions: Actions, margin_steps: int) -> None:
    state = ctx.state
    candidates = training_candidates(state.commits, incident.onset_step, margin_steps)
    if not candidates:
        _give_up(ctx, incident, "there is no good checkpoint before the onset to go back to")
        return
    if not allow_rollback(ctx, incident.onset_step):
        _give_up(ctx, incident, "the budget for rollbacks is used up", kind="budget")
        return
    if incident.onset_step <= ctx.facts.warmup_steps:
        state.warm_up_rollbacks += 1
    target = candidates[0]
    incident.target_step, incident.resume_step, incident.state = target.step, state.step, "recovering"
    if actions.skip_data is not None:
        _skip(ctx, incident, target, actions.skip_data, margin_steps)
    if actions.quarantine_shards is not None:
        _quarantine(ctx, incident, target.position)
    if actions.lower_lr is not None:
        _lower(ctx, incident, actions.lower_lr, from_step=target.step + 1)
    if actions.reseed is not None or incident.verdict != "hardware":
        state.branch += 1  # after a training rollback the RNG takes another branch; exact only for hardware faults
    names = [commit.id for commit in candidates]
    recovery = Recovery(kind="restart", incident=incident.id, candidates=names, reanchor=True, because=incident.why)
    state.undelivered = recovery
    _leave_for(ctx, recovery)


def _skip(ctx: Context, incident: Incident, target: Commit, batches: int, margin_steps: int) -> None:
    """The window begins at the margin before the onset, not at the target, which may lie a whole interval earlier."""
    first = max(target.step, incident.onset_step - max(margin_steps, 1))
    begin, end = ctx.position_at(first), ctx.position_at(first + batches)
    if end > begin:
        if ctx.state.deferred_from is None:  # for good: later changes of steps or batch size move nothing
            ctx.state.deferred_from = ctx.facts.total_steps * ctx.facts.batch_samples
        ctx.state.skips.append(SkipRange(begin=begin, end=end, incident=incident.id))
        incident.cost.skipped_samples = end - begin


def _quarantine(ctx: Context, incident: Incident, from_position: int) -> None:
    known = {quarantine.shard for quarantine in ctx.state.quarantines}
    for shard in incident.shards:
        if shard not in known:
            ctx.state.quarantines.append(Quarantine(shard=shard, from_position=from_position, incident=incident.id))


def _lower(ctx: Context, incident: Incident, lower: LowerLr, from_step: int) -> None:
    """The hold is counted from the detection, so that the cut still stands where it went wrong (DESIGN 7)."""
    overlay = Overlay(
        from_step=from_step,
        factor=ctx.state.ladders[_family(incident)].factor,
        hold_until_step=incident.detected_step + lower.hold_steps,
        ramp_steps=lower.ramp_steps,
        keep=lower.keep,
        incident=incident.id,
    )
    ctx.state.overlays.append(overlay)


def _diagnose(ctx: Context, incident: Incident, settings: Diagnose) -> None:
    """Suspect is the data from two batches before the onset, since damage may show later, to as far again as it took
    to see it, since what is wrong with the data need not have ended by then.
    """
    state = ctx.state
    candidates = training_candidates(state.commits, incident.onset_step, 0)
    last = max(incident.onset_step, incident.detected_step)
    end_step = max(2 * last - incident.onset_step, incident.onset_step + _SUSPECT_LEAST)
    suspect = (ctx.position_at(max(0, incident.onset_step - _SUSPECT_LEAD)), ctx.position_at(end_step))
    if not candidates or suspect[0] >= suspect[1]:
        _undecided(ctx, incident, "there is no good checkpoint from which to replay it")
        return
    innocent = suspect[0] - (suspect[1] - suspect[0])  # an older state, if need be, leaves room for the control
    roomy = [commit for commit in candidates if commit.position <= innocent] or candidates
    replay = diagnose.begin(state, incident, roomy, suspect, settings)
    if not diagnose.affordable(replay):
        _undecided(ctx, incident, f"two replays would take more than the {settings.max_steps} steps allowed")
        return
    incident.state, incident.resume_step, state.replay = "diagnosing", state.step, replay
    _leave_for(ctx, Recovery(kind="diagnose", incident=incident.id, because=incident.why))


def _undecided(ctx: Context, incident: Incident, why: str) -> None:
    incident.verdict = "inconclusive"
    incident.why += f"; {why}"
    respond(ctx, incident)


def _give_up(ctx: Context, incident: Incident, reason: str, kind: str = "halt") -> None:
    incident.why += f"; {reason}"
    incident.decision.append("halt")
    incident.outcome, incident.end_step, incident.state = "halted", ctx.state.step, "closed"
    ctx.notify("page", _title(incident), incident.why, incident.id)
    _leave_for(ctx, Recovery.model_validate({"kind": kind, "incident": incident.id, "because": incident.why}))


def _leave_for(ctx: Context, recovery: Recovery) -> None:
    """Bring the attempt to its end; what follows is carried out when it is verified dead."""
    state = ctx.state
    if not state.alive:  # the diagnosis was made by replays: nothing runs any more
        _without_an_attempt(ctx, recovery)
        return
    state.pending = recovery
    state.phase = "stopping" if recovery.kind == "halt" else "recovering"
    ctx.decide(StopAttempt(attempt=state.attempt, how="leave", because=recovery.because, incident=recovery.incident))


def _without_an_attempt(ctx: Context, recovery: Recovery) -> None:
    if recovery.kind == "restart":
        attempts.start(ctx, recovery)
    else:
        attempts.end_for(ctx, recovery)


def on_evaluation(ctx: Context, command: int, loss: float) -> None:
    """The evaluation that was asked for: within the tolerance of expectation it is only recorded (DESIGN 7)."""
    incident = ctx.state.incident(ctx.state.evaluations.pop(command, None))
    if incident is None or incident.state != "evaluating":
        return
    before = [value for step, value in ctx.state.evals if step < incident.onset_step]
    tolerance = ctx.policy.guards.validation_tolerance
    if not before:
        incident.validation = "assumed"
        incident.why += f"; validation is {loss:.3f}, with none from before the onset to compare: counts as confirmed"
    else:
        expected = min(before[-3:])
        confirmed = not loss <= expected + tolerance  # NaN confirms
        incident.validation = "confirmed" if confirmed else "refuted"
        incident.why += f"; validation is {loss:.3f}, expected at most {expected:.3f} + {tolerance}"
        incident.evidence.update({"validation": loss, "validation_expected": expected})
        if not confirmed:
            incident.outcome = "refuted"
    respond(ctx, incident)


def expire_evaluations(ctx: Context) -> None:
    """A trainer that does not evaluate when asked confirms by its silence: the damage grows while nobody answers."""
    state = ctx.state
    for command, number in list(state.evaluations.items()):
        incident = state.incident(number)
        if incident is None or state.step - incident.detected_step <= ctx.policy.detect.recover_steps_max:
            continue
        del state.evaluations[command]
        if incident.state == "evaluating" and state.pending is None:
            incident.validation = "assumed"
            incident.why += "; the evaluation that was asked for never came: counts as confirmed"
            respond(ctx, incident)


def _title(incident: Incident) -> str:
    return f"{incident.cls} at step {incident.onset_step}"
