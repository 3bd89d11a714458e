"""The band: what a window of healthy losses expects next."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitors.window import Row, fit


def _rows(losses: list[float], first: int = 1) -> list[Row]:
    return [Row(step=first + index, loss=loss) for index, loss in enumerate(losses)]


def test_a_falling_line_is_followed_for_half_the_window_and_no_farther() -> None:
    """Losses flatten out, so a slope must not be believed for ever."""
    band = fit(_rows([5.0 - 0.01 * step for step in range(100)]), scale_floor=1e-6)

    assert band.slope == pytest.approx(-0.01)
    assert band.trend(110) == pytest.approx(5.0 - 0.01 * 109, abs=1e-6)
    assert band.trend(1_000) == band.trend(10_000) == pytest.approx(band.level - 0.01 * 50)


def test_a_rise_is_followed_only_when_it_is_known_of() -> None:
    """Otherwise a climb would be its own excuse."""
    rows = _rows([3.0 + 0.01 * step for step in range(100)])

    assert fit(rows, scale_floor=0.003).level_or_falling().slope == 0.0
    assert fit(rows, scale_floor=0.003).slope == pytest.approx(0.01)


def test_rounded_losses_have_a_floor_under_their_scale() -> None:
    """bf16 losses repeat the same value; a spread of 0 would make a spike of every last digit."""
    band = fit(_rows([2.5] * 50), scale_floor=0.003)

    assert band.scale == pytest.approx(0.0075)
    assert band.z(51, 2.5 + 0.015) == pytest.approx(2.0)


@given(
    losses=st.lists(st.floats(2.0, 2.1), min_size=20, max_size=60),
    wild=st.lists(st.floats(5.0, 1e6), min_size=1, max_size=3),
)
def test_a_few_outliers_do_not_move_it(losses: list[float], wild: list[float]) -> None:
    """Medians: a handful of outliers in twenty and more rows leave level and scale where the rows are."""
    spoiled = [*losses[:10], *wild, *losses[10:]]

    band = fit(_rows(spoiled), scale_floor=1e-6)

    assert 2.0 <= band.level <= 2.1
    assert band.scale < 0.5
