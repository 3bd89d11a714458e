"""Guards: each in a situation in which acting would have done harm, and a little before, where acting is right."""

from typing import Any

import pytest

from monitors.taxonomy import IncidentClass
from orchestrator.policy.context import Context
from orchestrator.policy.guards import refusal
from orchestrator.policy.model import Actions, Policy
from orchestrator.policy.state import Commit, EngineState, Incident
from tests.orchestrator.simulated import PEAK_LR, World, healthy
from trainer.contract.plan import Quarantine, SkipRange

_CUT = {"factor": 0.5, "hold_steps": 30, "ramp_steps": 40}
_BACK = {"roll_back": {"margin_steps": 20}, "skip_data": "40 batches", "lower_lr": _CUT}
_RULES = [{"on": "unrecovered_spike", "when": {"validation_confirms": True}, "ladder": [_BACK, _BACK, _BACK]}]
_WIDE = {"max_skipped_share": 0.9, "max_discarded_share": 1.0, "relapse_steps": 400}


def _policy(**guards: Any) -> Policy:
    return Policy.model_validate({"version": 1, "guards": {**_WIDE, **guards}, "rules": _RULES})


def _always_at_200(world: World, step: int) -> float:
    return healthy(world, step) + (4.0 if step >= 200 else 0.0)


def _world(policy: Policy, **facts: Any) -> World:
    return World(
        policy=policy, loss=_always_at_200, validation=_always_at_200, facts=World().facts.model_copy(update=facts)
    )


def test_the_warm_up_is_not_rolled_back_twice() -> None:
    """What comes back within the warm-up comes back at every rollback: a person is asked after the first."""
    world = _world(_policy(), warmup_steps=300)
    end = world.run()
    assert (end.state, end.exit_code) == ("halted", 3)
    first, second = (i for i in world.engine.incidents() if i.cls is IncidentClass.UNRECOVERED_SPIKE)
    assert "roll_back" in first.decision
    assert second.refused == "it came back within the warm-up: the peak LR is too high or the warm-up too short"
    assert second.decision[-1] == "halt"


def test_after_the_warm_up_the_ladder_is_climbed() -> None:
    """The same run with a shorter warm-up is rolled back again."""
    world = _world(_policy(), warmup_steps=100)
    world.run()
    spikes = [i for i in world.engine.incidents() if i.cls is IncidentClass.UNRECOVERED_SPIKE]
    assert sum("roll_back" in spike.decision for spike in spikes) > 1


@pytest.mark.parametrize(("share", "lowered"), [(0.19, False), (0.21, True)])
def test_a_rate_near_its_end_is_not_lowered(share: float, lowered: bool) -> None:
    """Under a fifth of the peak a cut would only stop the run from learning; above it helps."""
    world = _world(_policy())
    world.open()
    world.load()
    world.engine.state.peak_lr = PEAK_LR / share
    while len(world.plans) == 1 and world.stopping is None:
        world.take_step()
    spike = world.incident("unrecovered_spike")
    assert ("lower_lr" in spike.decision) == lowered
    assert "roll_back" in spike.decision
    assert ("is so low already that it is not lowered" in spike.why) != lowered


def _asked(state: EngineState, actions: dict[str, Any], shards: tuple[int, ...] = (), **guards: Any) -> str | None:
    facts = World().facts.model_copy(update={"total_steps": 100_000, "batch_samples": 8})
    policy = Policy.model_validate({"version": 1, "guards": guards})
    incident = Incident(
        id=1, cls=IncidentClass.UNRECOVERED_SPIKE, onset_step=9_000, detected_step=9_050, why="", shards=list(shards)
    )
    return refusal(Context(state, policy, facts), incident, Actions.model_validate(actions))


@pytest.mark.parametrize(("discarded", "refused"), [(3_900, False), (4_100, True)])
def test_a_run_is_not_thrown_away_piece_by_piece(discarded: int, refused: bool) -> None:
    """Rollbacks may cost 5 % of the plan in all: the one that would go beyond is not made."""
    state = EngineState(step=9_050, discarded_steps=discarded)
    state.commits = [Commit(id="000000008050-e1-1", step=8_050, position=0, tokens=0, standing="good")]
    said = _asked(state, {"roll_back": {"margin_steps": 100}}, always_discarded_steps=0)
    assert (said is not None) == refused
    assert said is None or said == "5100 discarded steps would be more than the limit of 5000"


@pytest.mark.parametrize(("skipped", "refused"), [(1_700, False), (1_800, True)])
def test_data_is_not_skipped_away(skipped: int, refused: bool) -> None:
    """2 % of the planned data: beyond, the data itself must be looked at by a person."""
    state = EngineState(skips=[SkipRange(begin=0, end=skipped * 8, then="defer")])
    said = _asked(state, {"roll_back": {"margin_steps": 0}, "skip_data": "300 batches"}, always_skipped_batches=0)
    assert (said is not None) == refused


@pytest.mark.parametrize(("shards", "refused"), [((7,), False), ((7, 8), True)])
def test_a_corpus_is_not_quarantined_shard_by_shard(shards: tuple[int, ...], refused: bool) -> None:
    """Half a percent of all samples: more bad shards than that are a fault of the preparation, or of the test."""
    state = EngineState(
        shard_samples=[100] * 500,
        quarantines=[Quarantine(shard=3, from_position=0)],
        shard_names=[str(n) for n in range(500)],
    )
    said = _asked(state, {"quarantine_shards": {}}, shards=shards)
    assert (said is not None) == refused
