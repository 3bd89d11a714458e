"""The learning-rate schedules: TRAINING's check values and the rules of each shape."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.config import ScheduleConfig
from trainer.contract.plan import Overlay, overlay_factor
from trainer.schedule import lr_at

COSINE = ScheduleConfig(kind="cosine", warmup_steps=2000, min_ratio=0.0)


@pytest.mark.parametrize(("step", "lr"), [(0, 0.0), (1000, 1.5e-4), (2000, 3e-4), (100_000, 0.0), (150_000, 0.0)])
def test_check_values_exactly(step: int, lr: float) -> None:
    """Peak 3e-4, warm-up 2,000, total 100,000."""
    assert lr_at(step, COSINE, 3e-4, 100_000) == lr


def test_half_way_is_about_half_the_peak() -> None:
    """Step 50,000 is about 1.5e-4; the middle of the cosine itself is exactly half."""
    assert lr_at(50_000, COSINE, 3e-4, 100_000) == pytest.approx(1.5e-4, rel=0.05)
    assert lr_at(51_000, COSINE, 3e-4, 100_000) == pytest.approx(1.5e-4, rel=1e-9)


def test_cosine_ends_at_the_minimum_and_stays() -> None:
    """GPT-3's ending: a tenth of the peak, also past the end."""
    schedule = ScheduleConfig(warmup_steps=10, min_ratio=0.1)
    assert [lr_at(step, schedule, 1.0, 100) for step in (100, 101, 10**9)] == [0.1] * 3


def test_wsd_is_stable_then_decays_linearly() -> None:
    """Flat until the last `decay_steps`, then a line to the minimum."""
    schedule = ScheduleConfig(kind="wsd", warmup_steps=10, min_ratio=0.1, decay_steps=20)
    assert [lr_at(step, schedule, 2.0, 100) for step in (5, 10, 80)] == [1.0, 2.0, 2.0]
    assert lr_at(90, schedule, 2.0, 100) == pytest.approx(2.0 * 0.55)
    assert lr_at(100, schedule, 2.0, 100) == lr_at(500, schedule, 2.0, 100) == pytest.approx(0.2)


def test_wsd_decays_over_a_tenth_unless_told() -> None:
    """The default decay is the run's last tenth, and it never begins within warm-up."""
    schedule = ScheduleConfig(kind="wsd", warmup_steps=0, min_ratio=0.0)
    assert lr_at(900, schedule, 1.0, 1000) == 1.0
    assert lr_at(950, schedule, 1.0, 1000) == pytest.approx(0.5)
    long_warmup = ScheduleConfig(kind="wsd", warmup_steps=95, min_ratio=0.0, decay_steps=50)
    assert lr_at(95, long_warmup, 1.0, 100) == 1.0


def test_constant_stays_at_the_peak() -> None:
    """No decay, also past the end."""
    schedule = ScheduleConfig(kind="constant", warmup_steps=4)
    assert [lr_at(step, schedule, 1.0, 10) for step in (0, 2, 4, 10, 99)] == [0.0, 0.5, 1.0, 1.0, 1.0]


@given(
    kind=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup=st.integers(0, 50),
    more=st.integers(0, 200),
    min_ratio=st.floats(0, 1),
    decay=st.none() | st.integers(1, 300),
)
def test_every_schedule_rises_then_never_rises_again(
    kind: str, warmup: int, more: int, min_ratio: float, decay: int | None
) -> None:
    """Rates lie in [0, peak], rise through warm-up, and fall from there to the minimum, whatever the numbers."""
    schedule = ScheduleConfig.model_validate(
        {"kind": kind, "warmup_steps": warmup, "min_ratio": min_ratio, "decay_steps": decay}
    )
    total = max(1, warmup + more)
    rates = [lr_at(step, schedule, 3e-4, total) for step in range(total + 3)]
    assert all(0 <= rate <= 3e-4 * (1 + 1e-12) for rate in rates)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1]) or more == 0
    tail = rates[warmup:]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(tail))
    assert rates[-1] == pytest.approx(3e-4 * (1.0 if kind == "constant" else min_ratio))


def test_of_several_overlays_the_smallest_applies() -> None:
    """A cut that is made while another one holds deepens it, and never lifts it."""
    halved = Overlay(from_step=1, factor=0.5, hold_until_step=50, ramp_steps=50)
    tenth = Overlay(from_step=20, factor=0.1, hold_until_step=30, ramp_steps=0)
    assert [overlay_factor((halved, tenth), step) for step in (10, 25, 40, 200)] == [0.5, 0.1, 0.5, 1.0]
    assert overlay_factor((), 5) == 1.0
