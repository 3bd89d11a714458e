"""`python -m trainer` as a process: killed, asked to leave, fed bad data. Few, because each start takes seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.keepers import keepers
from tests.trainer.attempts import DEADLINE_S, SAVING, VOCAB, TinyRun
from trainer.checkpoint import load_checkpoint
from trainer.contract.exit_codes import ExitCode
from trainer.contract.fence import commits_present

pytestmark = pytest.mark.training


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Poll while the process lives, up to the deadline."""
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, "the process ended first"
        assert time.monotonic() < end_s, "not in time"
        time.sleep(0.02)


def steps_of(run: TinyRun, attempt: int) -> int:
    """Step records so far."""
    path = run.paths.records(attempt)
    return path.read_text().count('"kind":"step"') if path.exists() else 0


def test_killed_and_resumed_equals_undisturbed(tmp_path: Path) -> None:
    """SIGKILL at two steps, each time resumed from the newest commit: same losses, same final bits (fp32, CPU)."""
    whole = TinyRun(tmp_path / "whole")
    assert whole.finish() == ExitCode.FINISHED
    kills = [{"kind": "sigkill", "steps": [step, step]} for step in (6, 11)]
    killed = TinyRun(tmp_path / "killed", {"faults": kills})
    assert [killed.finish(attempt) for attempt in (1, 2, 3)] == [-signal.SIGKILL, -signal.SIGKILL, ExitCode.FINISHED]
    assert killed.fault_counts() == {"0-sigkill": 1, "1-sigkill": 1}
    assert killed.losses(1, 2, 3) == whole.losses(1)
    one = load_checkpoint(whole.store, commits_present(whole.store)[-1]).tensors
    two = load_checkpoint(killed.store, commits_present(killed.store)[-1]).tensors
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_sigterm_saves_and_sigusr2_tells_stacks(tmp_path: Path) -> None:
    """A preempted attempt commits its last step and exits 75; stacks were written on request before."""
    run = TinyRun(tmp_path, {"steps": 100_000, "checkpoint": {**SAVING, "every_steps": 100_000}})
    with keepers(run.paths, run.config):
        process = run.spawn()
        try:
            wait_until(lambda: steps_of(run, 1) >= 3, process)
            process.send_signal(signal.SIGUSR2)
            wait_until(lambda: run.paths.stacks(1).stat().st_size > 0, process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == ExitCode.PREEMPTED
        finally:
            process.kill()
            process.wait()
    last = run.records(1, "step")[-1]["step"]
    assert [row["step"] for row in run.records(1, "commit")] == [0, last]
    assert run.records(1, "finished")[0]["reason"] == "preempted"
    assert "File" in run.paths.stacks(1).read_text()


def test_an_orphan_saves_and_leaves(tmp_path: Path) -> None:
    """Parent gone and nobody on the socket: after the bounded time it commits and exits by itself."""
    saving = {**SAVING, "every_steps": 1_000_000}
    run = TinyRun(tmp_path, {"steps": 1_000_000, "deadlines": {"orphan_s": 0.2}, "checkpoint": saving})
    run.plan(1)
    arguments = [sys.executable, "-m", "trainer", "--run-dir", str(run.paths.root), "--attempt", "1"]
    starter = f"import subprocess; print(subprocess.Popen({arguments!r}, stderr=subprocess.DEVNULL).pid)"
    parent = f"{starter}\nimport pathlib, time\n" + (
        f"records = pathlib.Path({str(run.paths.records(1))!r})\n"
        'while not (records.exists() and \'"kind":"step"\' in records.read_text()): time.sleep(0.05)'
    )
    with keepers(run.paths, run.config):
        done = subprocess.run([sys.executable, "-c", parent], stdout=subprocess.PIPE, timeout=DEADLINE_S, check=True)
        pid = int(done.stdout.split()[0])
        end_s = time.monotonic() + DEADLINE_S
        try:
            while not run.paths.exit_file(1).exists():
                assert time.monotonic() < end_s
                time.sleep(0.05)
        finally:
            if not run.paths.exit_file(1).exists():
                os.kill(pid, signal.SIGKILL)
    assert run.exit_file(1)["code"] == ExitCode.ORPHANED
    assert commits_present(run.store)[-1].startswith(f"{run.records(1, 'step')[-1]['step']:012d}")


def test_a_supervisor_that_died_releases_nothing(tmp_path: Path) -> None:
    """End of file on the release pipe: the process leaves at once and has touched nothing."""
    run = TinyRun(tmp_path)
    run.plan(1)
    reading, writing = os.pipe()
    os.close(writing)
    command = [sys.executable, "-m", "trainer", "--run-dir", str(run.paths.root), "--attempt", "1"]
    environment = {**os.environ, "LONGWATCH_RELEASE_FD": str(reading)}
    done = subprocess.run(command, env=environment, pass_fds=(reading,), timeout=DEADLINE_S, check=False)
    os.close(reading)
    assert done.returncode == ExitCode.LEFT
    assert not run.paths.records(1).exists()


def test_missing_data_ends_with_its_own_code(tmp_path: Path) -> None:
    """A shard that is not there: 65, an error record that names it, and no step."""
    run = TinyRun(tmp_path)
    for shard in (tmp_path / "corpus").iterdir():
        shard.unlink()
    assert run.run() == ExitCode.DATA
    (error,) = run.records(1, "error")
    assert str(tmp_path / "corpus") in error["message"]
    assert json.loads(run.paths.exit_file(1).read_text())["error"]["type"] == error["type"]


def test_a_token_outside_the_vocabulary_ends_the_attempt_and_loses_nothing(tmp_path: Path) -> None:
    """Found when it is read: 65, the shard is named, and what was trained before is committed."""
    run = TinyRun(tmp_path, {"steps": 200, "checkpoint": {**SAVING, "every_steps": 1000}})
    shard = tmp_path / "corpus" / "shard-2.bin"
    raw = bytearray(shard.read_bytes())
    raw[-1000:-998] = (VOCAB + 5).to_bytes(2, "little")
    shard.write_bytes(raw)
    assert run.run() == ExitCode.DATA
    (error,) = run.records(1, "error")
    assert "shard-2.bin" in error["message"]
    trained = run.records(1, "step")[-1]["step"]
    assert trained > 0
    assert [row["step"] for row in run.records(1, "commit")] == [0, trained]
