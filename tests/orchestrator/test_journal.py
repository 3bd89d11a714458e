"""The journal: durable before effects, exact after a kill, readable while live, clear about what it can't use."""

import json
import math
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors.records import StartedRecord, StepRecord
from orchestrator.errors import (
    JournalCorruptError,
    JournalForeignError,
    JournalMissingError,
    JournalVersionError,
    JournalWriteError,
    NetworkFilesystemError,
)
from orchestrator.journal import Batch, Cursor, Folded, Journal, Outcome, Spawned
from orchestrator.policy.decisions import Notify, StopAttempt
from orchestrator.policy.events import AttemptExited, Event, HangConfirmed, Ticked
from orchestrator.process.filesystem import NETWORK_FILESYSTEMS, filesystem_magic, refuse_network_filesystem
from tests.orchestrator.events import received, started_record, step_record
from tests.orchestrator.restarting import RestartingCore


def _spawned(attempt: int) -> Spawned:
    return Spawned(attempt, 100 + attempt, "boot", 7, 1.0, None)


def test_what_was_committed_is_read_back(tmp_path: Path) -> None:
    """Events, decisions, incidents, cursors and facts of one batch come back from another connection."""
    stop = StopAttempt(attempt=1, how="kill", because="hang")
    with closing(Journal.open(tmp_path / "run.db")) as journal:
        journal.record_spawn(_spawned(1))
        stored = journal.commit(
            Batch(
                folded=[Folded(Ticked(at_s=1.0), (stop,)), Folded(received(step_record(1, 1)))],
                incidents={1: '{"id": 1}'},
                cursors={1: Cursor(5, 99)},
                meta={"status": "{}"},
            )
        )
        with closing(Journal.read_only(tmp_path / "run.db")) as reader:
            assert [event.kind for event in reader.events()] == ["ticked", "record_received"]
            assert reader.pending() == stored
            assert stored[0].decision == stop
            assert reader.incidents() == [{"id": 1}]
            assert reader.cursor(1) == Cursor(5, 99)
            assert reader.cursor(2) == Cursor()
            assert reader.meta("status") == "{}"
            assert reader.steps()[0]["step"] == 1


def test_an_outcome_takes_a_decision_off_the_list(tmp_path: Path) -> None:
    """Done and failed decisions are not given out again, and keep what came of them."""
    notes = tuple(Notify(level="info", title=title, text="") for title in "abc")
    with closing(Journal.open(tmp_path / "run.db")) as journal:
        first, second, third = journal.commit(Batch(folded=[Folded(Ticked(at_s=1.0), notes)]))
        journal.commit(Batch(outcomes={first.id: Outcome(True, "yes"), third.id: Outcome(False, "no")}))
        assert journal.pending() == [second]
        assert [(row["status"], row["outcome"]) for row in journal.decisions()] == [
            ("done", "yes"), ("pending", ""), ("failed", "no"),
        ]  # fmt: skip


def test_non_finite_losses_survive(tmp_path: Path) -> None:
    """NaN is NULL in the column, which SQLite can't help, and NaN in the record and in the event."""
    with closing(Journal.open(tmp_path / "run.db")) as journal:
        journal.record_spawn(_spawned(1))
        journal.commit(Batch(folded=[Folded(received(step_record(1, 1, loss=math.nan, grad_norm=math.inf)))]))
        row = journal.steps()[0]
        assert row["loss"] is None
        assert row["grad_norm"] == math.inf
        assert json.loads(row["record"])["loss"] == "NaN"
        (event,) = journal.events()
        assert event.kind == "record_received"
        assert math.isnan(event.record.loss)  # type: ignore[union-attr]


def test_surviving_steps_are_those_no_later_load_went_back_over(tmp_path: Path) -> None:
    """Attempt 2 loads step 2; attempt 3 is a replay from step 1 and takes nothing away."""
    records: list[StepRecord | StartedRecord] = [
        started_record(1, 0), *(step_record(1, step, step + 1) for step in (1, 2, 3, 4)),
        started_record(2, 2), *(step_record(2, step, step) for step in (3, 4, 5)),
        started_record(3, 1, replay=True), step_record(3, 2, replay=True),
    ]  # fmt: skip
    with closing(Journal.open(tmp_path / "run.db")) as journal:
        for attempt in (1, 2, 3):
            journal.record_spawn(_spawned(attempt))
        journal.commit(Batch(folded=[Folded(received(record)) for record in records]))
        surviving = [(row["attempt"], row["step"]) for row in journal.steps(surviving=True)]
        assert surviving == [(1, 1), (1, 2), (2, 3), (2, 4), (2, 5)]
        assert len(journal.steps()) == 8


def test_the_end_of_an_attempt_is_in_its_row(tmp_path: Path) -> None:
    """An AttemptExited event fills in cause and code; a confirmed hang can be asked for."""
    with closing(Journal.open(tmp_path / "run.db")) as journal:
        journal.record_spawn(_spawned(1))
        assert not journal.hang_confirmed(1)
        hang = HangConfirmed(at_s=1.0, attempt=1, phase="train", step=3, silent_s=9.0)
        ended = AttemptExited(at_s=2.0, attempt=1, cause="hang", signum=9)
        journal.commit(Batch(folded=[Folded(hang), Folded(ended)]))
        row = journal.last_attempt()
        assert row is not None
        assert (row["cause"], row["signum"], row["ended_at_s"]) == ("hang", 9, 2.0)
        assert journal.hang_confirmed(1)
        assert not journal.hang_confirmed(2)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.tuples(st.integers(1, 7), st.booleans()), max_size=12))
def test_newest_snapshot_and_tail_are_the_state(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[tuple[int, bool]]
) -> None:
    """However the events were batched and wherever snapshots fell, restoring gives the state that was."""
    core, step = RestartingCore(), 0
    with closing(Journal.open(tmp_path_factory.mktemp("j") / "run.db")) as journal:
        for number, snapshot in cuts:
            events: list[Event] = []
            for _ in range(number):
                step += 1
                events += [received(step_record(1, step)), Ticked(at_s=step)]
            folded = [Folded(event, tuple(core.fold(event))) for event in events]
            journal.commit(Batch(folded=folded, snapshot=core.snapshot() if snapshot else None))
        seq, raw = journal.newest_snapshot()
        restored = RestartingCore(raw)
        for event in journal.events(after=seq):
            restored.fold(event)
        assert restored.state == core.state
        assert [row["step"] for row in journal.steps()] == list(range(1, step + 1))


def test_old_records_leave_the_event_log_at_snapshots(tmp_path: Path) -> None:
    """The log does not grow with the length of the run, the steps table keeps every step."""
    with closing(Journal.open(tmp_path / "run.db")) as journal:
        for step in range(1, 31):
            folded = [Folded(received(step_record(1, step)))]
            journal.commit(Batch(folded=folded, snapshot=b"{}" if step % 10 == 0 else None))
        assert len(list(journal.events())) == 11
        assert len(journal.steps()) == 30


_WRITER = """
import sys
from pathlib import Path
from orchestrator.journal import Batch, Folded, Journal
from orchestrator.policy.decisions import Notify
from orchestrator.policy.events import Ticked
journal = Journal.open(Path(sys.argv[1]))
for number in range(1, 100000):
    note = Notify(level="info", title=str(number), text="")
    journal.commit(Batch(folded=[Folded(Ticked(at_s=number), (note,))]))
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


def test_sigkill_of_the_writer_loses_nothing_it_had_committed(tmp_path: Path) -> None:
    """Everything that was said to be committed is there; a batch is there whole or not at all."""
    path = tmp_path / "run.db"
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    with writer.stdout:
        said = [int(writer.stdout.readline()) for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        said += [int(line) for line in writer.stdout if line.endswith("\n")]
    assert writer.wait() == -signal.SIGKILL
    with closing(Journal.open(path)) as journal:
        events = [event.at_s for event in journal.events()]
        assert events[: len(said)] == said
        assert [stored.decision.title for stored in journal.pending()] == [str(int(at_s)) for at_s in events]  # type: ignore[union-attr]


def test_a_damaged_file_is_said_to_be_damaged(tmp_path: Path) -> None:
    """Garbage, and a database with a torn page."""
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"x" * 8192)
    with pytest.raises(JournalCorruptError, match=r"garbage\.db is damaged"):
        Journal.open(garbage)
    torn = tmp_path / "torn.db"
    with closing(Journal.open(torn)) as journal:
        folded = [Folded(received(step_record(1, step))) for step in range(1, 200)]
        journal.commit(Batch(folded=folded))
    raw = bytearray(torn.read_bytes())
    raw[8192:40960] = b"\xff" * (40960 - 8192)
    torn.write_bytes(raw)
    with pytest.raises(JournalCorruptError):
        Journal.open(torn)


def test_a_foreign_or_newer_database_is_left_alone(tmp_path: Path) -> None:
    """Neither another program's tables nor a later format are touched."""
    foreign = tmp_path / "foreign.db"
    with closing(sqlite3.connect(foreign)) as other:
        other.execute("CREATE TABLE theirs(x)")
    before = foreign.read_bytes()
    with pytest.raises(JournalForeignError, match="choose another run_dir"):
        Journal.open(foreign)
    assert foreign.read_bytes() == before
    newer = tmp_path / "newer.db"
    Journal.open(newer).close()
    with closing(sqlite3.connect(newer)) as later:
        later.execute("PRAGMA user_version = 99")
    for opener in (Journal.open, Journal.read_only):
        with pytest.raises(JournalVersionError, match="99"):
            opener(newer)


def test_a_journal_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    """Reading creates nothing."""
    with pytest.raises(JournalMissingError):
        Journal.read_only(tmp_path / "run.db")
    assert not (tmp_path / "run.db").exists()


def test_a_journal_that_is_being_created_is_not_there_yet(tmp_path: Path) -> None:
    """A status command in that instant is not told of a foreign database; the next supervisor completes it."""
    path = tmp_path / "run.db"
    with closing(sqlite3.connect(path)) as begun:
        begun.execute("PRAGMA journal_mode = WAL")
    with pytest.raises(JournalMissingError):
        Journal.read_only(path)
    Journal.open(path).close()
    Journal.read_only(path).close()


def test_a_reader_can_change_nothing(tmp_path: Path) -> None:
    """A status command has no way to disturb the run."""
    Journal.open(tmp_path / "run.db").close()
    with closing(Journal.read_only(tmp_path / "run.db")) as reader, pytest.raises(JournalWriteError):
        reader.commit(Batch(meta={"a": "b"}))


@pytest.mark.parametrize("magic", sorted(NETWORK_FILESYSTEMS))
def test_network_filesystems_are_refused(tmp_path: Path, magic: int) -> None:
    """Locks and fsync can't be trusted there; the message names the kind and the remedy."""
    with pytest.raises(NetworkFilesystemError, match=NETWORK_FILESYSTEMS[magic]):
        refuse_network_filesystem(tmp_path, magic)


def test_local_filesystems_are_told_by_their_magic() -> None:
    """/proc is procfs (0x9fa0), and not on a network."""
    assert filesystem_magic(Path("/proc")) == 0x9FA0
    refuse_network_filesystem(Path("/proc"))
