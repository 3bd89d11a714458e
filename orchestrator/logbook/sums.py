"""What a logbook says in sums: the verdict, where the time went, how attempts differ, the checkpoints."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from orchestrator.journal import Journal
from orchestrator.logbook import read
from orchestrator.logbook.model import Attempt, Bucket, Checkpoint, Difference, Totals, Verdict
from orchestrator.report.numbers import loss_text, short
from orchestrator.report.time_spent import BUCKETS, TimeSpent

_MOST_CHECKPOINTS = 120
#: What is told of an attempt's machine and model; the rest of its start is its own.
_COMPARED = ("precision", "device", "parameters", "vocab_size", "batch_samples", "sample_tokens", "total_steps",
             "total_samples", "peak_lr", "warmup_steps")  # fmt: skip
_ROLLBACK = "roll_back"


def verdict(
    status: Mapping[str, Any], incidents: Sequence[Mapping[str, Any]], totals: Totals, spent: TimeSpent
) -> Verdict:
    """The run in a line."""
    share = spent.goodput if spent.training > 0.0 else None
    loss = status.get("loss")
    is_open = [one for one in incidents if one["state"] not in ("closed", "dismissed")]
    needs = list(_needs(status, is_open))
    tokens = int(status.get("tokens") or 0)
    parts = [
        f"{status['state'].capitalize()} at step {status['step']:,} of {status.get('total_steps', 0):,}",
        f"{short(tokens)} tokens",
        f"{share:.1%} goodput" if share is not None else "",
        f"loss {loss_text(loss)}" if loss is not None else "",
        _incidents_text(len(incidents), len(is_open)),
    ]
    asks = f"; {len(needs)} thing{'' if len(needs) == 1 else 's'} for a person" if needs else "; nothing needs a person"
    return Verdict(
        state=status["state"],
        because=status.get("because") or "",
        step=status["step"],
        total_steps=status.get("total_steps", 0),
        tokens=tokens,
        loss=None if loss is None else float(loss),
        validation=status.get("validation"),
        goodput=share,
        wall_s=spent.wall,
        incidents=len(incidents),
        open_incidents=len(is_open),
        rollbacks=sum(_ROLLBACK in one["decision"] and not one["observed"] for one in incidents),
        lost_steps=totals.lost,
        needs=needs,
        sentence=", ".join(part for part in parts if part) + asks + ".",
    )


def _incidents_text(number: int, still_open: int) -> str:
    text = f"{number} incident{'' if number == 1 else 's'}" if number else "no incidents"
    return f"{text}, {still_open} open" if still_open else text


def _needs(status: Mapping[str, Any], still_open: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the run can't settle by itself."""
    found = []
    because = f": {status['because']}" if status.get("because") else ""
    if status["state"] in ("halted", "failed"):
        found.append(f"the run is {status['state']}{because}")
    if status["state"] == "stopped" and not status.get("supervised"):
        found.append(f"nobody watches the run{because}")
    for one in still_open:
        if "notify" in one["decision"] or one["refused"]:
            said = f"; a guard stood against the answer: {one['refused']}" if one["refused"] else ""
            found.append(f"incident {one['id']} ({one['class'].replace('_', ' ')}) is still open{said}")
    if status.get("rollbacks_left") == 0:
        found.append("no rollback is left: the next incident that asks for one halts the run")
    if shards := status.get("quarantined_shards"):
        found.append(f"look at the data that is quarantined: {', '.join(shards)}")
    return found


def goodput(spent: TimeSpent) -> list[Bucket]:
    """The wall time in parts that add up to it; what took none is left out."""
    return [
        Bucket(name=name, seconds=seconds, what=BUCKETS[name])
        for name, seconds in asdict(spent).items()
        if seconds > 0.0
    ]


def differences(journal: Journal, known: Sequence[Attempt]) -> list[Difference]:
    """What was not the same in all attempts, as each said of itself when it began."""
    boots = journal.select("SELECT attempt, boot_id FROM attempts WHERE replay = 0 ORDER BY attempt")
    told: dict[str, list[tuple[int, str]]] = {"machine (boot)": [(row["attempt"], row["boot_id"]) for row in boots]}
    trained = {one.attempt for one in known if not one.replay}
    for record in read.kept_records(journal, "started"):
        if record["attempt"] in trained:
            for name in _COMPARED:
                told.setdefault(name.replace("_", " "), []).append((record["attempt"], str(record[name])))
            shards = (record["attempt"], f"{len(record['shards'])} shards")
            told.setdefault("data", []).append(shards)
    found = []
    for what, seen in told.items():
        changes = [seen[0], *(now for before, now in pairwise(seen) if now[1] != before[1])] if seen else []
        if len(changes) > 1:
            found.append(Difference(what=what, values=changes))
    return found


def checkpoints(journal: Journal, known: Sequence[Attempt]) -> tuple[list[Checkpoint], int]:
    """The newest ones that are not deleted, newest first, and how many more are older or were deleted."""
    verdicts: dict[str, str] = {}
    gone: set[str] = set()
    rows = journal.select("SELECT kind, json FROM decisions WHERE kind IN ('write_verdict', 'prune_checkpoints')")
    for row in rows:
        decision = json.loads(row["json"])
        if row["kind"] == "write_verdict":
            verdicts[decision["commit"]] = f"{decision['verdict']}: {decision['why']}"
        else:
            gone.update(decision["commits"])
    loaded = {one.loaded: one.attempt for one in known if one.loaded is not None}
    made: dict[str, Checkpoint] = {}
    for record in read.kept_records(journal, "commit"):
        commit = record["commit"]
        said = verdicts.get(commit, "no verdict yet")
        made[commit] = Checkpoint(
            step=record["step"],
            commit=commit,
            at_s=record["journaled_at_s"],
            bytes=record["bytes"],
            where=record["tier"],
            standing=f"{said}; attempt {loaded[commit]} began from it" if commit in loaded else said,
        )
    there = [one for commit, one in made.items() if commit not in gone]
    there.sort(key=lambda one: (one.step, one.at_s), reverse=True)
    return there[:_MOST_CHECKPOINTS], len(made) - len(there[:_MOST_CHECKPOINTS])
