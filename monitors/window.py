"""A window of healthy losses and what it predicts: trend, scale, z-score. Robust against outliers, pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

MAD_TO_SIGMA = 1.4826  # of a normal distribution
_FOLLOW = 0.5  # share of the window's length over which its slope is believed
_BEND = 0.3  # share of the fall that may fail to come because the curve bends


@dataclass(frozen=True, slots=True)
class Row:
    """One finite loss."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class Band:
    """A line through recent losses with a robust scale around it."""

    anchor_step: float
    level: float
    slope: float
    scale: float
    reach: float

    def trend(self, step: int) -> float:
        """Expected loss. Losses flatten out: the slope is followed for a part of the window's length, then no more."""
        ahead = min(max(step - self.anchor_step, -self.reach), _FOLLOW * self.reach)
        return self.level + self.slope * ahead

    def level_or_falling(self) -> "Band":
        """The same with no rise in it: a rise that nobody knows of is not extrapolated, it would hide itself."""
        return self if self.slope <= 0 else replace(self, slope=0.0)

    def z(self, step: int, loss: float) -> float:
        """Excess over the trend in units of the scale, which is wider the farther a falling trend is followed."""
        followed = min(max(step - self.anchor_step, 0.0), _FOLLOW * self.reach)
        return (loss - self.trend(step)) / (self.scale + _BEND * abs(self.slope) * followed)


def fit(rows: Sequence[Row], scale_floor: float) -> Band:
    """Fit a band: the line through the medians of both halves.

    Args:
        rows: at least 2, in order of step.
        scale_floor: smallest scale, as a share of the level (bf16-rounded losses have no spread of their own).
    """
    half = len(rows) // 2
    early, late = rows[:half], rows[half:]
    early_step, late_step = _middle_step(early), _middle_step(late)
    early_loss, late_loss = median([row.loss for row in early]), median([row.loss for row in late])
    span = max(late_step - early_step, 1)
    raw_slope = (late_loss - early_loss) / span
    origin = late_loss - raw_slope * late_step
    residuals = [abs(row.loss - origin - raw_slope * row.step) for row in rows]
    scale = max(MAD_TO_SIGMA * median(residuals), scale_floor * abs(late_loss), 1e-6)
    return Band(
        anchor_step=late_step, level=late_loss, slope=raw_slope, scale=scale,
        reach=float(rows[-1].step - rows[0].step + 1),
    )  # fmt: skip


def _middle_step(rows: Sequence[Row]) -> float:
    """The median step; they are in order already."""
    return (rows[(len(rows) - 1) // 2].step + rows[len(rows) // 2].step) / 2
