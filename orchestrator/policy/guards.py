"""Limits beyond which automation stops and asks a person (DESIGN 6, guards). Pure."""

from orchestrator.policy.context import Context
from orchestrator.policy.model import Actions
from orchestrator.policy.state import Incident
from orchestrator.recovery.target import training_candidates


def refusal(ctx: Context, incident: Incident, actions: Actions) -> str | None:
    """Why these actions may not be carried out, None if they may."""
    if not ctx.enforcing:
        return None
    reasons = (_warm_up(ctx, incident, actions), _discarded(ctx, incident, actions), _skipped(ctx, actions))
    return next((reason for reason in (*reasons, _quarantined(ctx, incident, actions)) if reason), None)


def _warm_up(ctx: Context, incident: Incident, actions: Actions) -> str | None:
    if actions.roll_back is None or incident.onset_step > ctx.facts.warmup_steps:
        return None
    if ctx.state.warm_up_rollbacks < ctx.policy.guards.warm_up_rollbacks:
        return None
    return "it came back within the warm-up: the peak LR is too high or the warm-up too short"


def _discarded(ctx: Context, incident: Incident, actions: Actions) -> str | None:
    if actions.roll_back is None:
        return None
    targets = training_candidates(ctx.state.commits, incident.onset_step, actions.roll_back.margin_steps)
    steps = ctx.state.discarded_steps + (ctx.state.step - targets[0].step if targets else 0)
    guards = ctx.policy.guards
    limit = max(guards.max_discarded_share * ctx.facts.total_steps, guards.always_discarded_steps)
    return f"{steps} discarded steps would be more than the limit of {limit:.0f}" if steps > limit else None


def _skipped(ctx: Context, actions: Actions) -> str | None:
    if actions.skip_data is None:
        return None
    samples = sum(skip.end - skip.begin for skip in ctx.state.skips) + actions.skip_data * ctx.facts.batch_samples
    guards = ctx.policy.guards
    batches = max(guards.max_skipped_share * ctx.facts.total_steps, guards.always_skipped_batches)
    limit = batches * ctx.facts.batch_samples
    return f"{samples} skipped samples would be more than the limit of {limit:.0f}" if samples > limit else None


def _quarantined(ctx: Context, incident: Incident, actions: Actions) -> str | None:
    sizes = ctx.state.shard_samples
    if actions.quarantine_shards is None or not sizes:
        return None
    shards = {*incident.shards, *(quarantine.shard for quarantine in ctx.state.quarantines)}
    share = sum(sizes[shard] for shard in shards if shard < len(sizes)) / max(1, sum(sizes))
    limit = ctx.policy.guards.max_quarantined_share
    return f"{share:.1%} of all samples in quarantine would be more than {limit:.1%}" if share > limit else None
