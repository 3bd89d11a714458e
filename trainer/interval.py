"""How many steps lie between two checkpoints when that is left to Longwatch. Pure.

Young (1974): with a stall of d seconds a checkpoint and a failure every M seconds, the time lost to both is least with
a checkpoint every sqrt(2 d M) seconds (Daly 2006 refines it where d is not far below M, which it always is here).
"""

import math
from dataclasses import dataclass

#: Of the disk's time: one checkpoint may be written while the next one is due, and never two.
_DISK_SHARE = 0.5
_FEWEST_STEPS = 10
_MOST_S = 3600.0  # whatever the formula says, an hour of work is not put at risk


@dataclass(frozen=True, slots=True)
class Measured:
    """What this attempt knows: seconds that a save held it up, that the disk took, and that a step takes."""

    stall_s: float
    disk_s: float
    step_s: float


@dataclass(frozen=True, slots=True)
class Interval:
    """The interval and its reason, for people."""

    steps: int
    because: str


def choose_interval(measured: Measured, failure_every_s: float) -> Interval:
    """The interval under what was measured; `failure_every_s` is the mean time between failures."""
    best_s = math.sqrt(2.0 * measured.stall_s * failure_every_s)
    because = f"a stall of {measured.stall_s:.3g} s, a failure about every {_duration(failure_every_s)}"
    seconds = min(best_s, _MOST_S)
    floor_s = measured.disk_s / _DISK_SHARE
    if seconds < floor_s:
        seconds, because = floor_s, f"the disk takes {measured.disk_s:.3g} s for one"
    steps = round(seconds / measured.step_s)
    if steps < _FEWEST_STEPS:
        return Interval(_FEWEST_STEPS, f"not fewer than {_FEWEST_STEPS} steps")
    if best_s > _MOST_S:
        because = "an hour at most"
    return Interval(steps, because)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h" if seconds >= 3600 else f"{seconds:.3g} s"
