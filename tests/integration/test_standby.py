"""Attempts that are forks of the standby train to the same bits as attempts that were started cold."""

import json
from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.journal import Journal
from tests.runs import Run, tiny_config

pytestmark = pytest.mark.training


@pytest.mark.long
def test_forked_and_cold_attempts_agree_to_the_bit(tmp_path: Path, corpus: Path) -> None:
    """Killed where only the standby can have been ready: restarts are forks, losses are those of an undisturbed run."""
    steady = Run(tmp_path / "steady", tiny_config(corpus, steps=260))
    steady.launch()
    kills = [{"kind": "sigkill", "steps": [step, step]} for step in (230, 240, 250)]
    slow = {"kind": "slow", "steps": [100, 220], "factor": 0.06, "once": False}  # time to warm up
    launch = {"threads": 1, "standby": True}
    run = Run(tmp_path / "run", tiny_config(corpus, steps=260, faults=[slow, *kills], launch=launch))
    run.launch()

    assert [attempt["cause"] for attempt in run.attempts()] == ["killed", "killed", "killed", "finished"]
    with closing(Journal.read_only(run.paths.database)) as journal:
        totals = json.loads(journal.meta("totals") or "")
    forks = [value for name, value in totals.items() if "attempt_starts_total" in name and "standby" in name]
    assert forks
    assert forks[0] >= 1
    assert {step: row["loss"] for step, row in run.surviving_steps().items()} == {
        step: row["loss"] for step, row in steady.surviving_steps().items()
    }
