"""What the logbook reads of a run: its journal, and what the record files keep beside it."""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.journal import Journal
from orchestrator.logbook.model import Attempt
from orchestrator.logbook.signals import Update, Value, number, parsed
from trainer.contract.paths import RunPaths

#: A record's kind stands within its first bytes; a line of a step is not parsed for the sake of its kind.
_HEAD_BYTES = 200
_UPDATES = """
SELECT s.attempt, s.step, s.at_s, s.record FROM steps s JOIN attempts a USING (attempt)
WHERE a.replay = 0 ORDER BY s.attempt, s.step
"""
_ATTEMPTS = """
SELECT a.*, (SELECT MAX(step) FROM steps s WHERE s.attempt = a.attempt) AS last_step,
    (SELECT at_s FROM steps s WHERE s.attempt = a.attempt ORDER BY step LIMIT 1) AS first_update_at_s
FROM attempts a ORDER BY attempt
"""


@dataclass(frozen=True, slots=True)
class Fates:
    """Which updates survive: those that no later attempt's load lies below."""

    cutoffs: Mapping[int, int]

    def survives(self, attempt: int, step: int) -> bool:
        """Whether an update is part of the model."""
        cutoff = self.cutoffs.get(attempt)
        return cutoff is None or step <= cutoff


def fates(attempts: list[Attempt]) -> Fates:
    """Of all updates, from where the attempts began."""
    cutoffs: dict[int, int] = {}
    lowest: int | None = None
    for one in reversed(attempts):
        if lowest is not None:
            cutoffs[one.attempt] = lowest
        if not one.replay and one.started_step is not None:
            lowest = one.started_step if lowest is None else min(lowest, one.started_step)
    return Fates(cutoffs)


def attempts(journal: Journal) -> list[Attempt]:
    """All of them, oldest first."""
    return [
        Attempt(
            attempt=row["attempt"],
            replay=bool(row["replay"]),
            spawned_at_s=row["spawned_at_s"],
            ended_at_s=row["ended_at_s"],
            first_update_at_s=row["first_update_at_s"],
            started_step=row["started_step"],
            last_step=row["last_step"],
            loaded=row["loaded"],
            cause=row["cause"],
            detail=row["detail"],
        )
        for row in journal.select(_ATTEMPTS)
    ]


def updates(journal: Journal, known: Fates) -> Iterator[Update]:
    """Every update that was no replay, in the order in which they were run, one at a time."""
    for row in journal.select(_UPDATES):
        yield _update(row, known)


def updates_between(journal: Journal, known: Fates, attempt: int, first: int, last: int) -> Iterator[Update]:
    """Those of an attempt, both ends included."""
    query = "SELECT attempt, step, at_s, record FROM steps WHERE attempt = ? AND step BETWEEN ? AND ? ORDER BY step"
    for row in journal.select(query, attempt, first, last):
        yield _update(row, known)


def _update(row: sqlite3.Row, known: Fates) -> Update:
    attempt, step = row["attempt"], row["step"]
    return Update(attempt, step, known.survives(attempt, step), row["at_s"], parsed(row["record"]))


def count_updates(journal: Journal) -> int:
    """How many `updates` will give."""
    query = "SELECT count(*) AS n FROM steps s JOIN attempts a USING (attempt) WHERE a.replay = 0"
    return int(next(journal.select(query))["n"])


def rare_records(paths: RunPaths, known: list[Attempt]) -> Iterator[Mapping[str, Any]]:
    """Evaluations and activation statistics: the journal forgets them, the record files do not."""
    for one in known:
        path = paths.records(one.attempt)
        if one.replay or not path.exists():
            continue
        with path.open("rb") as file:
            for line in file:
                head = line[:_HEAD_BYTES]
                rare = b'"kind":"eval"' in head or b'"kind":"activation"' in head
                if rare and line.endswith(b"\n"):  # the last line may be about to be written
                    yield json.loads(line)


def rare_values(record: Mapping[str, Any]) -> Iterator[Value]:
    """What such a record says, by panel."""
    if record["kind"] == "eval":
        yield "evaluation", "loss", number(record["loss"])
        for name, value in record["metrics"].items():
            yield "evaluation", name, number(value)
        return
    for group, stats in record["groups"].items():
        yield "activation_rms", group, number(stats["rms"])
        yield "activation_max", group, number(stats["max"])
        yield "dead", group, number(stats["dead"])
        yield "saturated", group, number(stats["saturated"])


def events(journal: Journal, kind: str) -> Iterator[Mapping[str, Any]]:
    """All events of a kind, oldest first; records go by the kind `record_received`."""
    for row in journal.select("SELECT json FROM events WHERE kind = ? ORDER BY seq", kind):
        yield json.loads(row["json"])


def kept_records(journal: Journal, kind: str) -> Iterator[Mapping[str, Any]]:
    """Records of a kind that the journal keeps for good, each with the time at which it was journaled."""
    query = (
        "SELECT at_s, json FROM events WHERE kind = 'record_received' "
        "AND json_extract(json, '$.record.kind') = ? ORDER BY seq"
    )
    for row in journal.select(query, kind):
        yield json.loads(row["json"])["record"] | {"journaled_at_s": row["at_s"]}
