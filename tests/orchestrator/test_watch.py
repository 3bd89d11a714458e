"""Liveness: silence, second witness, and what must not be taken for a hang."""

from collections.abc import Sequence

import pytest

from orchestrator.process.child import Usage
from orchestrator.process.watch import EXCUSABLE, Reading, Watched, begin, deadline_s, judge
from trainer.contract.config import DeadlinesConfig
from trainer.contract.liveness import Liveness, Phase

DEADLINES = DeadlinesConfig.model_validate(dict.fromkeys(Phase, 10))


def _page(started_s: float, sequence: int = 5, phase: Phase = Phase.TRAIN, hint_s: float = 0.0) -> Liveness:
    return Liveness(1, sequence, 7, phase, started_s, hint_s)


def _looks(
    page: Liveness | None,
    times: Sequence[float],
    busy: float = 0.0,
    moved: float = 0.0,
    watched: Watched | None = None,
    late_s: float = 0.0,
) -> list[str]:
    """Verdicts of looks at these times; CPU and traffic advance at a steady rate."""
    watched = watched or Watched(looked_s=0.0, since_s=0.0, sequence=5)
    verdicts = []
    for now_s in times:
        reading = Reading(now_s, now_s - late_s, page, Usage(busy * now_s, int(moved * now_s)))
        watched, judgement = judge(DEADLINES, watched, reading)
        verdicts.append(judgement.verdict + ("!" if judgement.changed else ""))
    return verdicts


def test_silence_is_suspected_then_confirmed_once_each() -> None:
    """Beyond one deadline evidence is taken, beyond two it is a hang; each is said once."""
    verdicts = _looks(_page(0.0), [9, 11, 15, 19, 21, 25])
    assert verdicts == ["healthy", "suspected!", "suspected", "suspected", "confirmed!", "confirmed"]


def test_the_first_look_at_a_long_silence_only_suspects() -> None:
    """Nothing is killed before its stacks were asked for."""
    assert _looks(_page(0.0), [50, 51]) == ["suspected!", "confirmed!"]


def test_a_sign_of_the_main_loop_ends_the_suspicion() -> None:
    """A new page starts the clock anew, and the same silence can be suspected again later."""
    watched = Watched(looked_s=0.0, since_s=0.0, sequence=5)
    watched, first = judge(DEADLINES, watched, Reading(11.0, 11.0, _page(0.0), None))
    watched, second = judge(DEADLINES, watched, Reading(12.0, 12.0, _page(11.5, sequence=6), None))
    _, third = judge(DEADLINES, watched, Reading(22.0, 22.0, _page(11.5, sequence=6), None))
    assert (first.verdict, second.verdict, third.verdict) == ("suspected", "healthy", "suspected")
    assert third.changed


@pytest.mark.parametrize("phase", sorted(EXCUSABLE))
@pytest.mark.parametrize(("busy", "moved"), [(0.9, 0.0), (0.0, 1e6)])
def test_work_speaks_for_a_phase_of_one_long_operation(phase: Phase, busy: float, moved: float) -> None:
    """A compile burns a core, a load moves bytes: not a hang at two deadlines, but not for ever either."""
    page = None if phase is Phase.SPAWN else _page(0.0, phase=phase)
    watched = Watched(looked_s=0.0, since_s=0.0, sequence=0 if page is None else 5)
    verdicts = _looks(page, range(1, 60), busy, moved, watched)
    assert verdicts[24] == "suspected"
    assert verdicts.index("confirmed!") == 40


@pytest.mark.parametrize("phase", [Phase.TRAIN, Phase.WARM_UP, Phase.EVALUATE])
def test_work_does_not_speak_for_training(phase: Phase) -> None:
    """A collective that hangs spins at full load."""
    assert _looks(_page(0.0, phase=phase), [11, 21], busy=1.0) == ["suspected!", "confirmed!"]


def test_idle_threads_and_log_lines_are_no_work() -> None:
    """A heartbeat thread proves nothing."""
    verdicts = _looks(_page(0.0, phase=Phase.COMPILE), range(1, 25), busy=0.02, moved=1000.0)
    assert verdicts[-1] == "confirmed"


def test_work_that_has_stopped_speaks_no_longer() -> None:
    """Busy until 12, silent since: at two deadlines nobody speaks for it."""
    watched = Watched(looked_s=0.0, since_s=0.0, sequence=5)
    page = _page(0.0, phase=Phase.COMPILE)
    verdict = ""
    for now_s in range(1, 22):
        usage = Usage(float(min(now_s, 12)), 0)
        watched, judgement = judge(DEADLINES, watched, Reading(now_s, now_s, page, usage))
        verdict = judgement.verdict
    assert verdict == "confirmed"


def test_time_in_which_the_supervisor_stood_still_is_not_silence() -> None:
    """Stopped for an hour together with its child (a paused machine): both go on as if nothing had been."""
    watched = Watched(looked_s=8.0, since_s=0.0, sequence=5)
    watched, after = judge(DEADLINES, watched, Reading(3608.0, 9.0, _page(0.0), None))
    assert after.verdict == "healthy"
    assert after.silent_s == pytest.approx(9.0)
    _, later = judge(DEADLINES, watched, Reading(3611.0, 3611.0, _page(0.0), None))
    assert later.verdict == "suspected"


def test_an_adopted_child_gets_its_whole_deadline() -> None:
    """Nobody knows what it did before; the clock starts with the adoption."""
    watched, first = judge(DEADLINES, begin(1000.0), Reading(1001.0, 1001.0, _page(0.0), None))
    _, second = judge(DEADLINES, watched, Reading(1011.0, 1011.0, _page(0.0), None))
    assert (first.verdict, second.verdict) == ("healthy", "suspected")


def test_a_hint_stretches_the_deadline_not_without_bound() -> None:
    """A trainer may announce a long operation, but can't switch the watch off."""
    assert deadline_s(DEADLINES, Phase.SAVE, 25.0) == 25.0
    assert deadline_s(DEADLINES, Phase.SAVE, 1e9) == 40.0
    assert deadline_s(DEADLINES, Phase.SAVE, 1.0) == 10.0


def test_a_child_without_a_page_is_in_the_phase_spawn() -> None:
    """Until the first page the clock runs from its start."""
    watched, judgement = judge(DEADLINES, begin(100.0), Reading(111.0, 111.0, None, None))
    assert (judgement.phase, judgement.verdict, judgement.silent_s) == (Phase.SPAWN, "suspected", 11.0)
    assert watched.verdict == "suspected"
