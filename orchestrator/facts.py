"""What the policy engine must know of run.yaml."""

from orchestrator.policy.state import RunFacts
from orchestrator.recovery.retention import Spacing
from trainer.contract.config import CheckpointConfig, RunConfig


def facts_of(config: RunConfig) -> RunFacts:
    """The facts of a configuration."""
    return RunFacts(
        run_id=config.name,
        total_steps=config.steps,
        warmup_steps=config.schedule.warmup_steps,
        batch_samples=config.batch.sequences,
        good_after_steps=config.checkpoint.good_after_steps,
        keep_good=config.checkpoint.keep_good,
        keep_for=spacings(config.checkpoint),
        checkpoint_every=None if config.checkpoint.every_steps == "auto" else config.checkpoint.every_steps,
        has_validation=config.data.validation is not None,
        planned_changes=tuple(change.step for change in config.planned_changes),
    )


def spacings(config: CheckpointConfig) -> tuple[Spacing, ...]:
    """The rules of age by which checkpoints are kept."""
    return tuple(Spacing(rule.every, rule.for_) for rule in config.keep_for)
