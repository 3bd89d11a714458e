"""A process is let go only when it is known: between the two its supervisor may die, and nothing is left behind."""

from pathlib import Path

import pytest

from orchestrator.journal import Journal, Spawned
from orchestrator.process.child import Child
from tests.orchestrator.restarting import SmallRun


def test_nothing_runs_before_its_identity_is_journaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor that dies between the two leaves a process that has done nothing, and leaves by itself."""
    order: list[str] = []
    journaled, released = Journal.record_spawn, Child.release

    def record_spawn(self: Journal, spawned: Spawned) -> None:
        journaled(self, spawned)
        order.append("journaled")

    def release(self: Child) -> None:
        order.append("released")
        released(self)

    monkeypatch.setattr(Journal, "record_spawn", record_spawn)
    monkeypatch.setattr(Child, "release", release)
    assert SmallRun(tmp_path, {"steps": 4}).supervise() == 0
    assert order == ["journaled", "released"]
