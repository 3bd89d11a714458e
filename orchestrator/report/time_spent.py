"""Where the wall time of a run went: from a few look-ups per attempt, however many steps there are.

Goodput is the share of the time since the first start in which steps were trained that survive. What saves and
evaluations took is known of the run as a whole, from its counters, and taken off the training time.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from orchestrator.journal import Journal
from orchestrator.report.recent import survivors


@dataclass(frozen=True, slots=True)
class TimeSpent:
    """Seconds of wall time by what they were spent on; together they are the whole time."""

    training: float = 0.0
    evaluation: float = 0.0
    stall: float = 0.0
    lost: float = 0.0
    replay: float = 0.0
    starting: float = 0.0
    detection: float = 0.0
    down: float = 0.0

    @property
    def wall(self) -> float:
        """From the first start until now, or until the end."""
        return float(sum(asdict(self).values()))

    @property
    def goodput(self) -> float | None:
        """Share of it in which surviving steps were trained; None before there is any."""
        return self.training / self.wall if self.wall > 0 else None


#: What each bucket means, for whoever shows them.
BUCKETS: Mapping[str, str] = {
    "training": "training steps that survive",
    "evaluation": "evaluations",
    "stall": "training held up by saves",
    "lost": "steps that were run again later",
    "replay": "steps run again to find a cause",
    "starting": "processes starting, state loading, until the first step",
    "detection": "from the last step of an attempt to its end",
    "down": "no attempt alive",
}


def time_spent(journal: Journal, now_s: float) -> TimeSpent:
    """Add up the attempts. `now_s` (unix seconds) ends one that still runs."""
    kept = {one.attempt: one for one in survivors(journal)}
    training = lost = replay = starting = detection = down = 0.0
    over_s: float | None = None
    for row in journal.attempts():
        spawned_s, ended_s = row["spawned_at_s"], row["ended_at_s"] or now_s
        if over_s is not None:
            down += max(0.0, spawned_s - over_s)
        first_s, last_s = _first_begin(journal, row["attempt"]), _last_end(journal, row["attempt"])
        over_s = ended_s
        if row["replay"]:
            replay += max(0.0, ended_s - spawned_s)
            continue
        if first_s is None or last_s is None:
            starting += max(0.0, ended_s - spawned_s)
            continue
        survivor = kept.get(row["attempt"])
        kept_s = _last_end(journal, row["attempt"], survivor.newest) if survivor is not None else None
        kept_s = first_s if kept_s is None else kept_s
        starting += max(0.0, first_s - spawned_s)
        training += max(0.0, kept_s - first_s)
        lost += max(0.0, last_s - kept_s)
        detection += max(0.0, ended_s - last_s)
    totals = json.loads(journal.meta("totals") or "{}")
    evaluation = min(training, totals.get("evaluation_seconds_total{}", 0.0))
    stall = min(training - evaluation, totals.get("checkpoint_stall_seconds_total{}", 0.0))
    return TimeSpent(training - evaluation - stall, evaluation, stall, lost, replay, starting, detection, down)


def _first_begin(journal: Journal, attempt: int) -> float | None:
    """When its first step began."""
    for row in journal.select("SELECT at_s, record FROM steps WHERE attempt = ? ORDER BY step LIMIT 1", attempt):
        parts = json.loads(row["record"]).get("step_time_s") or {}
        return float(row["at_s"]) - float(sum(parts.values()))
    return None


def _last_end(journal: Journal, attempt: int, upto: int = 1 << 62) -> float | None:
    """When its newest step, up to one, was done."""
    query = "SELECT at_s FROM steps WHERE attempt = ? AND step <= ? ORDER BY step DESC LIMIT 1"
    for row in journal.select(query, attempt, upto):
        return float(row["at_s"])
    return None
