"""After a recovery: the loss is held against its earlier course, the lowered LR is followed back to the schedule."""

from collections.abc import Callable

from orchestrator.policy.model import Policy
from tests.orchestrator.simulated import World, healthy

_CUT = {"factor": 0.5, "hold_steps": 30, "ramp_steps": 40}
_POLICY = Policy.model_validate(
    {
        "version": 1,
        "guards": {"max_skipped_share": 0.9, "max_discarded_share": 1.0, "relapse_steps": 40},
        "rules": [
            {
                "on": "unrecovered_spike",
                "when": {"validation_confirms": True},
                "ladder": [{"roll_back": {"margin_steps": 20}, "skip_data": "40 batches", "lower_lr": _CUT}],
            }
        ],
    }
)


def _damaged(after: float) -> Callable[[World, int], float]:
    """Lost from step 200 on in the first attempt; in the next one `after` nats above the course, from its start on."""

    def loss(world: World, step: int) -> float:
        first = len(world.plans) == 1
        return healthy(world, step) + ((4.0 if step >= 200 else 0.0) if first else after)

    return loss


def _ended(after: float) -> World:
    world = World(policy=_POLICY, loss=_damaged(after), validation=_damaged(after))
    world.run()
    return world


def test_back_on_its_course() -> None:
    """Healthy and as low as before: it worked, and the numbers are kept."""
    spike = _ended(0.0).incident("unrecovered_spike")
    assert (spike.state, spike.outcome) == ("closed", "worked")
    assert spike.course is not None
    assert spike.course.rejoined
    assert abs(spike.course.after - spike.course.before) < 0.02
    assert spike.resume_step is not None
    assert spike.lr_restored_step == spike.resume_step + 70


def test_healthy_on_another_level_has_not_recovered() -> None:
    """No new spike comes, yet the run lost a fifth of a nat for good: a person is told, once."""
    world = _ended(0.2)
    spike = world.incident("unrecovered_spike")
    assert (spike.state, spike.outcome) == ("closed", "not_recovered")
    assert spike.course is not None
    assert not spike.course.rejoined
    told = [notice for notice in world.notices if notice.title == "recovered, but not to its earlier course"]
    assert [(notice.level, notice.incident) for notice in told] == [("warning", spike.id)]


def test_a_restart_is_judged_by_its_first_step() -> None:
    """A crash says nothing of the loss, so there is no course to compare."""
    world = World(policy=_POLICY, dies_at={(1, 100): "killed"})
    world.run()
    crash = world.incident("crash")
    assert (crash.outcome, crash.course) == ("worked", None)
