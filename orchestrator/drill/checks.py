"""What the drill's run must show, from its journal and its store: what was seen, and what to do about it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from monitors.records import SnapshotRecord
from orchestrator.drill.run import BOMB, FACTOR, HOLD_STEPS, KILLED_AT, MARGIN_STEPS, SAVE_EVERY, STEPS
from orchestrator.findings import Finding
from orchestrator.goodput import expected_goodput, interval_s
from orchestrator.journal import Journal
from orchestrator.ledger.check import violations
from orchestrator.ledger.read import plans, surviving_reads
from orchestrator.policy.events import RecordReceived
from orchestrator.recovery.catalog import list_checkpoints, verify
from trainer.contract.store import Store

_SAME_SHARE = 0.004  # of the loss: the limit of loss_discontinuity
_LR_SHARE = 1e-3


@dataclass(frozen=True, slots=True)
class Facts:
    """What the checks look at."""

    codes: tuple[int, int]
    attempts: list[dict[str, Any]]
    incidents: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    stalls_s: list[float]
    ledger: str | None
    damaged: list[str]
    failure_every_s: float


def gather(journal: Journal, store: Store, codes: tuple[int, int], failure_every_s: float) -> Facts:
    """Read it all.

    Raises:
        StoreError: the store cannot be asked.
    """
    steps = [{**dict(row), "record": json.loads(row["record"])} for row in journal.steps()]
    snapshots = [
        event.record.stall_s
        for event in journal.events()
        if isinstance(event, RecordReceived) and isinstance(event.record, SnapshotRecord)
    ]
    checked = [verify(store, one.id) for one in list_checkpoints(store) if one.in_lineage and one.state != "bad"]
    return Facts(
        codes,
        [dict(row) for row in journal.attempts()],
        journal.incidents(),
        steps,
        snapshots,
        next(violations(surviving_reads(journal), plans(journal)), None),
        [f"{one.commit}: {one.problems[0]}" for one in checked if not one.ok],
        failure_every_s,
    )


def judge(facts: Facts) -> list[Finding]:
    """Every check, in the order in which things happened."""
    checks: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
        _ends, _saves, _restart, _same_losses, _older_checkpoint, _spike, _learning_rate, _data, _goodput,
    )  # fmt: skip
    return [finding for check in checks for finding in check(facts)]


def _ends(facts: Facts) -> Iterator[Finding]:
    good = facts.codes == (0, 0)
    yield _line("both parts came to their end", good, f"exit codes {facts.codes[0]} and {facts.codes[1]}", _LOOK)


def _saves(facts: Facts) -> Iterator[Finding]:
    if not facts.stalls_s:
        yield Finding("saves hold training up", "fail", "no save was made", _LOOK)
        return
    stall_s, step_s = median(facts.stalls_s), _step_s(facts)
    seen = f"{stall_s:.3f} s each (worst {max(facts.stalls_s):.3f}), a step takes {step_s:.3f}"
    short = stall_s <= 2 * step_s + 0.1
    remedy = "is /dev/shm too small for two copies of the state? longwatch doctor says"
    yield Finding("saves hold training up", "pass" if short else "warn", seen, "" if short else remedy)
    yield _line("checkpoints verify to the last byte", not facts.damaged, "; ".join(facts.damaged) or "all", _LOOK)


def _restart(facts: Facts) -> Iterator[Finding]:
    causes = [attempt["cause"] for attempt in facts.attempts]
    killed = causes[:1] == ["killed"]
    lost = KILLED_AT - facts.attempts[1]["started_step"] if killed and len(causes) > 1 else None
    seen = f"{lost} steps lost, {_restart_s(facts):.1f} s to the first step" if lost is not None else f"{causes}"
    good = lost is not None and 0 <= lost <= SAVE_EVERY
    yield _line("killed at once, it goes on from the last checkpoint", good, seen, _LOOK)


def _same_losses(facts: Facts) -> Iterator[Finding]:
    first, second = ({row["step"]: row["loss"] for row in facts.steps if row["attempt"] == n} for n in (1, 2))
    both = sorted(first.keys() & second.keys())
    differences = [abs(first[step] - second[step]) / abs(first[step]) for step in both]
    name = "steps run again give the same losses"
    if not differences:
        yield Finding(name, "warn", "no step was run again", "run the drill again")
    elif max(differences) == 0:
        yield Finding(name, "pass", f"{len(both)} steps, to the last bit")
    else:
        near = sum(differences) / len(differences) <= _SAME_SHARE
        remedy = (
            "set deterministic: true where you want exact resumes" if near else "the state is not restored as it was"
        )
        yield Finding(name, "warn" if near else "fail", f"{max(differences):.2%} apart at most", remedy)


def _older_checkpoint(facts: Facts) -> Iterator[Finding]:
    third = facts.attempts[2] if len(facts.attempts) > 2 else {}
    step = third.get("started_step")
    good = step is not None and step < 60
    yield _line("a damaged checkpoint is refused, an older one loaded", good, f"loaded step {step}", _LOOK)


def _spike(facts: Facts) -> Iterator[Finding]:
    name = "a planted divergence is rolled back"
    spike = _planted(facts)
    if spike is None:
        seen = f"incidents: {[incident['class'] for incident in facts.incidents]}"
        yield Finding(name, "fail", seen, "the model did not diverge, or it was not seen: longwatch explain says why")
        return
    seen = f"onset {spike['onset_step']}, detected {spike['detected_step']}, back to {spike['target_step']}"
    back = spike["target_step"] is not None and spike["target_step"] <= spike["onset_step"] - MARGIN_STEPS
    yield _line(name, back and spike["outcome"] == "worked", f"{seen}: {spike['outcome'] or 'open'}", _LOOK)


def _learning_rate(facts: Facts) -> Iterator[Finding]:
    name = "the learning rate is lowered, and restored"
    spike = _planted(facts)
    if spike is None or spike["target_step"] is None:
        yield Finding(name, "fail", "there was no rollback", _LOOK)
        return
    last = {row["step"]: row["record"] for row in facts.steps}
    held = range(spike["target_step"] + 1, spike["detected_step"] + HOLD_STEPS + 1)
    peak = last[STEPS]["lr"] if STEPS in last else None
    good = peak is not None and all(
        abs(last[step]["lr"] - last[step]["lr_planned"]) <= _LR_SHARE * last[step]["lr_planned"]
        and abs(last[step]["lr"] - FACTOR * peak) <= _LR_SHARE * peak
        for step in held
        if step in last
    )
    seen = f"{FACTOR} of {peak} for {len(held)} steps" if peak is not None else "the last step was not reached"
    yield _line(name, good, seen, _LOOK)


def _data(facts: Facts) -> Iterator[Finding]:
    yield _line("every sample is read once or left out by plan", facts.ledger is None, facts.ledger or "proved", _LOOK)


def _goodput(facts: Facts) -> Iterator[Finding]:
    if not facts.stalls_s:
        return
    stall_s, restart_s = median(facts.stalls_s), _restart_s(facts)
    every_s = interval_s(stall_s, facts.failure_every_s)
    share = expected_goodput(stall_s, restart_s, facts.failure_every_s, every_s)
    often = f"{facts.failure_every_s / 3600:.3g} h"
    seen = f"{share:.2%} with a failure every {often} and a checkpoint every {every_s:.0f} s"
    low = "" if share >= 0.95 else "restarts or saves take long: longwatch doctor says what is slow"
    yield Finding("expected goodput", "warn" if low else "pass", seen, low)


def _planted(facts: Facts) -> dict[str, Any] | None:
    found = (incident for incident in facts.incidents if incident["class"] == "unrecovered_spike")
    return next((one for one in found if BOMB[0] <= one["onset_step"] <= BOMB[1] + MARGIN_STEPS), None)


def _restart_s(facts: Facts) -> float:
    """From the end of the killed attempt to the first step of the next."""
    first = next((row["at_s"] for row in facts.steps if row["attempt"] == 2), None)
    died_s = facts.attempts[0]["ended_at_s"] if facts.attempts else None
    return first - died_s if first is not None and died_s is not None else 0.0


def _step_s(facts: Facts) -> float:
    taken = [sum(row["record"]["step_time_s"].values()) for row in facts.steps if row["record"]["step_time_s"]]
    return median(taken) if taken else 0.0


_LOOK = "look at the drill's run directory (kept with --keep): logs/, and longwatch incidents"


def _line(name: str, good: bool, seen: str, remedy: str) -> Finding:
    return Finding(name, "pass" if good else "fail", seen, "" if good else remedy)
