"""A window of healthy losses and what it predicts: trend, scale, z-score. Robust against outliers, pure."""

from collections.abc import Sequence
from statistics import median

from pydantic import BaseModel, ConfigDict

MAD_TO_SIGMA = 1.4826  # of a normal distribution
_FOLLOW = 0.5  # share of the window's length over which its slope is believed
_BEND = 0.3  # share of the fall that may fail to come because the curve bends


class Row(BaseModel):
    """One finite loss."""

    model_config = ConfigDict(frozen=True)

    step: int
    loss: float


class Band(BaseModel):
    """A line through recent losses, falling or level, with a robust scale around it."""

    model_config = ConfigDict(frozen=True)

    anchor_step: float
    level: float
    slope: float
    scale: float
    reach: float

    def trend(self, step: int) -> float:
        """Expected loss. Losses flatten out: the slope is followed for a part of the window's length, then no more."""
        ahead = min(max(step - self.anchor_step, -self.reach), _FOLLOW * self.reach)
        return self.level + self.slope * ahead

    def z(self, step: int, loss: float) -> float:
        """Excess over the trend in units of the scale, which is wider the farther a falling trend is followed."""
        followed = min(max(step - self.anchor_step, 0.0), _FOLLOW * self.reach)
        return (loss - self.trend(step)) / (self.scale + _BEND * abs(self.slope) * followed)


def fit(rows: Sequence[Row], scale_floor: float, *, rising: bool = False) -> Band:
    """Fit a band: the line through the medians of both halves; a rise is not extrapolated, it would hide itself.

    Args:
        rows: at least 2, in order of step.
        scale_floor: smallest scale, as a share of the level (bf16-rounded losses have no spread of their own).
        rising: a rise is known of already, so that it may be followed.
    """
    half = len(rows) // 2
    early, late = rows[:half], rows[half:]
    early_step, late_step = median(r.step for r in early), median(r.step for r in late)
    early_loss, late_loss = median(r.loss for r in early), median(r.loss for r in late)
    span = max(late_step - early_step, 1)
    raw_slope = (late_loss - early_loss) / span
    residuals = [abs(row.loss - (late_loss + raw_slope * (row.step - late_step))) for row in rows]
    scale = max(MAD_TO_SIGMA * median(residuals), scale_floor * abs(late_loss), 1e-6)
    return Band(
        anchor_step=late_step, level=late_loss, slope=raw_slope if rising else min(raw_slope, 0.0), scale=scale,
        reach=float(rows[-1].step - rows[0].step + 1),
    )  # fmt: skip
