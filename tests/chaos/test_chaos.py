"""Thirty cycles of chaos on real processes; `make chaos` has five hundred."""

from pathlib import Path

import pytest

from tests.chaos.cycles import run_chaos, small_disk
from tests.chaos.world import World

pytestmark = pytest.mark.training


@pytest.mark.long
@pytest.mark.timeout(600)  # five seconds a cycle, on a machine that does nothing else
def test_thirty_cycles(tmp_path: Path) -> None:
    """Whatever dies, stands still or is full: the run goes on, nothing strays, the weights are those of a quiet run."""
    with small_disk(tmp_path, megabytes=96) as disk:
        world = World(tmp_path / "world", disk or tmp_path)
        try:
            report = run_chaos(world, seed=7, cycles=30, own_disk=disk is not None, tell=lambda _: None)
        finally:
            world.close()
    assert report.wrong == []
    assert report.cycles == 30
    assert len(report.kinds) > 8
