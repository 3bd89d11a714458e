"""Where the time of a run went, how much is left, which way the loss moves: from journals of known attempts."""

from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.journal import Journal
from orchestrator.report.numbers import duration
from orchestrator.report.progress import seconds_left, trend
from orchestrator.report.recent import RecentStep, recent_steps, survivors
from orchestrator.report.time_spent import TimeSpent, time_spent
from tests.orchestrator.walks import Walk, loss_at, write_walks

#: 40 steps; killed, back to 20; a replay that counts for nothing; back to 20 again, and on to 70, still running.
_WALKS = (
    Walk(0, 40, spawned_s=0, ready_s=10, ended_s=55),
    Walk(20, 50, spawned_s=60, ready_s=65, ended_s=100),
    Walk(20, 25, spawned_s=101, ready_s=104, ended_s=110, replay=True),
    Walk(30, 70, spawned_s=112, ready_s=115, ended_s=None),
)
_TOTALS = '{"evaluation_seconds_total{}": 6.0, "checkpoint_stall_seconds_total{}": 2.0}'


def test_survivors_are_what_no_later_attempt_began_before(tmp_path: Path) -> None:
    """One range each; the replay has none. The same steps as the journal's own definition."""
    write_walks(tmp_path / "run.db", _WALKS)
    with closing(Journal.read_only(tmp_path / "run.db")) as journal:
        assert [(one.attempt, one.first, one.last) for one in survivors(journal)] == [
            (1, 0, 20),
            (2, 20, 30),
            (4, 30, None),
        ]
        expected = [(row["step"], row["attempt"]) for row in journal.steps(surviving=True)]
        assert [(row.step, row.attempt) for row in recent_steps(journal, 1000)] == expected
        assert [row.step for row in recent_steps(journal, 45)] == list(range(26, 71))


@settings(max_examples=40, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30), st.booleans()), min_size=1, max_size=6),
    count=st.integers(1, 100),
)
def test_recent_steps_are_the_end_of_the_surviving_ones(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int, bool]], count: int
) -> None:
    """Whatever the order of starts."""
    walks = [Walk(first, first + more, 100.0 * n, 100.0 * n + 1, 100.0 * n + 90, replay)
             for n, (first, more, replay) in enumerate(spans)]  # fmt: skip
    database = tmp_path_factory.mktemp("journal") / "run.db"
    write_walks(database, walks)
    with closing(Journal.read_only(database)) as journal:
        expected = [(row["step"], row["attempt"]) for row in journal.steps(surviving=True)]
        assert [(row.step, row.attempt) for row in recent_steps(journal, count)] == expected[-count:]


def test_every_second_is_in_one_bucket(tmp_path: Path) -> None:
    """By hand: 20 + 10 + 40 s of steps survive, 8 of these seconds were evaluations and saves."""
    write_walks(tmp_path / "run.db", _WALKS, _TOTALS)
    with closing(Journal.read_only(tmp_path / "run.db")) as journal:
        spent = time_spent(journal, now_s=160.0)
    assert spent == TimeSpent(
        training=62.0, evaluation=6.0, stall=2.0, lost=20.0 + 20.0, replay=9.0, starting=10.0 + 5.0 + 3.0,
        detection=5.0 + 5.0 + 5.0, down=5.0 + 1.0 + 2.0,
    )  # fmt: skip
    assert spent.wall == 160.0
    assert spent.goodput == pytest.approx(62.0 / 160.0)


def test_nothing_is_known_of_a_run_that_has_not_begun(tmp_path: Path) -> None:
    """Not even a goodput of zero."""
    write_walks(tmp_path / "run.db", ())
    with closing(Journal.read_only(tmp_path / "run.db")) as journal:
        assert (time_spent(journal, 100.0).goodput, recent_steps(journal, 10)) == (None, [])


def _rows(losses: list[float | None], attempt: int = 1, step_s: float = 2.0) -> list[RecentStep]:
    return [RecentStep(n, loss, 1.0, n * step_s, attempt) for n, loss in enumerate(losses)]


def test_time_left_is_at_the_pace_of_this_attempt() -> None:
    """A restart is no step that took long; of a new attempt nothing is said at first."""
    rows = _rows([1.0] * 100)
    assert seconds_left(rows, 199) == pytest.approx(200.0)
    restarted = [*rows, *(row._replace(step=row.step + 100, at_s=row.at_s + 5000, attempt=2) for row in rows[:30])]
    assert seconds_left(restarted, 229) == pytest.approx(200.0)
    assert seconds_left(restarted[:105], 229) is None


def test_the_trend_of_a_loss() -> None:
    """In nats over the window; steps without a number are left out."""
    falling = trend(_rows([loss_at(step) for step in range(1000)]))
    assert falling is not None
    assert falling.change == pytest.approx(loss_at(950) - loss_at(50), abs=0.05)
    assert str(falling).startswith("down ")
    rising = trend(_rows([2.0, None] * 20 + [3.0, None] * 20))
    assert rising is not None
    assert str(rising) == "up 1 over the last 78 steps"
    assert trend(_rows([1.0] * 5)) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "59 min"), (11_100, "3 h 05 min"), (1_400_000, "16 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    """Two units at most."""
    assert duration(seconds) == text
