"""`longwatch doctor`: what it says of this machine, of GPUs by their tool's answers, of a run's store and port."""

import json
import os
import socket
from pathlib import Path

import pytest

from orchestrator.cli.app import run
from orchestrator.config import resolve
from orchestrator.doctor.disk import examine_disk
from orchestrator.doctor.gpu import examine_gpus, read_gpus
from orchestrator.doctor.machine import cpu_quota, examine_machine, memory_limit
from orchestrator.doctor.store import examine_store
from orchestrator.findings import Finding
from tests import s3
from tests.runs import tiny_config, write_corpus


@pytest.mark.parametrize(
    ("text", "cores"), [("200000 100000\n", 2.0), ("50000 100000", 0.5), ("max 100000", None), (None, None), ("", None)]
)
def test_cores_of_a_cgroup(text: str | None, cores: float | None) -> None:
    """As the kernel writes them; no file is no limit."""
    assert cpu_quota(text) == cores


@pytest.mark.parametrize(
    ("text", "limit"), [("1073741824\n", 1 << 30), ("max\n", None), ("9223372036854771712", None), (None, None)]
)
def test_memory_of_a_cgroup(text: str | None, limit: int | None) -> None:
    """Version 1 writes no limit as a number near 2^63."""
    assert memory_limit(text) == limit


_HEALTHY = "0, NVIDIA H200, 4, 143771, 0, [N/A], No, No, 31, P0\n"


@pytest.mark.parametrize(
    ("answer", "verdict", "remedy"),
    [
        (_HEALTHY, "pass", ""),
        ("0, NVIDIA A100, 4, 81920, 3, No, No, No, 31, P0\n", "fail", "uncorrected"),
        ("0, NVIDIA A100, 4, 81920, 0, No, No, Yes, 31, P0\n", "fail", "replaced"),
        ("0, NVIDIA A100, 4, 81920, 0, No, Yes, No, 31, P0\n", "warn", "reset"),
        ("0, NVIDIA A100, 4, 81920, 0, Yes, No, No, 31, P0\n", "warn", "reset"),
        ("0, NVIDIA A100, 40000, 81920, 0, No, No, No, 31, P0\n", "warn", "holds memory"),
        ("0, NVIDIA A100, 4, 81920, 0, No, No, No, 92, P0\n", "warn", "cooling"),
        ("0, GeForce, 4, 81920, [N/A], [N/A], [N/A], [N/A], 40, P0\n", "pass", ""),
    ],
)
def test_a_gpu_by_its_tools_answer(answer: str, verdict: str, remedy: str) -> None:
    """What a device does not have is no fault of it."""
    (found,) = read_gpus(answer)
    assert (found.verdict, remedy in found.remedy, found.name) == (verdict, True, "gpu 0")


def test_every_gpu_is_told() -> None:
    """One line each."""
    assert [one.name for one in read_gpus(_HEALTHY + _HEALTHY.replace("0,", "1,", 1))] == ["gpu 0", "gpu 1"]


def test_a_driver_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool's own words."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed: driver not loaded'; exit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (found,) = examine_gpus()
    assert found.verdict == "fail"
    assert "driver not loaded" in found.seen


def test_this_machine_can_be_looked_at() -> None:
    """Nothing here may keep the tests from running, and what is missing has a remedy."""
    found = examine_machine()
    assert [one for one in found if one.verdict == "fail"] == []
    assert all(one.remedy for one in found if one.verdict != "pass")
    assert {"torch", "processors", "memory", "clock", "open files", "process handles"} <= {one.name for one in found}


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    """The size of a checkpoint becomes seconds."""
    found = {one.name: one for one in examine_disk(tmp_path, 10**9)}
    assert found["file system"].verdict == "pass"
    assert "checkpoint of 1.00 GB takes" in found["checkpoint speed"].seen
    assert "ms" in found["journal speed"].seen
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    """A real S3 server, one that ignores conditional writes not among them; afterwards nothing is there."""
    with s3.seaweedfs(tmp_path / "weed") as server:
        config = tiny_config(write_corpus(tmp_path / "corpus"), store=server.config().model_dump(mode="json"))
        (tmp_path / "run.yaml").write_text(json.dumps(config))
        found = examine_store(resolve(tmp_path / "run.yaml", ()))
        assert [(one.name, one.verdict) for one in found][:2] == [("store", "pass"), ("store calls", "pass")]
        assert "up" in found[2].seen
        listed = s3.client(server.endpoint_url).list_objects_v2(Bucket=server.bucket)
        assert listed.get("Contents", []) == []


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    """The same words as from `launch`."""
    store = {"url": "s3://nowhere", "endpoint_url": "http://127.0.0.1:9", "timeout_s": 2}
    (tmp_path / "run.yaml").write_text(json.dumps(tiny_config(tmp_path / "corpus", store=store)))
    (found,) = examine_store(resolve(tmp_path / "run.yaml", ()))
    assert found.verdict == "fail"
    assert "s3://nowhere" in found.seen


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's port that somebody has fails it; JSON holds the same findings; nothing is left behind."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        metrics = {"port": taken.getsockname()[1]}
        (tmp_path / "run.yaml").write_text(json.dumps(tiny_config(tmp_path / "corpus", metrics=metrics)))
        code = run(["doctor", str(tmp_path / "run.yaml"), "--json"])
    findings = [Finding(**one) for one in json.loads(capsys.readouterr().out)["findings"]]
    assert code == 1
    assert [one.name for one in findings if one.verdict == "fail"] == ["metrics port"]
    assert not (tmp_path / "store" / "tiny-doctor").exists()
    assert run(["doctor"]) == 0
    assert "passed" in capsys.readouterr().out.splitlines()[-1]
