"""Retention: whatever the history, what a recovery may need stays."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.recovery.retention import BACK_STEPS, Checkpoint, Retention, Spacing, plan_retention
from tests.orchestrator.simulated import World
from trainer.contract.manifest import commit_id

_HOUR_S, _DAY_S = 3600.0, 86400.0
_NOW_S = 1_790_000_000.0
_HOURS_AND_DAYS = (Spacing(_HOUR_S, _DAY_S), Spacing(_DAY_S, 30 * _DAY_S))


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
            committed_at_s=draw(st.none() | st.floats(_NOW_S - 60 * _DAY_S, _NOW_S + _DAY_S)),
        )
        for step in steps
    ]


_RULES = st.lists(
    st.builds(Spacing, st.floats(1.0, 2 * _DAY_S), st.floats(1.0, 60 * _DAY_S)), max_size=3
)  # also rules that no configuration allows
_MAX_AGES = st.none() | st.floats(0.0, 90 * _DAY_S)


@given(histories(), st.integers(0, 5), st.booleans(), _RULES, _MAX_AGES, st.data())
def test_what_must_stay_stays(
    history: list[Checkpoint],
    keep_good: int,
    drop: bool,
    rules: list[Spacing],
    max_age_s: float | None,
    data: st.DataObject,
) -> None:
    """Never below two verified-good or the configured number of good ones; never a pin, the newest, step 0, a
    condemned one, or one being restored; whatever the rules of age, and whatever the clock. Every commit is decided
    upon, once."""
    restoring = set(data.draw(st.lists(st.sampled_from([c.id for c in history]), max_size=3))) if history else set()
    plan = plan_retention(
        history, keep_good=keep_good, restoring=restoring, drop_abandoned=drop, keep_for=rules, now_s=_NOW_S,
        max_age_s=max_age_s,
    )  # fmt: skip
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


@given(histories(), _RULES, _MAX_AGES)
def test_deciding_twice_changes_nothing(
    history: list[Checkpoint], rules: list[Spacing], max_age_s: float | None
) -> None:
    """What a plan keeps, the next plan keeps: deleting does not make more deletable. Nor does the order matter."""

    def plan_of(known: list[Checkpoint]) -> Retention:
        return plan_retention(known, keep_good=3, keep_for=rules, now_s=_NOW_S, max_age_s=max_age_s)

    plan = plan_of(history)
    assert plan_of(history[::-1]) == plan
    assert plan_of([c for c in history if c.id in plan.keep]).delete == ()


@given(st.lists(st.tuples(st.floats(1.0, 10 * _HOUR_S), st.booleans()), min_size=1, max_size=60), _RULES)
def test_no_rule_of_age_ever_misses_what_an_earlier_plan_deleted(
    gaps: list[tuple[float, bool]], rules: list[Spacing]
) -> None:
    """Pruned after every commit, a run has at every moment all that the rules would keep had nothing been deleted."""
    everything: list[Checkpoint] = []
    kept: list[Checkpoint] = []
    now_s = _NOW_S
    for step, (gap_s, good) in enumerate(gaps, 1):
        now_s += gap_s
        one = checkpoint(step, state="good" if good else "committed", committed_at_s=now_s)
        everything.append(one)
        kept.append(one)
        plan = plan_retention(kept, keep_good=2, back_steps=(), keep_for=rules, now_s=now_s)
        kept = [c for c in kept if c.id in plan.keep]
        wanted = plan_retention(everything, keep_good=2, back_steps=(), keep_for=rules, now_s=now_s)
        assert wanted.keep.keys() <= {c.id for c in kept}


@given(histories(), _RULES, st.floats(0.0, _DAY_S))
def test_a_limit_of_age_only_ever_lets_go(history: list[Checkpoint], rules: list[Spacing], max_age_s: float) -> None:
    """It keeps nothing by itself, and lets go nothing that is younger or whose age is not known."""
    without = plan_retention(history, keep_good=2, keep_for=rules, now_s=_NOW_S)
    limited = plan_retention(history, keep_good=2, keep_for=rules, now_s=_NOW_S, max_age_s=max_age_s)
    gone = set(limited.delete) - set(without.delete)
    assert set(without.delete) <= set(limited.delete)
    ages = {c.id: c.committed_at_s for c in history}
    assert all((at_s := ages[name]) is not None and _NOW_S - at_s > max_age_s for name in gone)


def test_dense_near_and_sparse_far() -> None:
    """A checkpoint every ten minutes for 40 days: one an hour of the last day, one a day of the last month."""
    kept: list[Checkpoint] = []
    for number in range(40 * 144):
        now_s = _NOW_S + number * 600
        kept.append(checkpoint(number + 1, committed_at_s=now_s))
        plan = plan_retention(kept, keep_good=3, back_steps=(), keep_for=_HOURS_AND_DAYS, now_s=now_s)
        kept = [c for c in kept if c.id in plan.keep]
    ages_s = [now_s - (c.committed_at_s or 0.0) for c in kept]
    assert sum(age_s > _DAY_S for age_s in ages_s) == 29
    assert sum(600 * 3 <= age_s <= _DAY_S for age_s in ages_s) == 24
    assert len(kept) <= 29 + 24 + 3
    assert plan.keep[kept[0].id] == "one every 86400s for 2592000s"


def test_a_clock_that_jumps_takes_nothing_that_is_needed() -> None:
    """Set back by years, or ahead: the order is by step, what is from the future is young, the last good ones stay."""
    times_s = [_NOW_S, _NOW_S + 10 * _DAY_S, _NOW_S - 900 * _DAY_S, _NOW_S + 1, _NOW_S + 2, _NOW_S + 3]
    history = [checkpoint(step, committed_at_s=at_s) for step, at_s in enumerate(times_s, 1)]
    plan = plan_retention(history, keep_good=2, back_steps=(), keep_for=_HOURS_AND_DAYS, now_s=_NOW_S + 3)
    assert set(plan.keep) == {commit_id(step, 1, 1) for step in (1, 2, 5, 6)}


def test_the_engine_keeps_by_age() -> None:
    """A simulated run, a step a second: beyond the newest ones, one checkpoint of each minute is left."""
    world = World()
    world.facts = world.facts.model_copy(update={"keep_for": (Spacing(60.0, 300.0),)})
    world.engine.facts = world.facts

    world.run()

    left = sorted(step for step, _, _ in world.commits.values())
    assert [step for step in left if 300 <= step < 540] == [300, 360, 420, 480]
    assert [step for step in left if 100 < step < 200] == []


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
