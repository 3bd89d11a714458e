"""The surviving steps of a run by attempt, found by their keys alone: as fast for ten million steps as for ten.

Later attempts that loaded an earlier checkpoint supersede what came after it (DESIGN 5), so that each attempt's
survivors are one range of steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from orchestrator.journal import Journal


class RecentStep(NamedTuple):
    """What is looked at of a step. A loss or norm that was not finite, or not recorded, is None."""

    step: int
    loss: float | None
    grad_norm: float | None
    at_s: float
    attempt: int


@dataclass(frozen=True, slots=True)
class Survivors:
    """Steps (first, last] of an attempt; `last` None: to its newest."""

    attempt: int
    first: int
    last: int | None

    @property
    def newest(self) -> int:
        """For a query with an upper bound."""
        return (1 << 62) if self.last is None else self.last


def survivors(journal: Journal) -> list[Survivors]:
    """Every range of surviving steps, oldest first."""
    found: list[Survivors] = []
    limit: int | None = None
    for row in reversed(journal.attempts()):
        first = row["started_step"]
        if first is None or row["replay"]:
            continue
        if limit is None or first < limit:
            found.append(Survivors(row["attempt"], first, limit))
            limit = first
    return found[::-1]


def recent_steps(journal: Journal, count: int) -> list[RecentStep]:
    """The newest `count` surviving steps, oldest first."""
    rows: list[RecentStep] = []
    for one in reversed(survivors(journal)):
        rows += _newest(journal, one, count - len(rows))
        if len(rows) >= count:
            break
    return rows[::-1]


def _newest(journal: Journal, one: Survivors, count: int) -> Iterator[RecentStep]:
    query = (
        "SELECT step, loss, grad_norm, at_s, attempt FROM steps WHERE attempt = ? AND step > ? AND step <= ? "
        "ORDER BY step DESC LIMIT ?"
    )
    return (RecentStep(*row) for row in journal.select(query, one.attempt, one.first, one.newest, count))
