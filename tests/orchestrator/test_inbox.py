"""Records from the trainer: each exactly once, in order, whatever was torn, lost, repeated or interrupted."""

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors.records import CommitFailedRecord
from orchestrator.journal import Cursor
from orchestrator.process.inbox import Bell, Inbox
from tests.orchestrator.events import step_record
from trainer.contract.paths import RunPaths
from trainer.reporter import Reporter


@pytest.fixture(name="paths")
def _paths(tmp_path: Path) -> RunPaths:
    """An empty run directory."""
    paths = RunPaths(tmp_path / "run")
    paths.create()
    return paths


def _lines(numbers: Iterator[int] | range) -> list[bytes]:
    return [step_record(1, number).model_dump_json().encode() + b"\n" for number in numbers]


def _append(paths: RunPaths, data: bytes) -> None:
    with paths.records(1).open("ab") as file:
        file.write(data)


def test_a_torn_line_waits_until_it_is_whole(paths: RunPaths) -> None:
    """What is being written at this moment is not half read."""
    inbox = Inbox(paths, 1)
    assert inbox.poll() == []
    first, second = _lines(range(1, 3))
    _append(paths, first + second[:10])
    assert [record.seq for record in inbox.poll()] == [1]
    assert inbox.poll() == []
    _append(paths, second[10:])
    assert [record.seq for record in inbox.poll()] == [2]
    assert inbox.rejected == 0


@settings(max_examples=50, deadline=None)
@given(cuts=st.lists(st.integers(0, 3000), max_size=8), restarts=st.sets(st.integers(0, 8)))
def test_each_record_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], restarts: set[int]
) -> None:
    """However the file grew and whenever a new supervisor went on from the journaled cursor."""
    paths = RunPaths(tmp_path_factory.mktemp("run"))
    paths.create()
    raw = b"".join(_lines(range(1, 11)))
    inbox, seen, begin = Inbox(paths, 1), [], 0
    for number, end in enumerate([*sorted(min(cut, len(raw)) for cut in cuts), len(raw)]):
        _append(paths, raw[begin:end])
        begin = end
        if number in restarts:
            inbox = Inbox(paths, 1, inbox.cursor)
        seen += [record.seq for record in inbox.poll()]
    assert seen == list(range(1, 11))


def test_repeated_numbers_are_not_delivered_again(paths: RunPaths) -> None:
    """A sender that repeats itself; and a number that is missing does not hold the rest up."""
    one, two, three, four = _lines(range(1, 5))
    _append(paths, one + two + one + two + four + three)
    assert [record.seq for record in Inbox(paths, 1).poll()] == [1, 2, 4]


def test_what_is_no_record_is_rejected_and_counted(paths: RunPaths) -> None:
    """A broken line, a record of another attempt: passed over, and what follows is read."""
    other = step_record(2, 1).model_dump_json().encode() + b"\n"
    _append(paths, b"{}\n" + other + b"\xff\xfe\n" + _lines(range(1, 2))[0])
    inbox = Inbox(paths, 1)
    assert [record.seq for record in inbox.poll()] == [1]
    assert inbox.rejected == 3


def test_a_line_longer_than_one_read_is_taken_whole(paths: RunPaths) -> None:
    """A record with very many shards."""
    shards = dict.fromkeys(range(120_000), (1, 1.0))
    line = step_record(1, 1, shards=shards).model_dump_json().encode() + b"\n"
    assert len(line) > 1 << 20
    _append(paths, line + _lines(range(2, 3))[0])
    assert [record.seq for record in Inbox(paths, 1).poll()] == [1, 2]


def test_a_large_backlog_comes_in_portions(paths: RunPaths) -> None:
    """One transaction has a bounded size, and nothing is lost between two."""
    _append(paths, b"".join(_lines(range(1, 4001))))
    inbox, polls = Inbox(paths, 1), []
    while records := inbox.poll():
        polls.append([record.seq for record in records])
    assert len(polls) > 1
    assert [seq for poll in polls for seq in poll] == list(range(1, 4001))


def test_the_trainers_reporter_rings_the_bell(tmp_path: Path) -> None:
    """The real sender and the real receiver, below a path that is too long for a socket address."""
    deep = tmp_path
    for _ in range(5):
        deep = deep / ("d" * 40)
    paths = RunPaths(deep)
    paths.create()
    with Bell(paths.records_socket) as bell, Reporter(paths, 1) as reporter:
        record = step_record(1, 1)
        reporter.emit(type(record), **record.model_dump(exclude={"seq", "attempt", "at_s", "kind", "version"}))
        assert _is_readable(bell)
        bell.drain()
        assert not _is_readable(bell)
        assert [received.seq for received in Inbox(paths, 1).poll()] == [1]
    assert not paths.records_socket.exists()


def test_lost_datagrams_lose_no_record(paths: RunPaths) -> None:
    """Nobody reads the socket until its buffer is full: the file has everything."""
    with Bell(paths.records_socket), Reporter(paths, 1) as reporter:
        record = step_record(1, 1).model_dump(exclude={"seq", "attempt", "at_s", "kind", "version"})
        for _ in range(1000):
            reporter.emit(type(step_record(1, 1)), **record)
        inbox = Inbox(paths, 1)
        assert [r.seq for r in inbox.poll()] + [r.seq for r in inbox.poll()] == list(range(1, 1001))


def test_a_socket_left_by_a_killed_supervisor_is_taken_over(paths: RunPaths) -> None:
    """And it is private."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as left:
        directory = os.open(paths.root, os.O_RDONLY)
        left.bind(f"/proc/self/fd/{directory}/records.sock")
        os.close(directory)
    with Bell(paths.records_socket):
        assert paths.records_socket.stat().st_mode & 0o777 == 0o600


def test_reading_goes_on_behind_a_cursor(paths: RunPaths) -> None:
    """The journal's cursor is all that is needed."""
    lines = _lines(range(1, 4))
    _append(paths, b"".join(lines))
    inbox = Inbox(paths, 1, Cursor(2, len(lines[0]) + len(lines[1])))
    assert [record.seq for record in inbox.poll()] == [3]


def _is_readable(bell: Bell) -> bool:
    import select

    return bool(select.select([bell], [], [], 0)[0])


def test_what_a_keeper_says_after_a_power_cut_is_heard(paths: RunPaths) -> None:
    """The end of its file is gone, the journal's cursor is not; numbering goes on from what is left of the file."""
    file = paths.keeper_records("writer")

    def emit(steps: range) -> None:
        with closing(Reporter.of_keeper(paths, "writer")) as reporter:
            for step in steps:
                reporter.emit(CommitFailedRecord, attempt=1, step=step, error="x")

    emit(range(10))
    before = Inbox.of_keeper(paths, "writer", Cursor())
    assert len(before.poll()) == 10
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size * 2 // 3)

    after = Inbox.of_keeper(paths, "writer", before.cursor)
    emit(range(20, 23))

    assert [record.step for record in after.poll() if isinstance(record, CommitFailedRecord)] == [20, 21, 22]
