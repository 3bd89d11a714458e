"""Records: the file is the truth, the datagram may be lost, nothing stalls."""

import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitors.records import PhaseRecord, StepRecord, parse_record
from trainer.contract.paths import RunPaths
from trainer.reporter import Reporter


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run directory whose path is too long for a socket address."""
    found = RunPaths(tmp_path / ("long" * 30))
    found.create()
    return found


@pytest.fixture
def inbox(paths: RunPaths) -> Iterator[socket.socket]:
    """A supervisor's socket."""
    directory = os.open(paths.root, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(f"/proc/self/fd/{directory}/records.sock")
        bound.setblocking(False)
        yield bound
    os.close(directory)


def test_records_are_numbered_written_and_sent(paths: RunPaths, inbox: socket.socket) -> None:
    """File and datagrams hold the same records, numbered from 1, however long the path is."""
    with Reporter(paths, 3) as reporter:
        for step in range(3):
            reporter.emit(PhaseRecord, phase="train", step=step)
    lines = paths.records(3).read_bytes().splitlines()
    received = [inbox.recv(1 << 16) for _ in range(3)]
    assert received == lines
    assert [(parse_record(line).seq, parse_record(line).attempt) for line in lines] == [(1, 3), (2, 3), (3, 3)]


def test_no_supervisor_costs_nothing(paths: RunPaths) -> None:
    """Without a socket the file is written all the same, and the last answer stays at the start."""
    with Reporter(paths, 1) as reporter:
        began_s = reporter.answered_s
        reporter.emit(PhaseRecord, phase="train", step=0)
        assert reporter.answered_s == began_s
    assert len(paths.records(1).read_bytes().splitlines()) == 1


def test_a_stalled_supervisor_never_stalls_training(paths: RunPaths, inbox: socket.socket) -> None:
    """A full buffer drops datagrams, keeps the file whole, and still counts as somebody being there."""
    with Reporter(paths, 1) as reporter:
        began_s = reporter.answered_s
        for step in range(2000):
            reporter.emit(PhaseRecord, phase="train", step=step)
        assert reporter.answered_s > began_s
    assert len(paths.records(1).read_bytes().splitlines()) == 2000


def test_ordinary_steps_share_a_datagram_and_nothing_else_waits(
    paths: RunPaths, inbox: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second holds up to sixteen of them; what is not finite, not applied or no step is said at once."""
    now_s = 100.0
    monkeypatch.setattr("trainer.reporter.time.monotonic", lambda: now_s)
    with Reporter(paths, 1) as reporter:

        def said(count: int, loss: float = 1.0, **fields: bool) -> int:
            for _ in range(count):
                reporter.emit(StepRecord, step=1, loss=loss, grad_norm=1.0, **fields)
            return _waiting(inbox)

        assert said(1) == 1  # the first
        assert [said(1) for _ in range(16)] == [0] * 15 + [1]
        assert said(15) == 0
        now_s += 1.0
        assert said(1) == 1
        assert said(3) == 0
        assert said(1, loss=math.nan) == 1
        assert said(1, skipped=True) == 1
        assert said(1) == 0
        reporter.emit(PhaseRecord, phase="save", step=1)
        assert _waiting(inbox) == 1
    assert len(paths.records(1).read_bytes().splitlines()) == 1 + 16 + 15 + 1 + 3 + 1 + 1 + 1 + 1


def _waiting(inbox: socket.socket) -> int:
    count = 0
    while True:
        try:
            inbox.recv(1 << 16)
        except BlockingIOError:
            return count
        count += 1
