"""What a supervisor finds when it takes a run: the engine's state, a process that may live, decisions half done.

A living trainer is adopted without being touched. Only one that was never let go is ended: it has done nothing, waits
on a pipe whose other end is dead, and is started again under the same number.
"""

import json
import select
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from pydantic import ValidationError

from monitors.records import StepRecord
from orchestrator.core import Core, MakeCore
from orchestrator.effects import Effects
from orchestrator.errors import ChildLockHeldError, SnapshotUnusableError
from orchestrator.journal import Journal, StoredDecision
from orchestrator.policy.decisions import EndRun, StartAttempt
from orchestrator.process.attempt import Attempt
from orchestrator.process.child import Child, Identity, adopt, boot_id, kill_leftovers
from orchestrator.process.lock import holders, is_free
from trainer.contract.config import DeadlinesConfig
from trainer.contract.paths import RunPaths

_DIES_WITHIN_S = 10.0
_POLL_S = 0.02
_LEARNED_FROM_STEPS = 500  # so an adopted trainer is not watched by the configured deadlines alone
_LOG = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Taken:
    """The attempt that is under way, living or dead, and what is still to be carried out."""

    attempt: Attempt | None
    pending: list[StoredDecision]


def open_engine(journal: Journal, make_core: MakeCore) -> tuple[Core, dict[str, float]]:
    """The engine as it was, from the newest snapshot and the events after it; and the totals of all counters.

    Raises:
        SnapshotUnusableError: the snapshot is not of this version.
    """
    seq, snapshot = journal.newest_snapshot()
    try:
        core = make_core(snapshot)
        for event in journal.events(after=seq):
            core.fold(event)  # what was decided on it is in the journal
    except ValidationError as error:
        raise SnapshotUnusableError(journal.path, f"{error.error_count()} values do not fit") from error
    totals: dict[str, float] = json.loads(journal.meta("totals") or "{}")
    return core, totals


def take_over(journal: Journal, effects: Effects, paths: RunPaths, deadlines: DeadlinesConfig) -> Taken:
    """Settle what no longer applies, adopt what lives, and return what is to be done."""
    pending = still_valid(journal.pending(), effects.settle)
    effects.tools.learned.observe_all(StepRecord.model_validate_json(step["record"]) for step in _newest(journal))
    row = journal.last_attempt()
    if row is None or row["ended_at_s"] is not None:
        _wait_for_unjournaled(paths)
        return Taken(None, pending)
    number = int(row["attempt"])
    start = next(
        (s for s in pending if isinstance(s.decision, StartAttempt) and s.decision.plan.attempt == number), None
    )
    identity = Identity(row["boot_id"], row["pid"], row["starttime"])
    child = adopt(paths, number, identity)
    if start is not None and not _was_released(paths, number):
        _end_unreleased(paths, child)
        return Taken(None, pending)
    if start is not None:
        effects.spawned(start.id, number, identity.pid)
        pending.remove(start)
    _LOG.info("attempt_adopted" if child else "attempt_found_dead", attempt=number, pid=identity.pid)
    attempt = Attempt(
        paths,
        number,
        deadlines,
        time.monotonic(),
        child,
        oom_kills_before=row["oom_kills"],
        hang_confirmed=journal.hang_confirmed(number),
        host_lost=identity.boot_id != boot_id(),
        learned=effects.tools.learned,
    )
    return Taken(attempt, pending)


def _newest(journal: Journal) -> list[sqlite3.Row]:
    return list(journal.select("SELECT record FROM steps ORDER BY rowid DESC LIMIT ?", _LEARNED_FROM_STEPS))


def still_valid(pending: list[StoredDecision], settle: Callable[[int, str], None]) -> list[StoredDecision]:
    """An end that was decided is history once the run is launched again, and with it the start that it overtook."""
    ends = [stored.id for stored in pending if isinstance(stored.decision, EndRun)]
    valid = []
    for stored in pending:
        overtaken = isinstance(stored.decision, StartAttempt) and any(end > stored.id for end in ends)
        if stored.id in ends or overtaken:
            settle(stored.id, "superseded by a new launch")
        else:
            valid.append(stored)
    return valid


def _was_released(paths: RunPaths, attempt: int) -> bool:
    """Whether it ever did anything: the journal can't tell, since the release comes after its entry."""
    signs = (paths.liveness(attempt), paths.records(attempt), paths.exit_file(attempt))
    return any(sign.exists() for sign in signs)


def _wait_for_unjournaled(paths: RunPaths) -> None:
    """A process that its supervisor did not live to journal was never released: it is just about to leave."""
    deadline_s = time.monotonic() + _DIES_WITHIN_S
    while not is_free(paths.child_lock) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def _end_unreleased(paths: RunPaths, child: Child | None) -> None:
    if child is not None:
        child.kill_all()
        poller = select.poll()
        poller.register(child.pidfd, select.POLLIN)
        poller.poll(_DIES_WITHIN_S * 1000)
        child.close()
    deadline_s = time.monotonic() + _DIES_WITHIN_S
    while not is_free(paths.child_lock):
        if time.monotonic() > deadline_s:
            raise ChildLockHeldError(tuple(holders(paths.child_lock)))
        kill_leftovers(paths.child_lock)
        time.sleep(_POLL_S)
