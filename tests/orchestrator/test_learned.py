"""Deadlines that follow what a run has shown, within what is configured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitors.records import EvalRecord, StepTime
from orchestrator.process.learned import Learned
from orchestrator.process.watch import Reading, Watched, deadline_s, judge
from tests.orchestrator.events import step_record
from trainer.contract.config import DeadlinesConfig, RunConfig
from trainer.contract.liveness import Liveness, Phase

_DEADLINES = DeadlinesConfig(train=600.0, evaluate=1800.0, learn_floor_s=60.0, learn_factor=5.0)


def _learned(*taken_s: float) -> Learned:
    learned = Learned()
    for number, seconds in enumerate(taken_s, 1):
        learned.observe(step_record(1, number, step_time_s=StepTime(data=0.0, compute=seconds, other=0.0)))
    return learned


def _limit_s(learned: Learned, phase: Phase = Phase.TRAIN) -> float:
    return deadline_s(_DEADLINES, phase, learned=learned)


def test_until_enough_was_seen_the_configured_deadline_holds() -> None:
    """Forty-nine steps have no percentile."""
    assert _limit_s(_learned(*[2.0] * 49)) == 600.0
    assert _limit_s(_learned(*[2.0] * 50)) == 60.0


@given(taken_s=st.lists(st.floats(0.001, 1000.0), min_size=50, max_size=300))
def test_between_floor_and_what_is_configured(taken_s: list[float]) -> None:
    """Five times a duration that no more than one in a hundred exceeds, in buckets of a fifth."""
    limit_s = _limit_s(_learned(*taken_s))
    assert 60.0 <= limit_s <= 600.0
    ordered = sorted(taken_s)
    quantile_s = ordered[min(len(ordered) - 1, -(-99 * len(ordered) // 100) - 1)]
    expected_s = min(600.0, max(60.0, 5.0 * quantile_s))
    assert 0.99 * expected_s <= limit_s <= 1.2 * expected_s


def test_the_past_is_forgotten_and_phases_are_apart() -> None:
    """Slow steps of long ago no longer stretch the deadline; evaluations have their own."""
    learned = _learned(*[100.0] * 200, *[20.0] * 20_000)
    assert 100.0 <= _limit_s(learned) <= 125.0
    assert _limit_s(learned, Phase.EVALUATE) == 1800.0
    for number in range(50):
        learned.observe(EvalRecord(seq=1, attempt=1, at_s=0.0, step=number, loss=1.0, perplexity=2.7, seconds=30.0))
    assert 150.0 <= _limit_s(learned, Phase.EVALUATE) <= 180.0


def test_a_hint_still_asks_for_more_time() -> None:
    """Before a known long operation the trainer says so, whatever was learned."""
    learned = _learned(*[1.0] * 100)
    assert deadline_s(_DEADLINES, Phase.TRAIN, 900.0, learned) == 900.0
    assert DeadlinesConfig(train=600.0, learn_factor=None).learn_factor is None
    assert deadline_s(DeadlinesConfig(train=600.0, learn_factor=None), Phase.TRAIN, learned=learned) == 600.0


def test_a_process_that_is_stopped_is_suspected_and_long_spared() -> None:
    """By a signal or a debugger: killed only at four deadlines, since who forgot it will not come back."""
    page = Liveness(1, 5, 7, Phase.TRAIN, 0.0, 0.0)
    deadlines = DeadlinesConfig(train=10.0)
    watched, verdicts = Watched(looked_s=0.0, since_s=0.0, sequence=5), []
    for now_s in range(1, 45):
        reading = Reading(float(now_s), float(now_s), page, None, stopped=True)
        watched, judgement = judge(deadlines, watched, reading)
        verdicts.append(judgement.verdict)
    assert verdicts.index("suspected") == 10
    assert verdicts.index("confirmed") == 40


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"checkpoint": {"patience_s": 1801}}, ("checkpoint.patience_s", "deadlines.save")),
        ({"store": {"url": "s", "timeout_s": 1801}}, ("store.timeout_s", "deadlines.save")),
    ],
)
def test_time_outs_that_cannot_work_together_are_refused(changes: dict[str, object], named: tuple[str, str]) -> None:
    """Whoever waits is not to be ended before the wait is over; both keys are named."""
    config = {"name": "r", "steps": 10, "schedule": {"warmup_steps": 0}, "data": {"train": "x"}, "store": {"url": "s"}}
    RunConfig.model_validate(config)
    with pytest.raises(ValueError, match="must not be longer than") as refused:
        RunConfig.model_validate({**config, **changes})
    assert all(name in str(refused.value) for name in named)
