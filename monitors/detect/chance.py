"""How heavy the tail of a run's own noise is: a lone row must stand out of what chance gives in so many rows.

Peaks over a threshold with Hill's estimator (Hill 1975): of rows beyond u = 3 sigma on either side, the share p and the
mean of ln(|z| / u), which is 1 / alpha; so P(|z| > x) = p (x / u)^-alpha. Three running sums that forget slowly, on a
prior a little heavier than normal noise. Both sides count, because chance has two and a spike has one. Pure.
"""

import math

from pydantic.dataclasses import dataclass

_U = 3.0
_MEMORY_ROWS = 2000.0
_PRIOR_ROWS, _PRIOR_BEYOND, _PRIOR_LOGS = 500.0, 2.0, 0.24  # p = 0.4 %, alpha = 8
_MOST = math.log(2.0)  # a few enormous rows say little of the shape of the tail


@dataclass(slots=True)
class NoiseTail:
    """What is remembered of it."""

    rows: float = _PRIOR_ROWS
    beyond: float = _PRIOR_BEYOND
    logs: float = _PRIOR_LOGS

    def add(self, z: float) -> None:
        """Take one row of healthy noise in; `z` in sigmas."""
        keep = 1 - 1 / _MEMORY_ROWS
        self.rows = self.rows * keep + 1
        self.beyond *= keep
        self.logs *= keep
        if abs(z) > _U:
            self.beyond += 1
            self.logs += min(math.log(abs(z) / _U), _MOST)

    def is_chance(self, z: float, in_rows: int) -> bool:
        """Whether noise like that seen so far reaches `z` once in so many rows or more often."""
        if z <= _U:
            return True
        alpha = self.beyond / self.logs
        return bool(self.beyond / self.rows * math.pow(z / _U, -alpha) * in_rows > 1)
