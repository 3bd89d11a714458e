"""From a run to a telephone: real runs, a real Prometheus and Alertmanager, a webhook."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.deploy.monitoring import Webhook, alertmanager, prometheus, until
from tests.deploy.tools import tool
from tests.integration.test_training_faults import _policy
from tests.runs import Run, tiny_config, write_corpus
from tests.s3 import free_ports

pytestmark = pytest.mark.long


@pytest.fixture(name="webhook")
def _webhook() -> Iterator[Webhook]:
    with closing(Webhook()) as made:
        yield made


@pytest.fixture(name="target")
def _target() -> str:
    return f"127.0.0.1:{free_ports(1)[0]}"


def _port(target: str) -> dict[str, object]:
    return {"host": "127.0.0.1", "port": int(target.rpartition(":")[2])}


def test_a_run_that_halts_pages_once_and_is_resolved_when_it_goes_on(
    tmp_path: Path, webhook: Webhook, target: str
) -> None:
    """A divergence that comes back until the policy gives up: rollbacks wake nobody, the halt does, once."""
    tool("prometheus-alertmanager")
    faults = [{"kind": "lr_bomb", "steps": [80, 110], "factor": 300.0, "once": False}]
    config = tiny_config(write_corpus(tmp_path / "corpus"), steps=180, faults=faults, metrics=_port(target))
    config["checkpoint"]["every_steps"] = 65  # none within the divergence: whoever resumes goes on from before it
    run = Run(tmp_path, config, _policy())
    with (
        alertmanager(tmp_path / "alertmanager", webhook.url) as manager,
        prometheus(tmp_path / "prometheus", target, manager) as server,
    ):
        run.launch(expect=3)
        until(lambda: webhook.pages() != [], lambda: f"{server.firing()} {webhook.got}")
        assert webhook.pages() == [("firing", {"LongwatchHalted"})]
        assert {"LongwatchHalted", "LongwatchWatchdog"} <= server.firing()
        until(lambda: any(path == "/dead-man" for path, _ in webhook.got), lambda: f"{server.firing()} {webhook.got}")

        run.file.write_text(json.dumps({**run.config, "faults": []}))
        resume = [sys.executable, "-m", "orchestrator.cli", "resume", str(run.file), "--because", "the fault is gone"]
        done = subprocess.run(resume, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        until(lambda: len(webhook.pages()) > 1, lambda: f"{server.firing()} {webhook.got}")
        assert [status for status, _ in webhook.pages()] == ["firing", "resolved"]
        assert server.value('max_over_time(longwatch_state{state="finished"}[5m])') == 1.0


def test_counters_neither_jump_nor_lose_over_real_restarts(tmp_path: Path, target: str) -> None:
    """The trainer is killed, then its supervisor, then both: what Prometheus counted is what the records hold."""
    slow = {"kind": "slow", "steps": [1, 10**6], "factor": 0.02, "once": False}
    corpus = write_corpus(tmp_path / "corpus")
    run = Run(tmp_path, tiny_config(corpus, steps=700, faults=[slow], metrics=_port(target)))
    with prometheus(tmp_path / "prometheus", target) as server:
        process = run.start()

        def steps() -> float:
            return server.value("max_over_time(longwatch_steps_total[10m])") or 0.0

        until(lambda: steps() > 60, run.trainer_output)
        os.kill(int(run.attempts()[-1]["pid"]), signal.SIGKILL)
        until(lambda: steps() > 150 and len(run.attempts()) == 2, run.trainer_output)
        process.kill()
        process.communicate()
        process = run.start()
        until(lambda: steps() > 300, run.trainer_output)
        process.kill()
        process.communicate()
        os.kill(int(run.attempts()[-1]["pid"]), signal.SIGKILL)
        process = run.start()
        exposition = tmp_path / "metrics.txt"
        until(lambda: steps() > 400, run.trainer_output)
        exposition.write_bytes(_scraped(target))
        run.wait(process)
        done = sum(len(run.records(int(row["attempt"]), "step")) for row in run.attempts())
        assert steps() == done
        for counter in ("steps", "tokens", "attempts", "supervisor_starts", "evaluations"):
            assert server.value(f"resets(longwatch_{counter}_total[10m])") == 0.0, counter
        assert server.value("max_over_time(longwatch_supervisor_starts_total[10m])") == 3.0
    command = [tool("promtool"), "check", "metrics"]
    checked = subprocess.run(command, input=exposition.read_bytes(), capture_output=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def _scraped(target: str) -> bytes:
    with urllib.request.urlopen(f"http://{target}/metrics") as response:
        return bytes(response.read())
