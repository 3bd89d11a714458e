"""The journal's file: its tables, the statements that are more than a line, and whether a file is a journal. SQLite."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import JournalCorruptError, JournalForeignError, JournalVersionError, JournalWriteError

APPLICATION_ID = 0x4C4E4757  # "LNGW"
VERSION = 1
CHECK_UP_TO_BYTES = 64 << 20  # quick_check reads the whole file; beyond this damage shows itself on reading
#: What a replacement on another machine is given.
SHIPPED_TABLES = ("events", "decisions", "attempts", "incidents", "notifications", "snapshots", "meta")

SCHEMA = f"""
CREATE TABLE events(seq INTEGER PRIMARY KEY, at_s REAL NOT NULL, kind TEXT NOT NULL, json TEXT NOT NULL);
CREATE TABLE decisions(
    id INTEGER PRIMARY KEY, event_seq INTEGER NOT NULL, kind TEXT NOT NULL, json TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'done', 'failed')),
    outcome TEXT NOT NULL DEFAULT ''
);
CREATE INDEX decisions_pending ON decisions(id) WHERE status = 'pending';
CREATE TABLE attempts(
    attempt INTEGER PRIMARY KEY, pid INTEGER NOT NULL, boot_id TEXT NOT NULL, starttime INTEGER NOT NULL,
    spawned_at_s REAL NOT NULL, oom_kills INTEGER, started_step INTEGER, loaded TEXT, replay INTEGER NOT NULL DEFAULT 0,
    ended_at_s REAL, cause TEXT, code INTEGER, signum INTEGER, detail TEXT
);
CREATE TABLE cursors(attempt INTEGER PRIMARY KEY, seq INTEGER NOT NULL, offset INTEGER NOT NULL);
CREATE TABLE incidents(id INTEGER PRIMARY KEY, json TEXT NOT NULL);
CREATE TABLE steps(
    attempt INTEGER NOT NULL, step INTEGER NOT NULL, loss REAL, grad_norm REAL, lr REAL, tokens INTEGER,
    data_begin INTEGER, data_end INTEGER, at_s REAL, record TEXT NOT NULL, PRIMARY KEY (attempt, step)
);
CREATE TABLE notifications(
    decision INTEGER PRIMARY KEY, at_s REAL NOT NULL, level TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL,
    incident INTEGER
);
CREATE TABLE snapshots(event_seq INTEGER PRIMARY KEY, json BLOB NOT NULL);
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
"""

SURVIVING = """
SELECT s.* FROM steps s JOIN attempts a USING (attempt)
WHERE a.replay = 0 AND NOT EXISTS (
    SELECT 1 FROM attempts later
    WHERE later.attempt > s.attempt AND later.replay = 0 AND later.started_step < s.step
)
ORDER BY s.step
"""

FORGET = """
DELETE FROM events WHERE seq < ? AND kind IN ('record_received', 'ticked')
AND COALESCE(json_extract(json, '$.record.kind'), '') NOT IN ('started', 'commit', 'plan_applied')
"""

NEW_ATTEMPT = """
INSERT OR REPLACE INTO attempts(attempt, pid, boot_id, starttime, spawned_at_s, oom_kills) VALUES (?, ?, ?, ?, ?, ?)
"""

FIRST_UNSETTLED = """
SELECT COALESCE((SELECT MIN(id) FROM decisions WHERE status = 'pending'), MAX(id) + 1, 1) AS id FROM decisions
"""


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Make the tables, or see that they are ours; every later commit is durable."""
    tables = num_tables(connection)
    if tables:
        check_identity(connection, path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    if not tables:
        connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
    elif path.stat().st_size <= CHECK_UP_TO_BYTES:
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise JournalCorruptError(path, str(verdict))


def num_tables(connection: sqlite3.Connection) -> int:
    """0 for a file that was only just created."""
    return int(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def check_identity(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse what is no journal, or one of another version."""
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        raise JournalForeignError(path)
    if version != VERSION:
        raise JournalVersionError(path, f"format {version}, this one knows {VERSION}")


@contextmanager
def meaning(path: Path) -> Iterator[None]:
    """Which of our errors an error of SQLite is, when opening and reading."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise JournalWriteError(path, str(error)) from error
    except sqlite3.DatabaseError as error:
        raise JournalCorruptError(path, str(error)) from error
