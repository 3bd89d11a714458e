"""The prevention ladder in whole runs: a spike that does not happen, and a band that gives in."""

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orchestrator.journal import Journal
from tests.runs import Run, tiny_config

pytestmark = pytest.mark.training

_POLICY = {"version": 1, "detect": {"window_rows": 48}}
_RUNG = {"skip_update": {"window_steps": 64, "min_steps": 32}}
_BOMB = {"kind": "grad_bomb", "steps": [100, 107], "factor": 10.0}
_FAST = {"peak_lr": 6e-3}  # so that eight clipped updates do damage
_CHECKPOINT = {"every_steps": 50, "good_after_steps": 10, "patience_s": 30, "keep_local": 50}


def _run(root: Path, corpus: Path, steps: int, fault: dict[str, Any], **changes: Any) -> Run:
    config = tiny_config(corpus, steps=steps, faults=[fault], checkpoint=_CHECKPOINT, **changes)
    run = Run(root, config, _POLICY)
    run.launch()
    return run


def _totals(run: Run) -> dict[str, float]:
    """The counters as the supervisor has kept them."""
    with closing(Journal.read_only(run.paths.database)) as journal:
        found: dict[str, float] = json.loads(journal.meta("totals") or "{}")
    return found


def _mean(run: Run, first: int, last: int) -> float:
    rows = run.surviving_steps()
    return math.fsum(rows[step]["loss"] for step in range(first, last + 1)) / (last - first + 1)


def test_the_skip_rung_prevents_the_spike_that_happens_without_it(tmp_path: Path, corpus: Path) -> None:
    """Eight gradients uphill, clipped as always: a spike. Left out: none, and record, metric and logbook say so."""
    without = _run(tmp_path / "without", corpus, 136, _BOMB, optimizer=_FAST)
    guarded = _run(tmp_path / "guarded", corpus, 136, _BOMB, optimizer=_FAST, prevention=_RUNG)

    assert without.fault_counts() == guarded.fault_counts()
    assert _mean(without, 105, 114) > _mean(without, 90, 99) + 0.5
    assert 100 < without.incident("transient_spike")["onset_step"] <= 110
    assert _totals(without).get("prevention_total{skip_norm}", 0) == 0

    assert _mean(guarded, 105, 114) < _mean(guarded, 90, 99) + 0.1
    skipped = {step: row for step, row in guarded.surviving_steps().items() if row["skipped"]}
    assert set(range(100, 108)) <= skipped.keys()
    assert all(row["prevention"]["skipped"] == "norm" for row in skipped.values())
    assert all(row["grad_norm"] > row["prevention"]["norm_limit"] for row in skipped.values())
    assert _totals(guarded)["prevention_total{skip_norm}"] == _totals(guarded)["skipped_steps_total{}"] == len(skipped)
    told = guarded.incident("repeated_spikes_by_state")
    assert (told["onset_step"], told["decision"]) == (100, ["record", "notify"])
    assert "3 in a row" in told["why"]
    assert not {i["class"] for i in guarded.incidents()} & {"transient_spike", "unrecovered_spike", "sudden_nan"}


def test_a_norm_that_has_another_level_for_good_does_not_stop_training(tmp_path: Path, corpus: Path) -> None:
    """Gradients of the right direction, ten times as long from step 60 on: ten are skipped, then applied, and told."""
    fault = {"kind": "grad_bomb", "steps": [60, 110], "factor": -10.0, "once": False}
    run = _run(tmp_path, corpus, 110, fault, prevention=_RUNG)

    rows = run.surviving_steps()
    assert [step for step, row in rows.items() if row["skipped"]] == list(range(60, 70))
    assert [step for step, row in rows.items() if row["prevention"] and row["prevention"]["gave_in"]] == [70]
    assert _mean(run, 101, 110) < _mean(run, 50, 59)
    assert _totals(run)["prevention_total{gave_in}"] == 1
    first, second = (i for i in run.incidents() if i["class"] == "repeated_spikes_by_state")
    assert "3 in a row" in first["why"]
    assert second["detected_step"] == 70
    assert "given up after 10" in second["why"]
    assert len(run.attempts()) == 1
