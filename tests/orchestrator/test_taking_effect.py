"""A plan that a running trainer takes late: every later plan says from where it was really in force."""

from monitors.records import PlanAppliedRecord
from monitors.taxonomy import IncidentClass
from orchestrator.policy import attempts
from orchestrator.policy.context import Context
from orchestrator.policy.decisions import SendCommand
from orchestrator.policy.events import RecordReceived, Ticked
from orchestrator.policy.state import Recovery
from tests.orchestrator.simulated import World
from trainer.contract.plan import Overlay, Quarantine


def _running(steps: int) -> World:
    world = World()
    world.open()
    world.load()
    for _ in range(steps):
        world.take_step()
    return world


def _decided(world: World) -> int:
    engine = world.engine
    ctx = Context(engine.state, engine.policy, engine.facts)
    engine.state.quarantines.append(Quarantine(shard=1, from_position=world.position, incident=1))
    engine.state.overlays.append(Overlay(from_step=world.step + 1, factor=0.5, hold_until_step=world.step + 50))
    ctx.apply_plan(None)
    (sent,) = [decision for decision in ctx.decisions if isinstance(decision, SendCommand)]
    return sent.command.id


def _applied(world: World, command: int) -> None:
    fields = world.record(step=world.step, position=world.position, command=command)
    world.feed(RecordReceived(at_s=world.at_s, record=PlanAppliedRecord.model_validate(fields)))


def test_what_was_applied_late_holds_from_there() -> None:
    """Steps that ran before it took effect are run again as they were: without it."""
    world = _running(45)
    command = _decided(world)
    world.take_step()
    world.take_step()
    _applied(world, command)
    state = world.engine.state
    assert state.quarantines[0].from_position == world.position
    assert state.overlays[0].from_step == world.step + 1
    taken = (state.quarantines[0], state.overlays[0])
    world.take_step()
    world.exit("killed")
    world.load()  # from step 40, before any of it
    assert world.plan is not None
    assert (world.plan.quarantines, world.plan.overlays) == ((taken[0],), (taken[1],))
    assert (state.quarantines[0], state.overlays[0]) == taken


def test_what_was_never_applied_holds_from_the_next_load() -> None:
    """The trainer died first: nothing of the surviving history knows of it."""
    world = _running(45)
    _decided(world)
    begin = world.position
    for _ in range(5):
        world.take_step()
    world.exit("killed")
    world.load()
    assert world.step == 50
    assert world.engine.state.quarantines[0].from_position == world.position > begin
    assert world.engine.state.overlays[0].from_step == 51


def test_one_outage_of_the_store_is_one_incident() -> None:
    """While what has gathered is on its way, each checkpoint that arrives is late too; that is known."""
    world = World(store_is_there=lambda _, step: step < 100 or step > 300)
    world.run()
    overdue = [i for i in world.engine.incidents() if i.cls is IncidentClass.CHECKPOINT_OVERDUE]
    assert len(overdue) == 1


def test_a_rollback_lets_what_began_later_hold_from_its_target() -> None:
    """A quarantine of the branch that is left is not waited for again, nor is its lowered rate."""
    world = _running(45)
    _applied(world, _decided(world))
    state = world.engine.state
    engine, target = world.engine, next(c for c in state.commits if c.step == 20)
    world.exit("killed")
    ctx = Context(state, engine.policy, engine.facts)
    attempts.start(ctx, Recovery(kind="restart", candidates=[target.id], reanchor=True))
    for decision in ctx.decisions:
        world.obey(decision)
    world.load()
    assert world.step == 20
    assert state.quarantines[0].from_position == world.position
    assert state.overlays[0].from_step == 21


def test_a_clock_that_is_set_back_does_not_stop_time() -> None:
    """What is due in ten seconds is due in ten seconds, whatever the clock was put to meanwhile."""
    engine = World().engine
    engine.fold(Ticked(at_s=1000.0))
    engine.fold(Ticked(at_s=400.0))
    before_s = engine.state.now_s
    engine.fold(Ticked(at_s=410.0))
    assert engine.state.now_s == before_s + 10.0
