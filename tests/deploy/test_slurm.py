"""The batch script under a real Slurm: warned, it saves and queues again, and the run goes on where it was."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.journal import Journal
from tests.deploy.slurm import slurm
from tests.deploy.tools import DEPLOY, tool
from tests.runs import tiny_config, write_corpus
from trainer.contract.paths import RunPaths

pytestmark = pytest.mark.long
_WITHIN_S = 240.0
_ROOT = DEPLOY.parent


def _until(condition: Callable[[], bool], tell: Callable[[], str]) -> None:
    deadline_s = time.monotonic() + _WITHIN_S
    while not condition():
        assert time.monotonic() < deadline_s, tell()
        time.sleep(0.2)


@pytest.mark.skipif(os.geteuid() != 0, reason="slurmd wants to be root")
def test_a_warned_job_saves_queues_again_and_goes_on(tmp_path: Path) -> None:
    """USR1 as Slurm sends it before the time limit; the second start finishes the run, and its code is 0."""
    for name in ("slurmctld", "slurmd", "munged", "sbatch"):
        tool(name)
    config = tiny_config(write_corpus(tmp_path / "corpus"), steps=400)
    config["faults"] = [{"kind": "slow", "steps": [20, 10**6], "factor": 0.05, "once": False}]
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    paths = RunPaths(tmp_path / "runs" / "tiny")
    with tempfile.TemporaryDirectory(prefix="lw-slurm-", dir="/tmp") as short, slurm(Path(short)) as cluster:

        def output() -> str:
            return "".join(path.read_text() for path in tmp_path.glob("*.out"))

        said = cluster.call(
            "sbatch", "--parsable", "--time=30", str(DEPLOY / "slurm" / "longwatch.sbatch"), "run.yaml",
            cwd=tmp_path, PYTHONPATH=str(_ROOT), LONGWATCH=tool("longwatch"),
        )  # fmt: skip
        job = said.strip()
        _until(lambda: _step(paths) >= 40, output)
        cluster.call("scancel", "--signal=USR1", "--batch", job)
        _until(lambda: "queues again (restart 1)" in output(), output)
        _until(lambda: "state=finished" in output(), output)
        _until(lambda: "COMPLETED" in cluster.call("scontrol", "show", "job", job), output)
        assert "Restarts=1" in cluster.call("scontrol", "show", "job", job)
    with closing(Journal.read_only(paths.database)) as journal:
        causes = [(row["cause"], row["started_step"] > 0) for row in journal.attempts()]
        assert causes == [("preempted", False), ("finished", True)]
        assert [row["step"] for row in journal.steps(surviving=True)] == list(range(1, 401))


def _step(paths: RunPaths) -> int:
    if not paths.database.exists():
        return 0
    with closing(Journal.read_only(paths.database)) as journal:
        return max((row["step"] for row in journal.steps()), default=0)
