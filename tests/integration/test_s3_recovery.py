"""One whole recovery with the store on a real S3 server: kill, divergence, rollback, skip, lowered LR, finish."""

from pathlib import Path

import pytest

from orchestrator.recovery.catalog import list_checkpoints, verify
from tests.runs import Run, tiny_config
from tests.s3 import ACCESS_KEY, KEY_ENV, SECRET_ENV, SECRET_KEY, seaweedfs
from trainer.contract.config import StoreConfig
from trainer.contract.store import open_store

pytestmark = pytest.mark.training

_POLICY = {
    "version": 1,
    "detect": {"recover_steps": 10, "recover_steps_max": 20},
    "guards": {"max_skipped_share": 0.5, "max_discarded_share": 1.0, "relapse_steps": 60},
    "rules": [
        {
            "on": "unrecovered_spike",
            "when": {"validation_confirms": True},
            "ladder": [
                {
                    "roll_back": {"margin_steps": 10},
                    "skip_data": "12 batches",
                    "lower_lr": {"factor": 0.5, "hold_steps": 15, "ramp_steps": 20},
                },
                {"halt": {}},
            ],
        }
    ],
}


def test_whole_recovery_on_a_real_s3_server(tmp_path: Path, corpus: Path) -> None:
    """Every checkpoint, verdict and fence goes through SeaweedFS; what is left there verifies to the last byte."""
    faults = [
        {"kind": "sigkill", "steps": [33, 33]},
        {"kind": "lr_bomb", "steps": [80, 83], "factor": 300.0},
    ]
    with seaweedfs(tmp_path / "s3") as server:
        store = server.config().model_dump(mode="json")
        config = tiny_config(corpus, steps=150, faults=faults, store=store)
        secrets = {KEY_ENV: ACCESS_KEY, SECRET_ENV: SECRET_KEY}
        run = Run(tmp_path / "run", config, _POLICY, environment=secrets)

        run.launch()

        assert [attempt["cause"] for attempt in run.attempts()] == ["killed", "left", "finished"]
        incident = run.incident("unrecovered_spike")
        assert incident["outcome"] == "worked"
        assert incident["target_step"] <= incident["onset_step"] - 10
        opened = open_store(StoreConfig.model_validate(store), tmp_path, str(config["name"]), secrets)
        checkpoints = [c for c in list_checkpoints(opened) if c.in_lineage]
        assert checkpoints[-1].step == 150
        assert any(c.state == "good" for c in checkpoints)
        assert all(verify(opened, c.id).ok for c in checkpoints)
        opened.close()
