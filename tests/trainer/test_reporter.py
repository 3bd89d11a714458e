"""Records: the file is the truth, the datagram may be lost, nothing stalls."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitors.records import PhaseRecord, parse_record
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
