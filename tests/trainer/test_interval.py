"""An automatic checkpoint interval: the formula within its bounds, and an attempt that follows it."""

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.attempts import SAVING, TinyRun
from trainer.contract.exit_codes import ExitCode
from trainer.interval import Measured, choose_interval

_SECONDS = st.floats(1e-4, 1e3)


def test_the_formula() -> None:
    """Young's: a stall of 0.5 s and a failure a day make a checkpoint every 294 s, here of one step each."""
    chosen = choose_interval(Measured(stall_s=0.5, disk_s=10.0, step_s=1.0), 86_400.0)
    assert chosen.steps == round(math.sqrt(2 * 0.5 * 86_400))
    assert "stall of 0.5 s" in chosen.because
    assert "24 h" in chosen.because


@pytest.mark.parametrize(
    ("measured", "steps", "because"),
    [
        (Measured(0.5, 400.0, 1.0), 800, "disk takes 400 s"),
        (Measured(1e4, 1.0, 1.0), 3600, "an hour at most"),
        (Measured(1e-9, 0.0, 60.0), 10, "not fewer than 10"),
    ],
)
def test_its_bounds(measured: Measured, steps: int, because: str) -> None:
    """Never faster than the disk, never rarer than hourly, never every few steps; and it says which bound it was."""
    chosen = choose_interval(measured, 86_400.0)
    assert chosen.steps == steps
    assert because in chosen.because


@given(stall_s=_SECONDS, disk_s=_SECONDS, step_s=_SECONDS, failure_every_s=st.floats(60, 1e7))
def test_more_failures_never_make_it_longer(
    stall_s: float, disk_s: float, step_s: float, failure_every_s: float
) -> None:
    """Half the time between failures, at most the interval of before; the disk keeps up with it."""
    measured = Measured(stall_s, disk_s, step_s)
    rare, often = choose_interval(measured, failure_every_s), choose_interval(measured, failure_every_s / 2)
    assert often.steps <= rare.steps
    assert rare.steps >= 10
    assert (rare.steps + 1) * step_s >= disk_s / 0.5


def test_an_attempt_chooses_for_itself(tmp_path: Path) -> None:
    """It begins with a fixed number of steps, then says what it chose and why, and saves at those steps."""
    run = TinyRun(tmp_path, {"steps": 400, "checkpoint": {**SAVING, "every_steps": "auto"}})
    assert run.run(failure_every_s=0.5) == ExitCode.FINISHED
    taken = run.records(1, "snapshot")
    assert (taken[0]["next_steps"], taken[0]["because"]) == (50, "nothing is measured yet")
    assert len({row["because"] for row in taken[1:]} - {taken[0]["because"]}) >= 1
    for before, after in itertools.pairwise(taken[:-1]):
        assert after["step"] == before["step"] + before["next_steps"] + after["late_steps"]
