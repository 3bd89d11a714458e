"""The policy engine against a simulated trainer: decisions, targets, skips, overlays, budgets, outcomes."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors.records import Prevention
from orchestrator.policy.engine import Engine
from orchestrator.policy.events import AttemptExited, StopRequested
from orchestrator.policy.model import Policy
from tests.orchestrator.simulated import BATCH, PEAK_LR, World, healthy

_SPIKE_RULES = [
    {
        "on": "unrecovered_spike",
        "when": {"validation_confirms": True},
        "ladder": [
            {
                "roll_back": {"margin_steps": 20},
                "skip_data": "40 batches",
                "lower_lr": {"factor": 0.5, "hold_steps": 30, "ramp_steps": 40},
            },
            {"halt": {}},
        ],
    }
]
_GUARDS = {"max_skipped_share": 0.5, "max_discarded_share": 1.0, "relapse_steps": 200}


def _policy(**changes: object) -> Policy:
    return Policy.model_validate({"version": 1, "guards": _GUARDS, "rules": _SPIKE_RULES, **changes})


def _spike_in_attempt_one(world: World, step: int) -> float:
    assert world.plan is not None
    damaged = world.plan.attempt == 1 and step >= 200
    return healthy(world, step) + (4.0 if damaged else 0.0)


def _confirming(world: World, step: int) -> float:
    assert world.plan is not None
    return 2.0 + 3.0 / (1 + step / 40) + (4.0 if world.plan.attempt == 1 and step >= 200 else 0.0)


def test_healthy_run_finishes_without_an_incident() -> None:
    """Nothing happens, nothing is decided but promotions."""
    world = World()

    end = world.run()

    assert (end.state, end.exit_code) == ("finished", 0)
    assert world.engine.incidents() == []
    assert len(world.plans) == 1
    assert ("000000000000-e1-1", "good") in world.verdicts


def test_checkpoints_become_good_only_after_k_healthy_steps() -> None:
    """A commit at N is good at N + K, and not before."""
    world = World()
    world.open()
    world.load()
    while world.step < 29:
        world.take_step()
    promoted = {commit for commit, verdict in world.verdicts if verdict == "good"}
    assert promoted == {"000000000000-e1-1"}

    world.take_step()

    promoted = {commit for commit, verdict in world.verdicts if verdict == "good"}
    assert promoted == {"000000000000-e1-1", "000000000010-e1-1"}


@pytest.mark.parametrize("done", [Prevention(skipped="norm"), Prevention(gave_in=True)])
def test_an_update_out_of_its_band_is_not_healthy(done: Prevention) -> None:
    """Skipped or applied all the same: the K steps that make a checkpoint good begin anew after it."""
    world = World(prevention=lambda world, step: done if step == 25 else None)
    world.open()
    world.load()
    promoted: dict[str, int] = {}
    while world.step < 46:
        world.take_step()
        promoted |= {commit: world.step for commit, _ in world.verdicts if commit not in promoted}
    assert promoted["000000000010-e1-1"] == promoted["000000000020-e1-1"] == 45


def test_many_skips_are_noticed_and_nothing_is_rolled_back() -> None:
    """The norm arms, it never rolls back alone: a warning, with how the loss fares."""
    world = World(prevention=lambda world, step: Prevention(skipped="norm") if 200 <= step < 208 else None)

    end = world.run()

    incident = world.incident("repeated_spikes_by_state")
    assert (end.exit_code, len(world.plans)) == (0, 1)
    assert (incident.onset_step, incident.detected_step) == (200, 202)
    assert incident.decision == ["record", "notify"]
    assert [(one.level, "3 in a row" in one.text) for one in world.notices] == [("warning", True)]


def test_unrecovered_spike_is_evaluated_rolled_back_skipped_and_its_lr_lowered() -> None:
    """The whole recovery of DESIGN 8: target, skip range, overlay, outcome and cost."""
    world = World(policy=_policy(), loss=_spike_in_attempt_one, validation=_confirming)

    end = world.run()

    assert end.exit_code == 0
    incident = world.incident("unrecovered_spike")
    assert incident.decision == ["evaluate", "roll_back", "skip_data", "lower_lr"]
    assert incident.validation == "confirmed"
    assert incident.onset_step == 200
    assert incident.target_step == 180
    assert (incident.state, incident.outcome) == ("closed", "worked")
    assert incident.cost.steps > 20
    plan = world.plans[1]
    assert plan.candidates[0] == "000000000180-e1-1"
    assert plan.branch == 1
    (skip,) = plan.skips
    assert (skip.begin, skip.end) == (180 * BATCH, 220 * BATCH)
    (overlay,) = plan.overlays
    assert overlay.from_step == 181
    assert overlay.hold_until_step == incident.detected_step + 30
    assert world.lrs[incident.detected_step + 30] == pytest.approx(0.5 * PEAK_LR)
    assert world.lrs[incident.detected_step + 50] == pytest.approx(0.75 * PEAK_LR)
    assert world.lrs[incident.detected_step + 70] == pytest.approx(PEAK_LR)


def test_spike_that_validation_does_not_share_is_only_recorded() -> None:
    """A hard stretch of data is no reason to go back."""
    world = World(policy=_policy(), loss=_spike_in_attempt_one)

    world.run()

    assert len(world.plans) == 1
    assert not any("roll_back" in incident.decision for incident in world.engine.incidents())


def test_relapse_climbs_the_ladder_and_halts() -> None:
    """The same damage after the recovery: the next rung, which asks a person."""

    def always(world: World, step: int) -> float:
        return healthy(world, step) + (4.0 if step >= 200 else 0.0)

    def confirming(world: World, step: int) -> float:
        return 2.0 + 3.0 / (1 + step / 40) + (4.0 if step >= 200 else 0.0)

    world = World(policy=_policy(), loss=always, validation=confirming)

    end = world.run()

    assert (end.state, end.exit_code) == ("halted", 3)
    first, second = (i for i in world.engine.incidents() if i.cls == "unrecovered_spike")
    assert first.outcome == "relapsed"
    assert second.relapse_of == first.id
    assert second.decision[-1] == "halt"


def test_observe_mode_decides_but_touches_nothing() -> None:
    """The decision is in the logbook, the run is left alone."""
    world = World(policy=_policy(mode="observe"), loss=_spike_in_attempt_one, validation=_confirming)

    world.run()

    assert len(world.plans) == 1
    assert "roll_back" in world.incident("unrecovered_spike").decision


def test_crash_restarts_from_the_newest_checkpoint_exactly() -> None:
    """No branch, no skip, no overlay: a bit-exact resume."""
    world = World(dies_at={(1, 47): "killed"})

    end = world.run()

    assert end.exit_code == 0
    plan = world.plans[1]
    assert plan.candidates[0] == "000000000040-e1-1"
    assert (plan.branch, plan.skips, plan.overlays) == (0, (), ())
    incident = world.incident("crash")
    assert (incident.outcome, incident.cost.steps, incident.decision) == ("worked", 7, ["restart", "notify"])


def test_crash_during_a_suspected_spike_goes_back_before_its_onset() -> None:
    """The diverged loss must not become a new normal."""
    world = World(loss=_spike_in_attempt_one, dies_at={(1, 205): "killed"})

    world.run()

    assert world.plans[1].candidates[0] <= "000000000180-e1-1"


def test_condemned_candidates_are_written_down_and_never_offered_again() -> None:
    """The loader's verdict becomes a fact in the store."""
    world = World(dies_at={(1, 47): "killed", (2, 58): "killed"})
    world.condemned = {"000000000040-e1-1"}

    world.run()

    assert ("000000000040-e1-1", "bad") in world.verdicts
    assert "000000000040-e1-1" not in world.plans[2].candidates


def test_no_progress_widens_then_halts() -> None:
    """A crash loop without a new durable step comes to its end."""
    world = World(dies_at={(attempt, 47 if attempt == 1 else 45): "error" for attempt in range(1, 30)})

    end = world.run()

    assert (end.state, end.exit_code) == ("halted", 3)
    assert len(world.plans) == 6
    assert world.plans[3].candidates[0] < world.plans[1].candidates[0]


def test_data_that_is_away_says_nothing_about_the_state() -> None:
    """However often: the newest checkpoint is loaded each time, with ever longer pauses, until the data is back."""
    world = World(dies_at={(attempt, 47 if attempt == 1 else 41): "data_unreachable" for attempt in range(1, 9)})

    end = world.run()

    assert (end.state, end.exit_code) == ("finished", 0)
    assert {plan.candidates[0] for plan in world.plans[1:9]} == {"000000000040-e1-1"}
    assert world.engine.state.attempts_without_progress == 0
    assert {incident.outcome for incident in world.engine.state.incidents if incident.cause == "data_unreachable"} == {
        "worked"
    }


def test_data_that_stays_away_uses_the_budget_up() -> None:
    """There is no loop without end; damaged data is not tried again at all."""
    away = World(dies_at={(attempt, 47 if attempt == 1 else 41): "data_unreachable" for attempt in range(1, 60)})
    damaged = World(dies_at={(1, 47): "data"})

    assert (away.run().exit_code, len(away.plans)) == (4, 11)
    assert (damaged.run().exit_code, len(damaged.plans)) == (3, 1)


def test_budget_of_restarts_is_windowed_by_progress() -> None:
    """Crashes that each made progress never use the budget up."""
    world = World(dies_at={(attempt, 15 + 10 * attempt): "killed" for attempt in range(1, 40)})

    assert world.run().exit_code == 0
    assert len(world.plans) == 40


def test_preemption_is_free() -> None:
    """The machine's own stops use no budget."""
    world = World(dies_at={(attempt, 15): "preempted" for attempt in range(1, 20)})

    assert world.run().exit_code == 0
    assert world.engine.state.restarts_at_s == []


def test_halted_run_stays_halted() -> None:
    """Launching again changes nothing until a person resumes it."""
    world = World(loss=lambda world, step: math.nan)
    assert world.run().exit_code == 3
    attempts = len(world.plans)
    world.ended = None

    world.open()

    assert world.ended is not None
    assert world.ended.exit_code == 3
    assert len(world.plans) == attempts


def test_stop_saves_and_ends_with_five() -> None:
    """The operator's stop leaves a checkpoint."""
    world = World()
    world.open()
    world.load()
    for _ in range(33):
        world.take_step()

    world.feed(StopRequested(at_s=world.at_s, by="operator"))
    assert world.stopping is not None
    assert world.stopping.how == "save"
    world.commit()
    world.exit("preempted")

    assert world.ended is not None
    assert (world.ended.state, world.ended.exit_code) == ("stopped", 5)
    assert world.engine.state.best_durable_step == 33


def test_late_exit_of_an_old_attempt_is_ignored() -> None:
    """Late events are normal and change nothing."""
    world = World(dies_at={(1, 47): "killed"})
    world.open()
    world._attempt()
    before = world.engine.snapshot()

    world.feed(AttemptExited(at_s=world.at_s, attempt=1, cause="killed"))

    assert world.engine.snapshot() == before


@pytest.mark.parametrize(("reproduces", "verdict"), [(False, "hardware"), (True, "data")])
def test_sudden_nan_is_diagnosed_by_replay(reproduces: bool, verdict: str) -> None:
    """Replays that are healthy speak against the device, replays that fail with the data speak against the data."""

    def loss(world: World, step: int) -> float:
        assert world.plan is not None
        poisoned = world.position > 150 * BATCH >= world.position - BATCH
        first = world.plan.attempt == 1
        poison = poisoned and (first or reproduces)
        world.sick = (getattr(world, "sick", False) and world.plan.attempt == getattr(world, "sick_in", 0)) or poison  # type: ignore[attr-defined]
        world.sick_in = world.plan.attempt  # type: ignore[attr-defined]
        return math.nan if world.sick else healthy(world, step)  # type: ignore[attr-defined]

    world = World(policy=_policy(), loss=loss)

    end = world.run()

    assert end.exit_code == 0, [i.why for i in world.engine.incidents()]
    incident = next(i for i in world.engine.incidents() if i.cls == "sudden_nan")
    assert incident.verdict == verdict, incident.why
    skipped = [skip for skip in world.plans[-1].skips if skip.begin <= 150 * BATCH < skip.end]
    assert bool(skipped) == reproduces


@settings(max_examples=15, deadline=None)
@given(
    crashes=st.dictionaries(st.tuples(st.integers(1, 6), st.integers(1, 590)), st.just("killed"), max_size=6),
    cut=st.integers(1, 400),
)
def test_snapshot_in_the_middle_changes_no_decision(crashes: dict[tuple[int, int], str], cut: int) -> None:
    """Restoring a snapshot and folding on gives the same state as never having stopped."""
    straight = World(dies_at=dict(crashes), loss=_spike_in_attempt_one, validation=_confirming, policy=_policy())
    broken = World(dies_at=dict(crashes), loss=_spike_in_attempt_one, validation=_confirming, policy=_policy())
    straight.run()
    folded = 0
    original = broken.engine.fold

    def feed(event: object) -> None:
        nonlocal folded
        folded += 1
        if folded == cut:
            snapshot = broken.engine.snapshot()
            broken.engine = Engine.restore(broken.engine.policy, broken.facts, snapshot)
        for decision in broken.engine.fold(event):  # type: ignore[arg-type]
            broken.obey(decision)

    broken.feed = feed  # type: ignore[method-assign]
    broken.run()

    assert original is not None
    assert broken.engine.snapshot() == straight.engine.snapshot()


@settings(max_examples=25, deadline=None)
@given(
    crashes=st.dictionaries(st.tuples(st.integers(1, 12), st.integers(1, 590)), st.sampled_from(["killed", "error"])),
    onset=st.integers(60, 500),
)
def test_every_run_ends_and_never_loads_what_is_damaged(crashes: dict[tuple[int, int], str], onset: int) -> None:
    """Whatever dies when: the run ends, and no plan's first candidate lies within an open incident's reach."""

    def loss(world: World, step: int) -> float:
        damaged = not world.plan or (not world.plan.skips and step >= onset)
        return healthy(world, step) + (4.0 if damaged else 0.0)

    def validation(world: World, step: int) -> float:
        return loss(world, step)

    world = World(policy=_policy(), loss=loss, validation=validation, dies_at=dict(crashes))

    world.run()

    for plan in world.plans[1:]:
        if plan.skips:
            break
        first = int(plan.candidates[0].split("-")[0])
        assert first < onset + 20, "a state trained on the damaged stretch was chosen"


def test_steps_after_the_decision_to_leave_prove_nothing() -> None:
    """A trainer that is told to leave does a few steps more; they belong to a dead branch and judge no recovery."""

    def wrong_in_attempt_one(world: World, step: int) -> float:
        return 3.0 if world.plan is not None and world.plan.attempt == 1 and 95 <= step < 97 else 1.0

    world = World(lr_error=wrong_in_attempt_one, lag_steps=4)

    end = world.run()

    incident = world.incident("lr_mismatch")
    assert end.state == "finished"
    assert (incident.outcome, incident.cost.steps) == ("worked", 99 - 90)
    assert len(world.plans) == 2
