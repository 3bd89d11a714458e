"""What becomes of a recovery: did the run stay healthy, did the loss rejoin its course, is the LR restored. Pure."""

import math
from statistics import median

from monitors.window import MAD_TO_SIGMA
from orchestrator.policy.context import Context
from orchestrator.policy.rows import each_step
from orchestrator.policy.state import Course, Incident
from trainer.contract.plan import overlay_factor

_LEAST_ROWS = 16  # of either side: fewer medians say nothing
_SIGMAS = 4.0  # of the difference of two medians
_MEDIAN_TO_MEAN = 1.2533  # standard error of a median, in those of a mean: sqrt(pi / 2)
_MOST_COURSES = 8
_LEAD = 3  # the steps right before an onset may be touched by it already


def judge_recoveries(ctx: Context) -> None:
    """Called after each step. A recovery has worked when as many healthy steps lie beyond the place where it had been
    stopped as make a checkpoint good, and the steps that were run again are as low as they were."""
    state = ctx.state
    lowered = {overlay.incident for overlay in state.overlays}
    for incident in state.incidents[-64:]:
        if incident.lr_restored_step is None and incident.id in lowered:
            _note_lr(ctx, incident)
        if incident.state != "recovering" or incident.resume_step is None:
            continue
        _account_recompute(ctx, incident)
        needed = 1 if incident.target_step is None else ctx.facts.good_after_steps
        if state.step - max(incident.resume_step, state.unhealthy_until_step) < needed:
            continue
        incident.state, incident.outcome, incident.end_step = "closed", "worked", incident.resume_step
        incident.course = _course(ctx, incident)
        if incident.course is not None and not incident.course.rejoined:
            incident.outcome = "not_recovered"
            ctx.notify("warning", "recovered, but not to its earlier course", _said(incident.course), incident.id)


def keep_course(ctx: Context, incident: Incident, loaded_step: int) -> None:
    """Before a rollback's steps leave the lineage: their losses up to the onset are what it will be held against."""
    healthy = each_step(ctx.state.history, loaded_step, incident.onset_step - _LEAD)
    ctx.state.courses[incident.id] = {row.step: row.loss for row in healthy if math.isfinite(row.loss)}
    while len(ctx.state.courses) > _MOST_COURSES:
        del ctx.state.courses[min(ctx.state.courses)]


def _course(ctx: Context, incident: Incident) -> Course | None:
    """The same steps before and after; None where they are too few to tell.

    A lowered LR makes the loss a little lower, other data a little different: what is allowed above is the tolerance
    of the policy, and the noise of two medians.
    """
    before = ctx.state.courses.pop(incident.id, {})
    rerun = each_step(ctx.state.history, min(before, default=0) - 1, max(before, default=0))
    after = [row.loss for row in rerun if row.step in before and math.isfinite(row.loss)]
    if len(after) < _LEAST_ROWS:
        return None
    middle = median(before.values())
    sigma = MAD_TO_SIGMA * median(abs(loss - middle) for loss in before.values())
    error = _MEDIAN_TO_MEAN * sigma * (1 / len(before) + 1 / len(after)) ** 0.5
    allowed = ctx.policy.guards.validation_tolerance + _SIGMAS * error
    return Course(before=middle, after=median(after), allowed=allowed)


def _said(course: Course) -> str:
    return (
        f"over the steps that were run again the loss is {course.after:.3f} and was {course.before:.3f}; "
        f"{course.allowed:.3f} more would be chance. Something of the state that was loaded is not as it was"
    )


def _note_lr(ctx: Context, incident: Incident) -> None:
    """The overlay of an incident has ramped back: that the LR applied is the one planned is proved by every record."""
    own = [overlay for overlay in ctx.state.overlays if overlay.incident == incident.id]
    if overlay_factor(tuple(own), ctx.state.step) == 1.0:
        incident.lr_restored_step = ctx.state.step


def _account_recompute(ctx: Context, incident: Incident) -> None:
    state = ctx.state
    if incident.cost.recompute_s == 0.0 and incident.resume_step is not None and state.step >= incident.resume_step:
        since = incident.opened_at_s + incident.cost.restart_s
        incident.cost.recompute_s = max(0.0, state.now_s - since) if incident.cost.steps else 0.0
