"""What is accepted: damage that nobody undoes, a clock that is put right, another configuration, more steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policy.decisions import StartAttempt
from orchestrator.policy.engine import Engine
from orchestrator.policy.events import AttemptExited, AttemptSpawned, RunOpened, Ticked
from orchestrator.policy.shipped import in_force
from tests.orchestrator.simulated import World
from tests.orchestrator.test_engine import _confirming, _policy, _spike_in_attempt_one


def test_what_nobody_undoes_is_in_the_end_the_runs_own_course() -> None:
    """Observe mode: saves within the damage stay out of use, those long after it are good again and old ones go."""
    facts = World().facts.model_copy(update={"total_steps": 3200})
    world = World(policy=_policy(mode="observe"), facts=facts, loss=_spike_in_attempt_one, validation=_confirming)

    world.run()

    assert world.incident("unrecovered_spike").outcome == "not_recovered"
    good = [commit.step for commit in world.engine.state.commits if commit.standing == "good" and not commit.tainted]
    assert good[-1] >= 3100
    assert not [step for step in good if 200 <= step < 2700]
    assert len(world.stored) < 40, "what was tainted has been pruned"


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20))
def test_a_clock_that_is_put_right_holds_nothing_up(jumps: list[float]) -> None:
    """However the clock jumps, time does not go back, and no start waits longer than its backoff by today's clock."""
    world = World()
    world.open()
    at_s = 1e9
    world.feed(Ticked(at_s=at_s))
    for jump in jumps:
        before_s = world.engine.state.now_s
        at_s += jump
        world.feed(Ticked(at_s=at_s))
        assert world.engine.state.now_s >= before_s
    attempt = world.engine.state.attempt
    world.feed(AttemptSpawned(at_s=at_s, attempt=attempt, pid=1))
    (start,) = [
        decision
        for decision in world.engine.fold(AttemptExited(at_s=at_s, attempt=attempt, cause="killed"))
        if isinstance(decision, StartAttempt)
    ]
    assert start.not_before_s == pytest.approx(at_s + start.wait_s, abs=1e-3)
    assert start.wait_s <= 300.0


def test_config_change_between_launches_is_noted() -> None:
    """A changed policy is an event of the run."""
    world = World()
    world.open()

    world.feed(RunOpened(at_s=1.0, run_id="sim", config_digest="c", policy_digest="other", code_version="1", adopted=1))

    assert any("changed" in notice.title for notice in world.notices)
    assert in_force(None).rules


def test_a_finished_run_goes_on_when_more_steps_are_planned() -> None:
    """From its last checkpoint; with no more steps planned there is nothing to do."""
    world = World()
    world.run()
    snapshot = world.engine.snapshot()
    for total, plans in ((600, 1), (640, 2)):
        world.engine = Engine.restore(
            world.engine.policy, world.facts.model_copy(update={"total_steps": total}), snapshot
        )
        world.facts, world.ended = world.engine.facts, None
        world.open()
        end = world.ended or world.run()
        assert (end.state, len(world.plans)) == ("finished", plans)
    assert world.plans[1].candidates[0].startswith("000000000600")
    assert world.step == 640
