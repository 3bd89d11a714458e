"""The logbook behind a run: written when it should be, never waited for, and never the run's undoing."""

import time
from pathlib import Path

import pytest

from orchestrator.logbook.keep import Keeper
from orchestrator.logbook.model import Logbook
from tests.orchestrator.clirun import write_journal
from tests.runs import wait_until
from trainer.contract.paths import RunPaths

_LONG_S = 30.0


class _Clock:
    """Time as the test has it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(name="paths")
def _paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run")
    write_journal(paths)
    return paths


def _settle(keeper: Keeper) -> None:
    """Until the writer that runs has ended."""
    wait_until(lambda: not keeper.is_writing, "the writer ends", _LONG_S)


def test_it_is_written_at_incidents_and_at_intervals(paths: RunPaths) -> None:
    """Not at once, soon after an incident, and every so often without one."""
    clock = _Clock()
    keeper = Keeper(paths, every_s=600.0, clock=clock)
    keeper.seen(("running", 0, 0))
    clock.now_s = 30.0
    keeper.seen(("running", 0, 0))
    assert keeper.started == 0
    keeper.seen(("running", 1, 1))
    assert keeper.started == 1
    _settle(keeper)
    assert Logbook.model_validate_json((paths.root / "report.json").read_text()).verdict.incidents == 1
    clock.now_s = 100.0
    keeper.seen(("running", 1, 1))
    assert keeper.started == 1
    clock.now_s = 631.0
    keeper.seen(("running", 1, 1))
    assert keeper.started == 2
    _settle(keeper)


def test_a_burst_of_incidents_is_written_once(paths: RunPaths) -> None:
    """The next one waits, however much happens."""
    clock = _Clock()
    keeper = Keeper(paths, every_s=600.0, clock=clock)
    keeper.seen(("running", 0, 0))
    clock.now_s = 25.0
    for number in range(1, 50):
        keeper.seen(("running", number, 1))
    assert keeper.started == 1
    _settle(keeper)
    assert keeper.started == 1


def test_the_last_one_is_waited_for_no_longer_than_is_allowed(paths: RunPaths) -> None:
    """With no time at all it goes on by itself, in a session of its own."""
    keeper = Keeper(paths, every_s=600.0)
    begun_s = time.monotonic()
    keeper.finish(0.0)
    assert time.monotonic() - begun_s < 5.0
    wait_until(lambda: (paths.root / "report.json").exists() and not keeper.is_writing, "written", _LONG_S)


def test_a_logbook_that_can_not_be_written_costs_nothing(paths: RunPaths) -> None:
    """A damaged journal, or a run directory that is gone: said in the log, and nothing else."""
    paths.database.write_bytes(b"this is no journal at all" * 100)
    keeper = Keeper(paths, every_s=600.0)
    keeper.finish(_LONG_S)
    assert not (paths.root / "report.html").exists()
    assert "run.db" in (paths.root / "logs" / "logbook.out").read_text()
    Keeper(RunPaths(paths.root / "gone"), every_s=600.0).finish(_LONG_S)
    assert not (paths.root / "gone").exists()


def test_one_that_takes_long_is_followed_by_a_long_rest(paths: RunPaths) -> None:
    """Twenty times as long: the logbook of a long run never becomes the work of the machine."""
    clock = _Clock()
    keeper = Keeper(paths, every_s=600.0, clock=clock)
    keeper.seen(("running", 0, 0))
    clock.now_s = 600.0
    keeper.seen(("running", 0, 0))
    clock.now_s = 700.0
    _settle(keeper)
    clock.now_s = 2699.0
    keeper.seen(("running", 0, 0))
    assert keeper.started == 1
    clock.now_s = 2701.0
    keeper.seen(("running", 0, 0))
    assert keeper.started == 2
    _settle(keeper)
