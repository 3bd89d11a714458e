"""What share of the time a run trains, under failures. Pure; Daly 2006, equation 13 with the optimum of Young 1974."""

import math

_LONGEST_S = 3600.0  # as the automatic interval: an hour of work is not put at risk


def interval_s(stall_s: float, failure_every_s: float) -> float:
    """Seconds between checkpoints that lose least: sqrt(2 x stall x time between failures), at most an hour."""
    return min(_LONGEST_S, math.sqrt(2.0 * max(stall_s, 1e-6) * failure_every_s))


def expected_goodput(stall_s: float, restart_s: float, failure_every_s: float, every_s: float) -> float:
    """Share of the time in which new steps are made.

    Args:
        stall_s: how long a checkpoint holds training up.
        restart_s: from a failure to the first step that is run again.
        failure_every_s: mean time between failures.
        every_s: between checkpoints.
    """
    mean = failure_every_s
    return every_s / (mean * math.exp(restart_s / mean) * math.expm1((every_s + stall_s) / mean))
