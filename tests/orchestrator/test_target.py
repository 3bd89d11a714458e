"""What a recovery loads: for any commits, the newest that lies before the reach of what went wrong."""

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policy.state import Commit
from orchestrator.recovery.target import process_candidates, training_candidates
from tests.orchestrator.simulated import World
from trainer.contract.manifest import commit_id


def _commit(step: int, standing: str, tainted: bool) -> Commit:
    return Commit.model_validate(
        {"id": commit_id(step, 1, 1), "step": step, "position": step, "tokens": step, "standing": standing,
         "tainted": tainted, "where": "store", "committed_at_s": 0.0}
    )  # fmt: skip


@st.composite
def lineages(draw: st.DrawFn) -> list[Commit]:
    """Commits at some steps, each of any standing."""
    steps = sorted(draw(st.sets(st.integers(0, 60), max_size=12)))
    standings = st.sampled_from(["committed", "good", "bad"])
    return [_commit(step, draw(standings), draw(st.booleans())) for step in steps]


@given(commits=lineages(), onset=st.integers(1, 70), margin=st.integers(0, 30))
def test_a_rollback_goes_before_the_onset_and_its_margin(commits: list[Commit], onset: int, margin: int) -> None:
    """Good ones alone, newest first, none that the first bad update or the margin touches."""
    chosen = training_candidates(commits, onset, margin)
    latest = max(0, onset - max(1, margin))
    eligible = [c for c in commits if c.step <= latest and not c.tainted and (c.standing == "good" or c.step == 0)]
    eligible = [c for c in eligible if c.standing != "bad"]
    assert chosen == sorted(eligible, key=lambda c: -c.step)[:8]


@given(commits=lineages(), tainted_from=st.none() | st.integers(0, 70))
def test_a_restart_stays_before_what_is_suspected(commits: list[Commit], tainted_from: int | None) -> None:
    """Nothing condemned or tainted; while something is suspected only good ones before its reach."""
    chosen = process_candidates(commits, tainted_from)
    assert [c.step for c in chosen] == sorted((c.step for c in chosen), reverse=True)
    assert all(c.standing != "bad" and not c.tainted for c in chosen)
    if tainted_from is not None:
        assert all(c.step < max(1, tainted_from) and (c.standing == "good" or c.step == 0) for c in chosen)


def test_a_tainted_commit_never_becomes_good() -> None:
    """However many healthy steps follow it: what damaged it is in it."""
    world = World()
    world.open()
    world.load()
    while world.step < 100:
        world.take_step()
    tainted = next(c for c in world.engine.state.commits if c.step == 100)
    tainted.tainted = True
    while world.step < 200:
        world.take_step()
    assert tainted.standing == "committed"
    assert any(c.standing == "good" for c in world.engine.state.commits if c.step > 100)
