"""What may be spent: windowed restarts, rollbacks refilled by proven recovery, waiting before a restart. Pure."""

from orchestrator.policy.context import Context
from orchestrator.policy.model import Backoff
from orchestrator.policy.state import Commit


def allow_restart(ctx: Context) -> bool:
    """Spend one restart of the window; False if none is left."""
    state, budget = ctx.state, ctx.policy.budgets.process
    state.restarts_at_s = [at_s for at_s in state.restarts_at_s if state.now_s - at_s < budget.per]
    if len(state.restarts_at_s) >= budget.restarts:
        return False
    state.restarts_at_s.append(state.now_s)
    return True


def allow_rollback(ctx: Context, onset_step: int) -> bool:
    """Spend one rollback; False if none is left."""
    state = ctx.state
    if state.rollbacks_used >= ctx.policy.budgets.training.rollbacks:
        return False
    state.rollbacks_used += 1
    state.rollback_onset_step = max(onset_step, state.rollback_onset_step)
    return True


def on_durable(ctx: Context, commit: Commit) -> None:
    """A commit beyond all earlier ones refills the process budget: the run does advance."""
    state = ctx.state
    if commit.step > state.best_durable_step:
        state.best_durable_step = commit.step
        state.attempts_without_progress = 0
        state.restarts_at_s.clear()


def on_good(ctx: Context, commit: Commit) -> None:
    """Refill rollbacks by a good commit far enough, at full LR, beyond the onset and the highest step ever reached."""
    state = ctx.state
    if not state.rollbacks_used:
        return
    full_lr_from = max((o.hold_until_step + o.ramp_steps for o in state.overlays if not o.keep), default=0)
    start = max(state.rollback_onset_step, full_lr_from)
    if commit.step >= start + ctx.policy.budgets.training.refill_after_steps and commit.step >= state.highest_step - (
        ctx.facts.good_after_steps
    ):
        state.rollbacks_used = 0


def backoff_s(backoff: Backoff | None, failures: int, fraction: float) -> float:
    """Seconds to wait before restart number `failures` in a row; `fraction` in [0, 1) is the jitter's draw."""
    if backoff is None or failures < 1:
        return 0.0
    wait_s = min(backoff.max, backoff.start * backoff.factor ** min(failures - 1, 60))
    return wait_s * fraction if backoff.jitter == "full" else wait_s
