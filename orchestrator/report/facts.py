"""What is known of a run, read from its journal alone: for a living run and for one whose supervisor is gone."""

import json
from contextlib import closing
from dataclasses import asdict
from typing import Any

from orchestrator.journal import Journal
from orchestrator.process.lock import is_held
from orchestrator.report.progress import WINDOW, seconds_left, trend
from orchestrator.report.recent import recent_steps
from orchestrator.report.time_spent import time_spent
from trainer.contract.paths import RunPaths

_ACTIVE = frozenset({"starting", "running", "recovering"})
_NOT_SHOWN = frozenset({"suspected", "dismissed"})  # not yet, or no longer, believed to be incidents


def run_status(paths: RunPaths, now_s: float) -> dict[str, Any]:
    """The facts that `longwatch status --json` prints. `now_s` is the time, in unix seconds.

    Raises:
        JournalError: there is no journal, or it can't be read.
    """
    with closing(Journal.read_only(paths.database)) as journal:
        facts = stored_status(journal, paths)
        rows = recent_steps(journal, WINDOW)
        spent = time_spent(journal, now_s)
        shown = shown_incidents(journal)
    moves = trend(rows)
    left_s = seconds_left(rows, facts["total_steps"]) if rows and facts["state"] in _ACTIVE else None
    return facts | {
        "seconds_left": left_s,
        "trend": asdict(moves) if moves is not None else None,
        "goodput": spent.goodput,
        "seconds_spent": asdict(spent),
        "last_incident": shown[-1] if shown else None,
    }


def stored_status(journal: Journal, paths: RunPaths) -> dict[str, Any]:
    """What the supervisor last said of the run, and whether anybody still works on it.

    A run that says it is active while neither its supervisor nor any process of an attempt lives has stopped.
    """
    raw = journal.meta("status")
    facts: dict[str, Any] = json.loads(raw) if raw else {"state": "starting", "step": 0, "total_steps": 0}
    facts = {"run_dir": str(paths.root), **facts, "supervised": is_held(paths.lock)}
    if facts["state"] in _ACTIVE and not facts["supervised"]:
        if is_held(paths.child_lock):
            facts["because"] = "its supervisor is gone, the trainer lives: launch again to take it over"
        else:
            facts |= {"state": "stopped", "because": "its supervisor ended without a word: launch again to go on"}
    return facts


def commit_times(journal: Journal) -> dict[str, float]:
    """When each commit was journaled, unix seconds by the clock of the supervisor of that moment."""
    rows = journal.select(
        "SELECT json_extract(json, '$.record.commit') AS name, MIN(at_s) AS at_s FROM events "
        "WHERE kind = 'record_received' AND json_extract(json, '$.record.kind') = 'commit' GROUP BY name"
    )
    return {row["name"]: row["at_s"] for row in rows}


def shown_incidents(journal: Journal) -> list[dict[str, Any]]:
    """Every incident that was more than a suspicion, oldest first, in the published form."""
    return [incident for incident in journal.incidents() if incident["state"] not in _NOT_SHOWN]
