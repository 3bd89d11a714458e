"""Retention: whatever the history, what a recovery may need stays."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.recovery.retention import BACK_STEPS, Checkpoint, Retention, plan_retention
from trainer.contract.manifest import commit_id


def checkpoint(step: int, epoch: int = 1, **changes: object) -> Checkpoint:
    """A good and verified commit of the lineage, unless told otherwise."""
    plain = Checkpoint(
        id=commit_id(step, epoch, epoch), step=step, epoch=epoch, attempt=epoch, state="good", verified=True,
        pinned=False, in_lineage=True, bytes=1,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]  # the tests name fields


@st.composite
def histories(draw: st.DrawFn) -> list[Checkpoint]:
    """Any set of commits, in any order."""
    steps = draw(st.lists(st.integers(0, 30_000), unique=True, max_size=40))
    states = st.sampled_from(["committed", "verified", "good", "good", "good", "bad"])
    return [
        checkpoint(
            step,
            epoch=draw(st.integers(1, 3)),
            state=draw(states),
            verified=draw(st.booleans()),
            pinned=draw(st.booleans()) and draw(st.booleans()),
            in_lineage=draw(st.booleans()) or draw(st.booleans()),
        )
        for step in steps
    ]


@given(histories(), st.integers(0, 5), st.booleans(), st.data())
def test_what_must_stay_stays(history: list[Checkpoint], keep_good: int, drop: bool, data: st.DataObject) -> None:
    """Never below two verified-good or the configured number of good ones; never a pin, the newest, step 0, a
    condemned one, or one being restored. Every commit is decided upon, once."""
    restoring = set(data.draw(st.lists(st.sampled_from([c.id for c in history]), max_size=3))) if history else set()
    plan = plan_retention(history, keep_good=keep_good, restoring=restoring, drop_abandoned=drop)
    assert plan.keep.keys() | set(plan.delete) == {c.id for c in history}
    assert not plan.keep.keys() & set(plan.delete)

    lineage = sorted((c for c in history if c.in_lineage), key=lambda c: c.step)
    good = [c for c in lineage if c.good]
    proven = [c for c in good if c.verified]
    must = {c.id for c in history if c.pinned or c.step == 0 or c.state == "bad" or c.id in restoring}
    must |= {c.id for c in (*lineage[-1:], *good[-max(2, keep_good) :], *proven[-2:])}
    must |= {c.id for c in lineage if not good or c.step > good[-1].step}
    assert must <= plan.keep.keys()
    if not drop:
        assert {c.id for c in history if not c.in_lineage} <= plan.keep.keys()


@given(histories())
def test_deciding_twice_changes_nothing(history: list[Checkpoint]) -> None:
    """What a plan keeps, the next plan keeps: deleting does not make more deletable."""
    plan = plan_retention(history, keep_good=3)
    left = [c for c in history if c.id in plan.keep]
    assert plan_retention(left, keep_good=3).delete == ()


def test_the_past_is_covered() -> None:
    """Pruned after every commit of a long run, there is always a good one not far from each distance back."""
    kept: list[Checkpoint] = []
    for step in range(0, 30_001, 50):
        kept.append(checkpoint(step))
        plan = plan_retention(kept, keep_good=3)
        kept = [c for c in kept if c.id in plan.keep]
        for back in BACK_STEPS:
            if step > 3 * back:
                assert any(back / 3 <= step - c.step <= 3 * back for c in kept), (step, back)
    assert len(kept) <= 3 + len(BACK_STEPS) + 1


def test_a_short_interval_does_not_eat_the_past() -> None:
    """A commit every step: the last three and one at each distance stay, and the reasons are told."""
    plan = plan_retention([checkpoint(step) for step in range(20_001)], keep_good=3)
    kept = {int(name.split("-")[0]) for name in plan.keep}
    assert kept == {0, 10_000, 17_000, 19_000, 19_700, 19_900, 19_998, 19_999, 20_000}
    assert plan.keep[commit_id(19_000, 1, 1)] == "nearest good one 1000 steps back"


def test_probation_is_not_cut_short() -> None:
    """Commits newer than the newest good one may still become good, so they stay; older unproven ones go."""
    history = [checkpoint(step, state="good" if step <= 30 else "committed") for step in range(0, 100, 10)]
    history.append(checkpoint(25, state="committed"))
    plan = plan_retention(history, keep_good=2)
    assert plan.delete == (commit_id(10, 1, 1), commit_id(25, 1, 1))


def test_nothing_to_decide() -> None:
    """An empty store needs no deletion."""
    assert plan_retention([], keep_good=3) == Retention({}, ())
