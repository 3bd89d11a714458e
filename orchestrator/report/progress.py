"""How a run goes: time left, and which way the loss moves. Pure functions of recent surviving steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from orchestrator.report.recent import RecentStep

WINDOW = 1000  # steps that are looked at
_FEW = 20
_SHARE = 10  # each end of the window that is compared has a tenth of it


@dataclass(frozen=True, slots=True)
class Trend:
    """Change of the median loss over so many steps."""

    change: float
    steps: int

    def __str__(self) -> str:
        direction = "down" if self.change < 0 else "up"
        return f"{direction} {abs(self.change):.3g} over the last {self.steps:,} steps"


def seconds_left(rows: Sequence[RecentStep], total_steps: int) -> float | None:
    """At the pace of the window, pauses in it included; None if too little is known."""
    rows = [row for row in rows if row.attempt == rows[-1].attempt]
    if len(rows) < _FEW:
        return None
    steps, took_s = rows[-1].step - rows[0].step, rows[-1].at_s - rows[0].at_s
    return max(0, total_steps - rows[-1].step) * took_s / steps if took_s > 0 else None


def trend(rows: Sequence[RecentStep]) -> Trend | None:
    """The last tenth of the window against its first; None if too little is known."""
    losses = [(row.step, row.loss) for row in rows if row.loss is not None]
    if len(losses) < _FEW:
        return None
    size = max(2, len(losses) // _SHARE)
    change = median(loss for _, loss in losses[-size:]) - median(loss for _, loss in losses[:size])
    return Trend(change, losses[-1][0] - losses[0][0])
