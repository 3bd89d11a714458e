"""`longwatch drill` on a real tiny run: everything passes, nothing is left; and what does not pass is said."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.drill.checks import Facts, judge
from orchestrator.findings import Finding
from orchestrator.goodput import expected_goodput, interval_s
from tests.runs import Run, tiny_config

pytestmark = pytest.mark.training


@pytest.mark.long
def test_a_sound_set_up_passes_and_nothing_is_left(tmp_path: Path, corpus: Path) -> None:
    """Killed, damaged, diverged: each check on the user's own run.yaml, whose own run is not touched."""
    run = Run(tmp_path, tiny_config(corpus, steps=1_000_000))
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "drill", str(run.file), "--json"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    findings = json.loads(done.stdout)["findings"]
    assert [one["name"] for one in findings if one["verdict"] == "fail"] == [], findings
    assert done.returncode == 0
    assert len(findings) == 10
    assert not list((tmp_path / "runs").glob("*")), "the drill's run directory is left"
    assert not list((tmp_path / "store").glob("*")), "the drill's checkpoints are left"


def _facts() -> Facts:
    """Of a drill in which everything was as it should be."""

    def row(attempt: int, step: int, lr: float = 1e-3) -> dict[str, Any]:
        record = {"lr": lr, "lr_planned": lr, "step_time_s": {"compute": 0.1}}
        return {"attempt": attempt, "step": step, "loss": 2.0 + 1 / step, "at_s": 100.0 + step, "record": record}

    lowered = [row(4, step, 5e-4 if step <= 116 else 1e-3) for step in range(81, 161)]
    spike = {
        "class": "unrecovered_spike",
        "onset_step": 91,
        "detected_step": 101,
        "target_step": 80,
        "outcome": "worked",
    }
    attempts = [
        {"cause": "killed", "started_step": 0, "ended_at_s": 133.0}, {"cause": "finished", "started_step": 30},
        {"cause": "left", "started_step": 50}, {"cause": "finished", "started_step": 80},
    ]  # fmt: skip
    steps = [*(row(1, n) for n in range(1, 34)), *(row(2, n) for n in range(31, 61)), *lowered]
    return Facts((0, 0), attempts, [spike], steps, [0.01] * 9, None, [], 86_400.0)


def _failed(**changes: Any) -> list[Finding]:
    return [one for one in judge(dataclasses.replace(_facts(), **changes)) if one.verdict != "pass"]


def test_the_model_of_a_sound_drill_passes() -> None:
    """Or the next test would say nothing."""
    assert _failed() == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"codes": (0, 3)}, "both parts came to their end"),
        ({"stalls_s": []}, "saves hold training up"),
        ({"stalls_s": [2.0] * 3}, "saves hold training up"),
        ({"damaged": ["000000000160-e4-4: crc"]}, "checkpoints verify to the last byte"),
        ({"attempts": [{"cause": "finished", "started_step": 0, "ended_at_s": 1.0}]}, "killed at once"),
        ({"incidents": []}, "a planted divergence is rolled back"),
        ({"ledger": "step 7 survives twice"}, "every sample is read once"),
    ],
)
def test_what_is_wrong_is_named_with_a_remedy(changes: dict[str, Any], name: str) -> None:
    """Each fact by itself."""
    found = _failed(**changes)
    assert any(one.name.startswith(name) and one.remedy for one in found), found


def test_other_losses_and_rates_are_seen() -> None:
    """A little apart is a warning, far apart a failure; a rate that is not the planned one is a failure."""
    for share, verdict in ((1e-4, "warn"), (0.1, "fail")):
        steps = [{**row, "loss": row["loss"] * (1 + share if row["attempt"] == 2 else 1)} for row in _facts().steps]
        (found,) = _failed(steps=steps)
        assert (found.name, found.verdict) == ("steps run again give the same losses", verdict)
    steps = _facts().steps
    steps[-60] = {**steps[-60], "record": {**steps[-60]["record"], "lr": 1e-3}}
    assert [one.name for one in _failed(steps=steps)] == ["the learning rate is lowered, and restored"]


def test_goodput_is_dalys() -> None:
    """The figures of the literature: a failure every 3.09 h, a stall of 2 s, a restart of 120 s, a save every 211 s."""
    mean_s = 3.09 * 3600
    assert interval_s(2.0, mean_s) == pytest.approx(211, abs=1)
    assert expected_goodput(2.0, 120.0, mean_s, 211.0) == pytest.approx(0.971, abs=0.001)
    assert expected_goodput(2.0, 120.0, mean_s, 600.0) == pytest.approx(0.960, abs=0.001)
