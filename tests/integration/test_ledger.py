"""The ledger of real runs: crashes, rollbacks, skips and quarantines leave every sample read once or accounted for.

What is exported from such a run is what it ended with.
"""

import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.cli.app import run as longwatch
from orchestrator.journal import Journal
from tests.integration.test_training_faults import _policy as scaled_policy
from tests.runs import Run, tiny_config, wait_until
from trainer.contract.config import RunConfig
from trainer.data.stream import validation_batches
from trainer.model import GPT

pytestmark = pytest.mark.training


def _is_sound(run: Run) -> bool:
    """What `longwatch ledger --check` says, and that it is about every surviving step that the records tell of."""
    said = run.cli("ledger", "--check")
    return bool(said["ok"] and said["steps"] == len(run.surviving_steps()))


def test_crashes_rollback_and_skip_are_accounted_for(tmp_path: Path, corpus: Path) -> None:
    """Killed, then diverged: what was skipped was read at the end, and `--check` says when a step is missing."""
    faults: list[dict[str, Any]] = [
        {"kind": "sigkill", "steps": [33, 33]},
        {"kind": "lr_bomb", "steps": [80, 83], "factor": 300.0},
    ]
    run = Run(tmp_path, tiny_config(corpus, steps=180, faults=faults), scaled_policy())

    run.launch()

    assert _is_sound(run)
    incident = run.incident("unrecovered_spike")
    found = run.cli("ledger")
    (skip,) = found["skipped"]
    assert (skip["incident"], skip["class"]) == (incident["id"], "unrecovered_spike")
    assert skip["passed"] == skip["read_since"] == skip["end"] - skip["begin"] == 12 * 8
    kept, lost = (
        sum(one["samples"] for one in found["stretches"] if one["survives"] is fate) for fate in (True, False)
    )
    assert kept == 180 * 8
    assert lost == 8 * sum(one["cost"]["steps"] for one in run.incidents()) > 0
    late = run.cli("ledger", "--sample-range", f"{skip['begin']}:{skip['end']}")["reads"]
    assert min(read["step"] for read in late if read["survives"]) > 160
    _damage_is_noticed(run)
    _the_weights_can_be_used_elsewhere(run, tmp_path / "weights" / "w.safetensors")


def _damage_is_noticed(run: Run) -> None:
    """Without one step the check fails; the run is left as it was."""
    with closing(Journal.open(run.paths.database)) as journal:
        (row,) = journal.select("DELETE FROM steps WHERE step = 140 RETURNING *")
        assert longwatch(["ledger", str(run.paths.root), "--check"]) == 1
        list(journal.select(f"INSERT INTO steps VALUES ({', '.join('?' * len(row))})", *row))


def _the_weights_can_be_used_elsewhere(run: Run, out: Path) -> None:
    """Filled with the exported file, a model has the validation loss that the run reported last."""
    for dtype in ("as-is", "bf16"):
        arguments = ["--out", str(out), "--dtype", dtype, "--force"]
        assert longwatch(["checkpoints", "export", "180", str(run.paths.root), *arguments]) == 0
        model = GPT(RunConfig.model_validate(run.config).model, 64, 32)
        missing = model.load_state_dict(load_file(out), strict=False)
        assert (missing.missing_keys, missing.unexpected_keys) == (["head.weight"], [])
        close = 1e-5 if dtype == "as-is" else 2e-2
        assert _validation_loss(run, model) == pytest.approx(run.records(3, "eval")[-1]["loss"], abs=close)


def _validation_loss(run: Run, model: GPT) -> float:
    data = RunConfig.model_validate(run.config).data
    rows = [torch.from_numpy(batch) for batch in validation_batches(data, 32, 16, 16)]
    tokens = torch.cat(rows)
    with torch.no_grad():
        logits = model.logits(tokens[:, :-1])
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def test_a_quarantine_in_place_is_accounted_for(tmp_path: Path, corpus: Path) -> None:
    """A shard that is left out from the middle of an attempt on, and no gap where it would have been."""
    faults = [{"kind": "bad_shard", "shard": 5, "once": False}]
    run = Run(tmp_path, tiny_config(corpus, steps=300, faults=faults), scaled_policy())

    run.launch()

    assert _is_sound(run)
    (out,) = run.cli("ledger")["quarantined"]
    assert (out["shard"], out["class"]) == ("shard-005.bin", "repeated_spikes_by_shards")
    of_it = run.cli("ledger", "--shard", "shard-005.bin")["reads"]
    assert of_it
    assert all(read["positions"][0] <= run.records(1, "plan_applied")[0]["position"] for read in of_it)


def test_a_living_run_can_be_looked_at_and_verified(tmp_path: Path, corpus: Path) -> None:
    """Beside a running trainer, and after its supervisor was killed and another took over: sound at every look."""
    slow = [{"kind": "slow", "factor": 0.01, "once": False}]
    run = Run(tmp_path, tiny_config(corpus, steps=300, faults=slow))
    process = run.start()
    wait_until(lambda: len(run.records(1, "commit")) > 3, "checkpoints")

    assert run.cli("ledger", "--check")["ok"]
    assert run.cli("checkpoints", "verify", "0")["verified"][0]["ok"]
    verify = [sys.executable, "-m", "orchestrator.cli", "checkpoints", "verify", "--all", str(run.paths.root)]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run.launch()

    assert _is_sound(run)
    assert len(run.attempts()) == 1
    rows = run.cli("checkpoints")["checkpoints"]
    assert rows[0]["verified"]
    assert all(row["committed_at_s"] for row in rows)
