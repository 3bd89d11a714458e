"""A run goes on elsewhere: its run directory is built again from the journal in the store (DESIGN 4).

The journal there ends where the old machine last sent a segment. What had only reached that machine's disk is gone
with it; a commit is sent after the history up to it, so whatever the store holds is known. The old machine is not
asked: from the next fence on, nothing that it still writes counts. Only courtesy looks first whether it still shows
signs of life.
"""

import gzip
import json
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

from orchestrator.errors import RunElsewhereError, ShippedJournalError
from orchestrator.files import replace_file
from orchestrator.journal import Batch, Cursor, Journal
from orchestrator.policy.decisions import DECISIONS, SendCommand, StartAttempt
from orchestrator.policy.events import Moved
from orchestrator.shipping import MOVED, SHIPPED, Shipped, shipped_files
from trainer.contract import fence
from trainer.contract.commands import append_command
from trainer.contract.paths import RunPaths
from trainer.contract.segments import SIGNS, Counting, counting, gap, segments_present
from trainer.contract.store import ObjectMissing, Store

LOOK_AGAIN_S = 75.0  # two and a half of the uploader's signs: a machine that lives shows one in that time
_LOST = "another machine"  # in the place of a boot id
_AT_ONCE = 16  # requests in flight
#: The keepers' records have files of their own; a new machine's keepers begin new ones.
_RECORDS_OF = """
SELECT json_extract(json, '$.record') AS record, json_extract(json, '$.record.seq') AS seq FROM events
WHERE kind = 'record_received' AND json_extract(json, '$.record.attempt') = ?
AND json_extract(json, '$.record.kind') NOT IN ('commit', 'commit_failed') ORDER BY events.seq
"""
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Found:
    """The journal of a run in its store."""

    chosen: tuple[Counting, ...]
    epoch: int
    holder: str


def find(store: Store) -> Found | None:
    """The journal in the store; None if there is none.

    Raises:
        ShippedJournalError: a part of it is missing.
        StoreError: the store could not be asked.
    """
    segments = segments_present(store)
    newest = fence.current_epoch(store)
    if not segments or newest is None:
        return None
    since = min(segment.epoch for segment in segments)
    fences = _parallel(lambda epoch: _fence(store, epoch), range(since, newest + 1))
    begins = {one.epoch: one.journal_from for one in fences if one is not None and one.journal_from is not None}
    chosen = counting(segments, begins)
    missing = gap(chosen)
    if missing is not None:
        raise ShippedJournalError(store.url, f"the segment that begins with event {missing} is missing")
    if not chosen:
        return None
    holder = fence.read_fence(store, newest)
    return Found(tuple(chosen), newest, f"{holder.host}, pid {holder.pid}")


def ensure_nobody_lives(
    store: Store, found: Found, tell: Callable[[str], None], wait: Callable[[float], None] = time.sleep
) -> None:
    """Look twice for signs of whoever holds the run.

    Raises:
        RunElsewhereError: a sign moved in between.
        StoreError: the store could not be asked.
    """
    before = {item.key for item in store.list(SIGNS)}
    if not before:
        return  # taken away at an orderly end, or never shown
    tell(f"{found.holder} held this run last; looking for signs of it for {LOOK_AGAIN_S:.0f} s")
    wait(LOOK_AGAIN_S)
    for key in sorted({item.key for item in store.list(SIGNS)} - before):
        try:
            sign = json.loads(store.read(key))
        except ObjectMissing:
            continue  # the next one is there already
        raise RunElsewhereError(store.url, f"{sign['host']}, pid {sign['pid']}")


def build(store: Store, found: Found, paths: RunPaths) -> None:
    """Make the run directory as far as the journal in the store knows it. The journal gets its name last.

    Raises:
        ShippedJournalError: a segment is damaged, or of another version.
        StoreError: the store could not be asked.
    """
    commits = fence.commits_present(store)
    paths.create()
    fresh = paths.database.with_name("run.db.building")
    fresh.unlink(missing_ok=True)
    with closing(Journal.open(fresh)) as journal:
        for start in range(0, len(found.chosen), _AT_ONCE):
            part = found.chosen[start : start + _AT_ONCE]
            for one, raw in zip(part, _parallel(lambda one: store.read(one.segment.key), part), strict=True):
                _put_in(journal, paths, one, raw, store.url)
        _settle(journal, Moved(claimed_epoch=found.epoch, commits=commits))
        _write_files(journal, paths)
    fresh.rename(paths.database)


def _put_in(journal: Journal, paths: RunPaths, one: Counting, raw: bytes, url: str) -> None:
    try:
        lines = gzip.decompress(raw).splitlines()
        tables = _tables((json.loads(line) for line in lines[1:]), one.end)
        for row in tables.pop("files", []):
            path = shipped_files(paths)[row["name"]]
            replace_file(path, row["text"].encode())
        for row in tables.get("snapshots", ()):
            row["json"] = row["json"].encode()
        journal.insert(tables)
    except (OSError, EOFError, zlib.error, ValueError, KeyError) as error:
        raise ShippedJournalError(url, f"{one.segment.key} can't be read ({error})") from error


def _tables(rows: Iterator[dict[str, Any]], end: int | None) -> dict[str, list[dict[str, Any]]]:
    """Rows by table; of one that another epoch has cut off, only what had happened before."""
    tables: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in rows:
        row = line["row"]
        event = {"events": "seq", "decisions": "event_seq", "snapshots": "event_seq"}.get(line["table"])
        if end is None or (event is not None and row[event] < end):
            tables[line["table"]].append(row)
    return tables


def _settle(journal: Journal, moved: Moved) -> None:
    """Nothing of the old machine lives here: what it was about to start is not started, what ran there is dead."""
    starts = [row for row in journal.decisions() if row["kind"] == "start_attempt" and row["status"] == "pending"]
    journal.insert(
        {
            "decisions": [{**dict(row), "status": "failed", "outcome": "its machine is lost"} for row in starts],
            "attempts": [
                {"attempt": json.loads(row["json"])["plan"]["attempt"], "pid": 0, "boot_id": _LOST, "starttime": 0,
                 "spawned_at_s": 0.0}
                for row in starts
            ]
            + [{**dict(row), "boot_id": _LOST} for row in journal.attempts() if row["ended_at_s"] is None],
        }
    )  # fmt: skip
    shipped = Shipped(
        upto=journal.last_event(), snapshot=journal.newest_snapshot()[0], unsettled_from=journal.first_unsettled(),
        attempt=journal.newest_attempt(),
    )  # fmt: skip
    journal.commit(Batch(meta={SHIPPED: shipped.model_dump_json(), MOVED: moved.model_dump_json()}))


def _write_files(journal: Journal, paths: RunPaths) -> None:
    """Plans, commands and records of the attempts, which the ledger reads; all records count as taken in."""
    for row in journal.decisions():
        match DECISIONS.validate_json(row["json"]):
            case StartAttempt(plan=plan):
                replace_file(paths.plan(plan.attempt), plan.model_dump_json(indent=1).encode())
            case SendCommand(attempt=attempt, command=command):
                append_command(paths.commands(attempt), command)
            case _:
                pass  # leaves no file in a run directory
    cursors: dict[int, Cursor] = {}
    for attempt in [int(row["attempt"]) for row in journal.attempts()]:
        with paths.records(attempt).open("wb") as file:
            for row in journal.select(_RECORDS_OF, attempt):
                file.write(row["record"].encode() + b"\n")
                cursors[attempt] = Cursor(row["seq"], file.tell())
    journal.commit(Batch(cursors=cursors))


def _fence(store: Store, epoch: int) -> fence.Fence | None:
    try:
        return fence.read_fence(store, epoch)
    except ObjectMissing:
        return None


def _parallel(call: Callable[[T], R], items: Iterable[T]) -> list[R]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(call, items))
