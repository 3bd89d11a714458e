"""The journal: what happened and what was decided, durable before anything follows from it (DESIGN 1.2).

SQLite in WAL mode with synchronous=FULL. One transaction holds a batch of events with its decisions, incidents, steps
and read cursors, so that after a SIGKILL anywhere each of them is known exactly once or not at all. Newest snapshot
plus later events give the state back; decisions are never computed again. Tick and record events before the last
snapshot but one are dropped (steps and the record files keep them), except the few records that tell of checkpoints,
loads and plans. SQLite has no NaN: a NaN loss is NULL in its column, and in full in `record`. Times are unix seconds.
"""

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from monitors.records import StartedRecord, StepRecord
from orchestrator.errors import (
    JournalMissingError,
    JournalWriteError,
)
from orchestrator.journal_file import (
    FIRST_UNSETTLED,
    FORGET,
    NEW_ATTEMPT,
    SHIPPED_TABLES,
    SURVIVING,
    check_identity,
    meaning,
    num_tables,
    prepare,
)
from orchestrator.policy.decisions import DECISIONS, Decision
from orchestrator.policy.events import EVENTS, AttemptExited, Event, RecordReceived
from orchestrator.process.filesystem import refuse_network_filesystem

T = TypeVar("T")
_READ_WAIT_MS = 5000
_KEEP_SNAPSHOTS = 2


@dataclass(frozen=True, slots=True)
class Folded:
    """An event and what the engine decided on it."""

    event: Event
    decisions: tuple[Decision, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredDecision:
    """A decision with its number in the journal."""

    id: int
    decision: Decision


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far the records of an attempt have been taken in: last `seq`, and bytes of the file."""

    seq: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a decision ended."""

    ok: bool
    text: str = ""


@dataclass(frozen=True, slots=True)
class Spawned:
    """What is journaled of a process before it may run."""

    attempt: int
    pid: int
    boot_id: str
    starttime: int
    at_s: float
    oom_kills: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """One transaction."""

    folded: Sequence[Folded] = ()
    incidents: Mapping[int, str] | None = None
    cursors: Mapping[int, Cursor] | None = None
    outcomes: Mapping[int, Outcome] | None = None
    meta: Mapping[str, str] | None = None
    snapshot: bytes | None = None


class Journal:
    """run.db. Every writing method is one durable transaction and raises `JournalWriteError` if it could not be."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._db = connection
        self._db.row_factory = sqlite3.Row
        self.path = path
        #: Asked after a failed write; True: try again. It is what waits.
        self.patience: Callable[[JournalWriteError], bool] = lambda _: False

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open for writing, and create it if there is none.

        Raises:
            NetworkFilesystemError: locks and fsync can't be trusted there.
            JournalError: it is damaged, foreign, or of a newer version.
        """
        refuse_network_filesystem(path.parent)
        with meaning(path):
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=True)
        try:
            with meaning(path):
                path.chmod(0o600)
                connection.execute(f"PRAGMA busy_timeout = {_READ_WAIT_MS}")
                prepare(connection, path)
        except BaseException:
            connection.close()
            raise
        return cls(connection, path)

    @classmethod
    def read_only(cls, path: Path) -> Self:
        """Open for reading, also while a supervisor writes.

        Raises:
            JournalError: there is none, or it can't be read.
        """
        if not path.exists():
            raise JournalMissingError(path)
        with meaning(path):
            connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
        try:
            with meaning(path):
                connection.execute(f"PRAGMA busy_timeout = {_READ_WAIT_MS}")
                if not num_tables(connection):
                    raise JournalMissingError(path)  # a supervisor is just about to create it
                check_identity(connection, path)
        except BaseException:
            connection.close()
            raise
        return cls(connection, path)

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    # -- writing --------------------------------------------------------------------------------------------------

    def commit(self, batch: Batch) -> list[StoredDecision]:
        """Make one batch durable and return its decisions, numbered, in order."""
        return self._durably(lambda: self._batch(batch))

    def _batch(self, batch: Batch) -> list[StoredDecision]:
        stored: list[StoredDecision] = []
        with self._transaction():
            for folded in batch.folded:
                seq = self._event(folded.event)
                stored += [self._decision(seq, decision) for decision in folded.decisions]
            for number, text in (batch.incidents or {}).items():
                self._db.execute("INSERT OR REPLACE INTO incidents VALUES (?, ?)", (number, text))
            for attempt, cursor in (batch.cursors or {}).items():
                row = (attempt, cursor.seq, cursor.offset)
                self._db.execute("INSERT OR REPLACE INTO cursors VALUES (?, ?, ?)", row)
            for number, outcome in (batch.outcomes or {}).items():
                status = "done" if outcome.ok else "failed"
                self._db.execute(
                    "UPDATE decisions SET status = ?, outcome = ? WHERE id = ?", (status, outcome.text, number)
                )
            for key, value in (batch.meta or {}).items():
                self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
            if batch.snapshot is not None:
                self._snapshot(batch.snapshot)
        return stored

    def record_spawn(self, spawned: Spawned) -> None:
        """A process exists and waits for its release. Done again for the same attempt, the newer process counts."""
        row = (spawned.attempt, spawned.pid, spawned.boot_id, spawned.starttime, spawned.at_s, spawned.oom_kills)
        self._durably(lambda: self._write(NEW_ATTEMPT, row))

    def notify(self, stored: StoredDecision, at_s: float, level: str, title: str, text: str) -> None:
        """Write a notification down; the same decision again changes nothing."""
        row = (stored.id, at_s, level, title, text, stored.decision.incident)
        self._durably(lambda: self._write("INSERT OR IGNORE INTO notifications VALUES (?, ?, ?, ?, ?, ?)", row))

    def _durably(self, write: Callable[[], T]) -> T:
        while True:
            try:
                return write()
            except JournalWriteError as error:
                if not self.patience(error):
                    raise

    def _write(self, statement: str, row: Sequence[object]) -> None:
        with self._transaction():
            self._db.execute(statement, row)

    def insert(self, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Put rows in as they are, over those of the same key: how a journal is built again from its segments.

        Raises:
            ValueError: a table or column that a journal does not have.
        """
        with self._transaction():
            for table, rows in tables.items():
                if table not in SHIPPED_TABLES:
                    raise ValueError(f"a journal has no table {table!r}; use the version of Longwatch that wrote it")
                known = {row["name"] for row in self._rows(f"PRAGMA table_info({table})")}
                for row in rows:
                    if not row.keys() <= known:
                        raise ValueError(
                            f"{table} has no column {sorted(row.keys() - known)}; it is of another version"
                        )
                    marks = ", ".join("?" * len(row))
                    columns = ", ".join(row)
                    statement = f"INSERT OR REPLACE INTO {table} ({columns}) VALUES ({marks})"  # noqa: S608  both known
                    self._db.execute(statement, tuple(row.values()))
            for row in tables.get("events", ()):
                match EVENTS.validate_json(row["json"]):
                    case RecordReceived(record=StepRecord() as record):
                        self._step(record)
                    case _:
                        pass  # the other tables came as rows

    def _event(self, event: Event) -> int:
        text = event.model_dump_json()
        seq = self._db.execute(
            "INSERT INTO events(at_s, kind, json) VALUES (?, ?, ?)", (event.at_s, event.kind, text)
        ).lastrowid
        assert seq is not None
        match event:
            case RecordReceived(record=StepRecord() as record):
                self._step(record)
            case RecordReceived(record=StartedRecord() as record):
                self._db.execute(
                    "UPDATE attempts SET started_step = ?, loaded = ?, replay = ? WHERE attempt = ?",
                    (record.step, record.loaded, record.replay, record.attempt),
                )
            case AttemptExited():
                self._db.execute(
                    "UPDATE attempts SET ended_at_s = ?, cause = ?, code = ?, signum = ?, detail = ? WHERE attempt = ?",
                    (event.at_s, event.cause, event.code, event.signum, event.detail, event.attempt),
                )
            case _:
                pass  # the other kinds have no table of their own
        return seq

    def _step(self, record: StepRecord) -> None:
        begin, end = (record.data.begin, record.data.end) if record.data else (None, None)
        self._db.execute(
            "INSERT OR REPLACE INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                record.attempt, record.step, record.loss, record.grad_norm, record.lr, record.tokens,
                begin, end, record.at_s, record.model_dump_json(),
            ),
        )  # fmt: skip

    def _decision(self, event_seq: int, decision: Decision) -> StoredDecision:
        number = self._db.execute(
            "INSERT INTO decisions(event_seq, kind, json) VALUES (?, ?, ?)",
            (event_seq, decision.kind, decision.model_dump_json()),
        ).lastrowid
        assert number is not None
        return StoredDecision(number, decision)

    def _snapshot(self, snapshot: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO snapshots SELECT COALESCE(MAX(seq), 0), ? FROM events", (snapshot,))
        kept = self._db.execute(
            "SELECT event_seq FROM snapshots ORDER BY event_seq DESC LIMIT ?", (_KEEP_SNAPSHOTS,)
        ).fetchall()
        if len(kept) == _KEEP_SNAPSHOTS:
            oldest = kept[-1]["event_seq"]
            self._db.execute("DELETE FROM snapshots WHERE event_seq < ?", (oldest,))
            self._db.execute(FORGET, (min(oldest, self._unshipped_from(oldest)),))

    def _unshipped_from(self, otherwise: int) -> int:
        """The first event that is in no segment yet: it must not be forgotten before it is."""
        rows = self._rows("SELECT json_extract(value, '$.upto') AS upto FROM meta WHERE key = 'shipped'")
        return int(rows[0]["upto"]) + 1 if rows else otherwise

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise JournalWriteError(self.path, str(error)) from error

    # -- reading --------------------------------------------------------------------------------------------------

    def newest_snapshot(self) -> tuple[int, bytes | None]:
        """Number of the last event it contains, and the snapshot; (0, None) if there is none."""
        rows = self._rows("SELECT event_seq, json FROM snapshots ORDER BY event_seq DESC LIMIT 1")
        return (rows[0]["event_seq"], bytes(rows[0]["json"])) if rows else (0, None)

    def events(self, after: int = 0) -> Iterator[Event]:
        """Events after a number, in order."""
        for row in self.select("SELECT json FROM events WHERE seq > ? ORDER BY seq", after):
            yield EVENTS.validate_json(row["json"])

    def pending(self) -> list[StoredDecision]:
        """Decisions that were not carried out to their end, oldest first."""
        rows = self._rows("SELECT id, json FROM decisions WHERE status = 'pending' ORDER BY id")
        return [StoredDecision(row["id"], DECISIONS.validate_json(row["json"])) for row in rows]

    def decisions(self) -> list[sqlite3.Row]:
        """All decisions: id, event_seq, kind, json, status, outcome."""
        return self._rows("SELECT * FROM decisions ORDER BY id")

    def attempts(self) -> list[sqlite3.Row]:
        """All attempts, with the facts of their spawn and their exit."""
        return self._rows("SELECT * FROM attempts ORDER BY attempt")

    def last_attempt(self) -> sqlite3.Row | None:
        """The newest attempt."""
        rows = self._rows("SELECT * FROM attempts ORDER BY attempt DESC LIMIT 1")
        return rows[0] if rows else None

    def newest_attempt(self) -> int:
        """Its number; 0 before the first."""
        row = self.last_attempt()
        return int(row["attempt"]) if row is not None else 0

    def last_event(self) -> int:
        """Number of the newest event; 0 before the first."""
        return int(self._rows("SELECT COALESCE(MAX(seq), 0) AS seq FROM events")[0]["seq"])

    def first_unsettled(self) -> int:
        """Id from which on decisions may still change: the oldest pending one, or the next."""
        return int(self._rows(FIRST_UNSETTLED)[0]["id"])

    def hang_confirmed(self, attempt: int) -> bool:
        """Whether this attempt was found to hang."""
        found = self._rows(
            "SELECT 1 FROM events WHERE kind = 'hang_confirmed' AND json_extract(json, '$.attempt') = ?", attempt
        )
        return bool(found)

    def cursor(self, attempt: int) -> Cursor:
        """How far an attempt's records were taken in."""
        rows = self._rows("SELECT seq, offset FROM cursors WHERE attempt = ?", attempt)
        return Cursor(rows[0]["seq"], rows[0]["offset"]) if rows else Cursor()

    def incidents(self) -> list[dict[str, Any]]:
        """All incidents as last written, oldest first."""
        return [json.loads(row["json"]) for row in self._rows("SELECT json FROM incidents ORDER BY id")]

    def steps(self, *, surviving: bool = False) -> list[sqlite3.Row]:
        """All steps that were run, or those that survive (DESIGN 5), in order."""
        return self._rows(SURVIVING if surviving else "SELECT * FROM steps ORDER BY attempt, step")

    def notifications(self) -> list[sqlite3.Row]:
        """All notifications: decision, at_s, level, title, text, incident."""
        return self._rows("SELECT * FROM notifications ORDER BY decision")

    def meta(self, key: str) -> str | None:
        """A single fact: `status` and `totals` are written with every batch."""
        rows = self._rows("SELECT value FROM meta WHERE key = ?", key)
        return str(rows[0]["value"]) if rows else None

    def select(self, query: str, *parameters: object) -> Iterator[sqlite3.Row]:
        """Rows of a reader's own query, one at a time."""
        with meaning(self.path):
            yield from self._db.execute(query, parameters)

    def _rows(self, query: str, *parameters: object) -> list[sqlite3.Row]:
        return list(self.select(query, *parameters))
