"""Where the time of a run went, and what Daly's formula says that it should have."""

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Account:
    """Seconds that are known while a run goes on; the rest is worked out at its end."""

    hung_s: float = 0.0
    stalled_s: float = 0.0
    replayed_s: float = 0.0
    down_s: float = 0.0
    ended_s: float = 0.0


BUCKETS = ("training", "lost_steps", "restart", "stall", "detection", "replays", "machine_down", "ended")


def buckets(account: Account, elapsed_s: float, surviving_s: float, done_s: float) -> dict[str, float]:
    """Shares of the elapsed time; `restart` is what is left: waiting, loading, stopping."""
    known = {
        "training": surviving_s,
        "lost_steps": done_s - surviving_s,
        "stall": account.stalled_s,
        "detection": account.hung_s,
        "replays": account.replayed_s,
        "machine_down": account.down_s,
        "ended": account.ended_s,
    }
    known["restart"] = elapsed_s - sum(known.values())
    return {name: known[name] / elapsed_s for name in BUCKETS}


def daly_goodput(stall_s: float, failure_every_s: float, restart_s: float, interval_s: float | None = None) -> float:
    """Share of the time that trains, by Daly (2006), at his best interval or at a given one.

    tau = sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + (C / 2M) / 9) - C;  tau / (M e^(R/M) (e^((tau + C)/M) - 1))
    """
    part = stall_s / (2 * failure_every_s)
    best_s = math.sqrt(2 * stall_s * failure_every_s) * (1 + math.sqrt(part) / 3 + part / 9) - stall_s
    tau_s = best_s if interval_s is None else interval_s
    spent = failure_every_s * math.exp(restart_s / failure_every_s) * math.expm1((tau_s + stall_s) / failure_every_s)
    return tau_s / spent
