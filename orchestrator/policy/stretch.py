"""A stretch of equal updates, folded at once: the same as their records one by one, at the cost of a few. Pure.

Between two updates of a stretch the policy changes its mind only where something falls due: a checkpoint has proven
itself, a recovery is judged, an evaluation or a checkpoint is overdue, an overlay has ended. So the fold goes from one
such step to the next, and what lies between moves counters only. Which steps these are is asked anew at each of them,
because what follows from one may bring another. Asking for too many costs time, for too few would be an error: a
property test holds a stretch against its records. What only a save or a load looks at needs no step of its own: a save
is one, and a load ends the stretch.
"""

import math
from collections.abc import Callable, Iterator

from orchestrator.policy import health
from orchestrator.policy.context import Context
from orchestrator.policy.diagnose import on_replay_step
from orchestrator.policy.events import StepsPassed
from orchestrator.policy.state import HistoryRow, ReplayRow


def pass_steps(ctx: Context, event: StepsPassed, look: Callable[[], None], overdue: Callable[[], None]) -> None:
    """Take the updates in; `look` and `overdue` do what the engine does after each step beside keeping it."""
    state = ctx.state
    saves = list(event.saves)
    state.last_loss, state.last_lr = event.loss, event.lr
    while state.step < event.step:
        due = (step for step in (*_due_steps(ctx), *(save.step for save in saves[:1])) if step > state.step)
        upto = min((*due, event.step)) if state.step >= event.first_step else event.first_step
        count = upto - state.step
        state.tokens += count * event.tokens
        state.trained_s += count * event.step_s
        if event.tokens and event.step_s > 0:
            state.tokens_per_s = event.tokens / event.step_s
        health.came_to(ctx, _row(ctx, event, upto, count), healthy=not event.skipped)
        look()
        if not event.thinned:
            overdue()
        while saves and saves[0].step <= state.step:
            health.on_save_ended(ctx, saves.pop(0))
    if event.thinned:
        overdue()


def replay_steps(ctx: Context, event: StepsPassed) -> None:
    """The same of a replay: only what each update gave is kept."""
    row = ReplayRow(loss=event.loss, grad_norm=event.grad_norm, skipped=event.skipped)
    for step in range(event.first_step, event.step + 1):
        on_replay_step(ctx.state, step, row)


def _row(ctx: Context, event: StepsPassed, step: int, count: int) -> HistoryRow:
    return HistoryRow(
        step=step, end=event.end - (event.step - step) * event.samples, at_s=ctx.state.now_s, loss=event.loss,
        grad_norm=event.grad_norm, skipped=event.skipped, steps=count, samples=event.samples if count > 1 else 0,
    )  # fmt: skip


def _due_steps(ctx: Context) -> Iterator[int]:
    """Steps at which something may fall due, past ones among them."""
    state, facts = ctx.state, ctx.facts
    unhealthy = state.unhealthy_until_step
    for commit in state.commits:
        if commit.standing == "committed" and not commit.tainted:
            yield max(commit.step, unhealthy) + facts.good_after_steps
    for incident in state.incidents[-64:]:
        if incident.state == "recovering" and incident.resume_step is not None:
            yield incident.resume_step
            needed = 1 if incident.target_step is None else facts.good_after_steps
            yield max(incident.resume_step, unhealthy) + needed
        elif incident.state == "evaluating":
            yield incident.detected_step + ctx.policy.detect.recover_steps_max + 1
    for overlay in state.overlays:
        yield from (overlay.from_step, overlay.hold_until_step + 1, overlay.hold_until_step + overlay.ramp_steps)
    stored = max((commit.step for commit in state.commits if commit.where == "store"), default=None)
    every = facts.checkpoint_every or state.save_every
    if stored is not None and every is not None:
        yield stored + math.ceil(ctx.policy.guards.checkpoint_overdue_factor * every)
