"""Checkpoints that are on the local disk and not yet in the store, as the engine sees them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors.records import CommitRecord
from orchestrator.policy.events import RecordReceived
from tests.orchestrator.simulated import World


def _away(first: int, last: int) -> "object":
    return lambda world, step: not first <= step <= last


def test_a_crash_during_an_outage_loses_the_steps_since_the_last_copy() -> None:
    """The store has been away for 150 steps: the run goes on from the local disk, not from the store."""
    world = World(store_is_there=_away(200, 400), dies_at={(1, 355): "killed"})  # type: ignore[arg-type]
    world.run()
    newest = world.plans[1].candidates[0]
    assert newest.startswith("000000000350")
    assert world.engine.status().last_stored_step == 600
    assert len(world.plans) == 2


def test_an_outage_is_told_though_the_disk_keeps_up() -> None:
    """What counts for an overdue checkpoint is the store: the node may be lost with its disk."""
    world = World(store_is_there=_away(200, 400))  # type: ignore[arg-type]
    world.run()
    incident = world.incident("checkpoint_overdue")
    assert incident.onset_step == 190
    assert "in the store" in incident.why


@settings(max_examples=30, deadline=None)
@given(
    first=st.integers(20, 500),
    length=st.integers(10, 300),
    deaths=st.lists(st.integers(15, 590), max_size=3, unique=True),
)
def test_what_is_in_the_store_outlives_any_outage(first: int, length: int, deaths: list[int]) -> None:
    """Whatever dies and whenever the store is away: it never holds fewer than two good ones once it held two."""
    world = World(
        store_is_there=_away(first, first + length),  # type: ignore[arg-type]
        dies_at=dict.fromkeys(enumerate(sorted(deaths), start=1), "killed"),
    )
    lows: list[int] = []
    obey = world.obey

    def watched(decision: object) -> None:
        obey(decision)  # type: ignore[arg-type]
        good = {commit for commit, verdict in world.verdicts if verdict == "good"}
        lows.append(len(good & world.stored))

    world.obey = watched  # type: ignore[method-assign]
    world.run()
    reached = next((index for index, low in enumerate(lows) if low >= 2), len(lows))
    assert all(low >= 2 for low in lows[reached:])
    assert world.ended is not None
    assert world.ended.exit_code == 0


@pytest.mark.parametrize("tier", ["disk", "store"])
def test_late_news_of_a_dead_attempt(tier: str) -> None:
    """Of a checkpoint that is known it counts, of one that a rollback or a restart went behind it does not."""
    world = World(store_is_there=_away(100, 600), dies_at={(1, 125): "killed"})  # type: ignore[arg-type]
    world.open()
    world._attempt()
    world.load()
    before = [(commit.id, commit.where) for commit in world.engine.state.commits]
    assert before[-1] == ("000000000120-e1-1", "disk")
    for step, name in ((120, "000000000120-e1-1"), (125, "000000000125-e1-1")):
        record = CommitRecord.model_validate(
            {"seq": 1000 + step, "attempt": 1, "at_s": 0.0, "tier": tier, "step": step, "commit": name,
             "position": step, "tokens": step, "bytes": 1, "seconds": 0.1}
        )  # fmt: skip
        world.feed(RecordReceived(at_s=0.0, record=record))
    after = {commit.id: commit.where for commit in world.engine.state.commits}
    assert "000000000125-e1-1" not in after
    assert after["000000000120-e1-1"] == tier


def test_what_was_passed_over_is_no_target() -> None:
    """A checkpoint that left the local disk before it reached the store is forgotten."""
    world = World(store_is_there=_away(100, 600), dies_at={(1, 155): "killed"})  # type: ignore[arg-type]
    world.open()
    world._attempt()
    known = [commit.id for commit in world.engine.state.commits if commit.where == "disk"]
    assert known == [name for name, _ in world.waiting]
    assert set(world.plans[1].candidates) <= set(world.commits)


def test_what_an_adopted_attempt_saved_before_it_was_heard_of_stays() -> None:
    """A supervisor that took over reads the keepers' news first: what this very attempt saved was not left behind."""
    world = World()
    world.open()
    for step in (20, 30):
        name = f"{step:012d}-e1-1"
        record = CommitRecord.model_validate(
            {"seq": step, "attempt": 1, "at_s": 0.0, "tier": "store", "step": step, "commit": name,
             "position": step, "tokens": step, "bytes": 1, "seconds": 0.1}
        )  # fmt: skip
        world.feed(RecordReceived(at_s=0.0, record=record))
    world.load()
    known = [commit.id for commit in world.engine.state.commits]
    assert {"000000000020-e1-1", "000000000030-e1-1"} <= set(known)
    assert world.engine.state.abandoned == []
