"""Output never holds a supervisor up: a stalled reader, one that is gone, a full disk."""

import os
import threading
from pathlib import Path

import pytest

from orchestrator.report.background import BackgroundFile


def test_everything_is_written_in_order(tmp_path: Path) -> None:
    """What was queued is there when it is finished."""
    with (tmp_path / "out").open("w") as file:
        output = BackgroundFile(file)
        for number in range(500):
            output.write(f"{number}\n")
        output.finish(10.0)

    assert (tmp_path / "out").read_text().split() == [str(number) for number in range(500)]


def test_a_reader_that_stalls_holds_nothing_up() -> None:
    """A pipe that nobody reads takes 64 KiB and no more; the writer goes on."""
    read, write = os.pipe()
    with os.fdopen(write, "w") as file:
        output = BackgroundFile(file)
        for _ in range(5000):
            output.write("x" * 100)
        output.finish(0.05)
        assert threading.active_count() > 1  # still waiting in its write
        os.close(read)  # and let go


@pytest.mark.parametrize("place", ["closed pipe", "/dev/full"])
def test_what_cannot_be_written_is_dropped(place: str) -> None:
    """No error reaches the supervisor."""
    if place == "/dev/full":
        descriptor = os.open(place, os.O_WRONLY)
    else:
        read, descriptor = os.pipe()
        os.close(read)
    with os.fdopen(descriptor, "w") as file:
        output = BackgroundFile(file)
        for _ in range(10):
            output.write("lost\n")
        output.finish(10.0)

        assert not output.isatty()
