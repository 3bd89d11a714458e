"""The warm process: what it forks is like any other attempt, and without it everything goes on, only slower."""

import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.process.child import Child, ExitStatus, SpawnSpec, become_subreaper, identify, session_members, spawn
from orchestrator.process.lock import holders, is_free
from orchestrator.process.standby import Standby
from tests.runs import wait_until
from trainer.contract.paths import RunPaths


@pytest.fixture(name="paths")
def _paths(tmp_path: Path) -> RunPaths:
    """An empty run directory: attempts of it fail at once, for lack of a run.yaml."""
    paths = RunPaths(tmp_path / "run")
    paths.create()
    return paths


@pytest.fixture(name="spec")
def _spec(paths: RunPaths) -> SpawnSpec:
    """The first attempt."""
    return SpawnSpec(paths, 1)


@pytest.fixture(name="standby")
def _standby(paths: RunPaths, spec: SpawnSpec) -> Iterator[Standby]:
    """One that has warmed up."""
    become_subreaper()
    standby = Standby(spec.environment(), paths.standby_output)
    standby.keep(time.monotonic())
    wait_until(standby.is_ready, "the standby")
    yield standby
    standby.stop()


def _end(child: Child) -> ExitStatus:
    poller = select.poll()
    poller.register(child.pidfd, select.POLLIN)
    assert poller.poll(60_000), "not dead after a minute"
    status = child.reap()
    child.close()
    return status


def test_a_fork_is_an_attempt_like_any_other(spec: SpawnSpec, standby: Standby) -> None:
    """Our own child in its own session, with the lock, blocked until it is released; its end is known exactly."""
    assert standby.pid is not None
    assert len(os.listdir(f"/proc/{standby.pid}/task")) == 1, "threads do not survive a fork"
    child = spawn(spec, standby)
    assert not child.is_cold
    assert list(session_members(child.identity.pid)) == [child.identity.pid]
    assert child.identity.pid in set(holders(spec.paths.child_lock))
    assert standby.pid not in set(holders(spec.paths.child_lock))
    status = Path(f"/proc/{child.identity.pid}/status").read_text()
    assert f"PPid:\t{os.getpid()}\n" in status
    assert not spec.paths.liveness(1).exists(), "it did something before it was released"
    held = [os.readlink(entry) for entry in Path(f"/proc/{child.identity.pid}/fd").iterdir()]
    assert not [name for name in held if name.startswith("socket:")], "it holds the standby's line to the supervisor"
    child.release()
    assert _end(child) == ExitStatus(code=2)  # there is no run.yaml
    assert "run.yaml" in spec.paths.exit_file(1).read_text()
    assert is_free(spec.paths.child_lock)


def test_killed_and_never_released(spec: SpawnSpec, standby: Standby) -> None:
    """A signal is told from a code, and a supervisor that dies before it releases leaves nothing behind."""
    child = spawn(spec, standby)
    child.send(signal.SIGKILL)
    assert _end(child) == ExitStatus(signum=signal.SIGKILL)
    second = spawn(replace(spec, attempt=2), standby)
    pidfd = os.dup(second.pidfd)
    second.close()
    assert select.select([pidfd], [], [], 20)[0]
    os.close(pidfd)
    assert not spec.paths.liveness(2).exists()


def test_without_it_the_start_is_cold(spec: SpawnSpec, standby: Standby) -> None:
    """Dead, not warm yet, or silent: at any doubt a new process is started, and the dead one is replaced later."""
    assert standby.pid is not None
    os.kill(standby.pid, signal.SIGKILL)
    os.waitid(os.P_PID, standby.pid, os.WEXITED | os.WNOWAIT)
    child = spawn(spec, standby)
    assert child.is_cold
    child.send(signal.SIGKILL)
    _end(child)
    assert standby.pid is None
    standby.keep(time.monotonic())
    assert standby.pid is not None
    assert not standby.is_ready(), "it has only just begun to warm up"


def test_changed_code_is_not_run_from_memory(spec: SpawnSpec, standby: Standby) -> None:
    """A file of ours that was touched since it was loaded makes the standby stale: the next attempt starts cold."""
    module = Path(__file__).parents[2] / "trainer" / "schedule.py"
    before = module.stat()
    os.utime(module, ns=(before.st_atime_ns, time.time_ns() + 10**9))
    try:
        child = spawn(spec, standby)
    finally:
        os.utime(module, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert child.is_cold
    child.send(signal.SIGKILL)
    _end(child)


def test_it_leaves_with_its_supervisor(standby: Standby) -> None:
    """Its socket closes, however the supervisor ends."""
    pid = standby.pid
    assert pid is not None
    pidfd = os.pidfd_open(pid)
    assert standby._channel is not None
    standby._channel.close()
    assert select.select([pidfd], [], [], 20)[0]
    os.close(pidfd)
    assert identify(pid) is not None  # dead, and still ours to reap
