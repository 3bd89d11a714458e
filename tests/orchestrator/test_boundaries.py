"""What must hold across the end of an attempt: incidents, rollbacks and checkpoints outlive crashes and stops."""

import math
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors.records import EvalRecord
from orchestrator.config import resolve, write_resolved
from orchestrator.facts import facts_of
from orchestrator.journal import Batch, Folded, Journal
from orchestrator.launching import fold_under_old_rules
from orchestrator.policy.decisions import CaptureEvidence, Decision, StopAttempt
from orchestrator.policy.engine import Engine
from orchestrator.policy.events import AttemptExited, Event, RecordReceived, ResumeRequested, RunOpened, StopRequested
from orchestrator.policy.model import Policy
from tests.orchestrator.simulated import World, healthy

_CUT = {"factor": 0.5, "hold_steps": 30, "ramp_steps": 40}
_RULE = {
    "on": "unrecovered_spike",
    "ladder": [{"roll_back": {"margin_steps": 20}, "skip_data": "40 batches", "lower_lr": _CUT}, {"halt": {}}],
}
_GUARDS = {"max_skipped_share": 0.5, "max_discarded_share": 1.0, "relapse_steps": 200}


def _policy(**changes: object) -> Policy:
    return Policy.model_validate({"version": 1, "guards": _GUARDS, "rules": [_RULE], **changes})


def _spike_at(begin: int, attempts: tuple[int, ...] = (1,)) -> "object":
    def loss(world: World, step: int) -> float:
        assert world.plan is not None
        return healthy(world, step) + (4.0 if world.plan.attempt in attempts and step >= begin else 0.0)

    return loss


def test_an_incident_does_not_outlive_the_state_that_it_was_seen_in() -> None:
    """A crash while a spike is suspected: back before its onset it is settled, and checkpoints become good again."""
    world = World(policy=_policy(), loss=_spike_at(200), dies_at={(1, 205): "killed"})  # type: ignore[arg-type]

    world.run()

    assert all(not incident.is_open for incident in world.engine.incidents())
    assert world.incident("transient_spike").outcome == "superseded"
    good = world.engine.status().last_good_step
    assert good is not None
    assert good >= 560


@settings(max_examples=25, deadline=None)
@given(
    onset=st.integers(5, 300),
    crashes=st.lists(st.integers(5, 400), max_size=3, unique=True),
    attempts=st.integers(1, 3),
)
def test_a_run_with_checkpoints_never_starts_from_scratch(onset: int, crashes: list[int], attempts: int) -> None:
    """Whatever is open, suspected or early: from the second attempt on there is something to load, or the run halts."""
    world = World(
        policy=_policy(),
        loss=_spike_at(onset, tuple(range(1, attempts + 1))),  # type: ignore[arg-type]
        dies_at={(number + 1, step): "killed" for number, step in enumerate(crashes)},
    )

    world.run()

    assert all(plan.candidates and not plan.fresh for plan in world.plans[1:])


def test_a_rollback_holds_until_it_is_loaded() -> None:
    """The attempt that was to load it dies; the next one loads the same, re-anchored, and not the newest state."""
    world = World(policy=_policy(), loss=_spike_at(200), dies_loading={2})  # type: ignore[arg-type]

    world.run()

    rollback, again = world.plans[1], world.plans[2]
    assert again.candidates == rollback.candidates
    assert (rollback.reanchor, again.reanchor) == (True, True)
    assert int(again.candidates[0][:12]) <= 180


def test_a_rollback_holds_across_a_stop_and_the_next_launch() -> None:
    """SIGTERM while the damaged attempt leaves: launched again, the run goes where it was going."""
    world = World(policy=_policy(), loss=_spike_at(200))  # type: ignore[arg-type]
    world.open()
    world.load()
    while world.stopping is None:
        world.take_step()
    world.feed(StopRequested(at_s=world.at_s, by="preemption", save=True))
    world.exit("left")
    assert world.ended is not None
    assert world.ended.exit_code == 75
    world.ended = None

    world.open()

    assert world.plans[-1].reanchor
    assert int(world.plans[-1].candidates[0][:12]) <= 180
    assert world.plans[-1].skips


def test_what_is_captured_of_the_dead_is_captured() -> None:
    """A rule that says `capture` for a crash keeps the black box under the incident's number."""
    rule = {"on": "crash", "do": ["capture", "restart"]}
    world = World(policy=_policy(rules=[rule]))
    world.open()
    world.load()
    world.take_step()

    decisions = world.engine.fold(AttemptExited(at_s=world.at_s, attempt=1, cause="killed"))

    incident = world.incident("crash")
    assert incident.decision == ["capture", "restart"]
    assert [(d.attempt, d.incident) for d in decisions if isinstance(d, CaptureEvidence)] == [(1, incident.id)]


@pytest.mark.parametrize(
    ("written", "skipped", "discarded"),
    [({}, 2000, 3000), ({"max_skipped_share": 0.01}, 0, 3000), ({"max_discarded_share": 0.01}, 2000, 0)],
)
def test_a_share_that_is_written_down_has_no_floor(written: dict[str, float], skipped: int, discarded: int) -> None:
    """The floors let the shipped ladder run once in a short plan; they never widen what somebody has set."""
    guards = Policy.model_validate({"version": 1, "guards": written}).guards

    assert (guards.always_skipped_batches, guards.always_discarded_steps) == (skipped, discarded)


def test_a_second_polite_request_still_saves() -> None:
    """SIGUSR1, then SIGTERM, as Slurm sends them."""
    world = World()
    world.open()
    world.load()
    for _ in range(25):
        world.take_step()
    event = StopRequested(at_s=world.at_s, by="preemption", save=True)

    first, second = world.engine.fold(event), world.engine.fold(event)

    hows = [decision.how for decision in (*first, *second) if isinstance(decision, StopAttempt)]
    assert hows == ["save", "save"]


def test_an_answer_that_comes_after_the_stop_is_history() -> None:
    """The evaluation that confirms a spike comes when the run has been told to stop: it stops."""
    world = World(policy=_policy(rules=[{**_RULE, "when": {"validation_confirms": True}}]), loss=_spike_at(200))  # type: ignore[arg-type]
    world.open()
    world.load()
    asked: list[int | None] = []

    def note(command: int | None = None) -> None:
        asked.append(command)

    world.evaluate = note  # type: ignore[method-assign]
    while not asked or asked[-1] is None:
        world.take_step()
    world.feed(StopRequested(at_s=world.at_s, by="operator", save=True))
    fields = world.record(step=world.step, loss=9.0, perplexity=1.0, seconds=0.1, command=asked[-1])
    world.feed(RecordReceived(at_s=world.at_s, record=EvalRecord.model_validate(fields)))
    world.exit("preempted")

    assert world.ended is not None
    assert (world.ended.state, len(world.plans)) == ("stopped", 1)


@pytest.mark.parametrize(("commits", "code"), [(True, 75), (False, 143)])
def test_preempted_means_that_there_is_a_checkpoint(commits: bool, code: int) -> None:
    """75 says run me again; what is not in the checkpoint is said."""
    world = World()
    world.open()
    if commits:
        world.load()
        for _ in range(27):
            world.take_step()
    world.feed(StopRequested(at_s=world.at_s, by="preemption", save=True))
    if commits:
        world.exit("left")  # the save did not come to its end

    assert world.ended is not None
    assert world.ended.exit_code == code
    assert ("step 20 is saved, the 7 steps after it are not" in world.ended.because) == commits


def test_non_finite_relapses_climb_their_ladder() -> None:
    """Each relapse is diagnosed and answered one rung further, and in the end a person is asked."""

    def loss(world: World, step: int) -> float:
        return math.nan if step >= 200 else healthy(world, step)

    world = World(policy=_policy(), loss=loss)

    end = world.run()

    rungs = [incident.rung for incident in world.engine.incidents() if incident.decision]
    assert end.state in ("halted", "budget_used_up")
    assert rungs == sorted(set(rungs))


def test_the_tail_is_folded_by_the_rules_under_which_it_was_written(tmp_path: Path) -> None:
    """The supervisor is killed, the policy edited, the run launched again: what was decided stays decided."""
    (tmp_path / "p.yaml").write_text("version: 1\n")
    source = tmp_path / "run.yaml"
    source.write_text(
        "version: 1\nname: x\nsteps: 600\npolicy: p.yaml\nschedule: {warmup_steps: 10}\ndata: {train: data}\n"
    )
    old = resolve(source)
    write_resolved(old)
    world = World(policy=old.policy, loss=_spike_at(200))  # type: ignore[arg-type]
    engine = Engine(old.policy, facts_of(old.config))
    world.engine = engine
    events: list[Event] = []
    fold = engine.fold

    def folded(event: Event) -> list[Decision]:
        events.append(event)
        return fold(event)

    engine.fold = folded  # type: ignore[method-assign]
    world.open()
    world.load()
    while not engine.state.skips:
        world.take_step()
    with closing(Journal.open(old.paths.database)) as journal:
        journal.commit(Batch(folded=tuple(Folded(event, ()) for event in events)))
    (tmp_path / "p.yaml").write_text("version: 1\ndetect: {recover_steps: 90}\n")

    fold_under_old_rules(resolve(source))

    with closing(Journal.open(old.paths.database)) as journal:
        seq, snapshot = journal.newest_snapshot()
    assert isinstance(events[0], RunOpened)
    assert seq == len(events)
    assert snapshot == engine.snapshot()


def test_departures_without_a_step_do_not_go_in_circles() -> None:
    """A trainer that always says it was preempted spends no budget, but is waited for longer and longer."""
    world = World()
    world.open()
    waits: list[float] = []
    for _ in range(12):
        before = world.at_s
        world.exit("preempted")
        waits.append(world.at_s - before)

    assert waits[:4] == [1.0, 3.0, 7.0, 15.0]
    assert max(waits) == 300.0


def test_a_person_who_takes_up_a_loss_discontinuity_accepts_the_new_losses() -> None:
    """Where the change was meant (another device, another precision), every resume would halt at the same steps."""

    def loss(world: World, step: int) -> float:
        assert world.plan is not None
        return healthy(world, step) + (0.1 if world.plan.attempt > 1 else 0.0)

    world = World(loss=loss, dies_at={(1, 47): "killed"})
    assert world.run().exit_code == 3
    assert world.engine.incidents()[-1].cls == "loss_discontinuity"
    world.ended = None

    world.feed(ResumeRequested(at_s=world.at_s, because="it is another device"))

    assert world.run().exit_code == 0
