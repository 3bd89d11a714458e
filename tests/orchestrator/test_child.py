"""Processes and locks on real processes: spawned blocked, known beyond doubt, ended with everything they started."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import ChildLockHeldError, RunHeldError, SpawnError
from orchestrator.process.child import Child, ExitStatus, SpawnSpec, adopt, identify, oom_kills, session_members, spawn
from orchestrator.process.lock import RunLock, holders, is_free, is_held, read_holder
from tests.runs import wait_until
from trainer.contract.paths import RunPaths

SLEEPER = ("sleep", "600")
GATED = "import os; print('gate', flush=True); print('open' if os.read(int(os.environ['LONGWATCH_RELEASE_FD']), 1) else 'dead', flush=True)"  # noqa: E501


@pytest.fixture(name="paths")
def _paths(tmp_path: Path) -> RunPaths:
    """An empty run directory."""
    paths = RunPaths(tmp_path / "run")
    paths.create()
    return paths


@contextmanager
def _spawned(paths: RunPaths, *command: str, attempt: int = 1, env: dict[str, str] | None = None) -> Iterator[Child]:
    """A child that is killed and reaped at the end."""
    child = spawn(SpawnSpec(paths, attempt, command, env or {}))
    try:
        yield child
    finally:
        child.kill_all()
        _wait_dead(child)
        child.reap()
        child.close()


def _wait_dead(child: Child) -> None:
    poller = select.poll()
    poller.register(child.pidfd, select.POLLIN)
    assert poller.poll(20_000), "not dead after 20 s"


def test_a_child_runs_only_when_it_is_released(paths: RunPaths) -> None:
    """It waits on the pipe, however long, and its output goes to the attempt's file."""
    with _spawned(paths, sys.executable, "-c", GATED) as child:
        wait_until(lambda: paths.output(1).read_text() == "gate\n", "the child at its gate")
        child.release()
        _wait_dead(child)
        assert paths.output(1).read_text() == "gate\nopen\n"
        assert child.reap() == ExitStatus(code=0)


def test_a_child_that_is_never_released_sees_it(paths: RunPaths) -> None:
    """The supervisor's end of the pipe closes with the supervisor."""
    child = spawn(SpawnSpec(paths, 1, (sys.executable, "-c", GATED)))
    pidfd = os.dup(child.pidfd)
    child.close()
    assert select.select([pidfd], [], [], 20)[0]
    os.close(pidfd)
    child.reap()
    assert paths.output(1).read_text().endswith("dead\n")


def test_contract_and_secrets_are_in_the_environment_not_in_the_arguments(paths: RunPaths) -> None:
    """Command lines can be read by everybody on the machine; placeholders are filled in."""
    show = "import os,sys; print(os.environ['TOKEN'], os.environ['LONGWATCH_ATTEMPT'], sys.argv[1:], flush=True)"
    with _spawned(
        paths, sys.executable, "-c", show, "{run_dir}", "a{attempt}", attempt=3, env={"TOKEN": "canary"}
    ) as child:
        arguments = Path(f"/proc/{child.identity.pid}/cmdline").read_bytes()
        _wait_dead(child)
        assert paths.output(3).read_text() == f"canary 3 {[str(paths.root), 'a3']}\n"
        assert b"canary" not in arguments


def test_our_own_trainer_is_the_default(paths: RunPaths) -> None:
    """python -m trainer, in the interpreter of the supervisor."""
    argv = SpawnSpec(paths, 7).argv()
    assert argv == [sys.executable, "-m", "trainer", "--run-dir", str(paths.root), "--attempt", "7"]


def test_a_command_that_does_not_exist_is_named(paths: RunPaths) -> None:
    """And the lock is free again."""
    with pytest.raises(SpawnError, match=r"no-such-trainer.*launch\.command"):
        spawn(SpawnSpec(paths, 1, ("no-such-trainer",)))
    assert is_free(paths.child_lock)


def test_the_signal_that_ended_it_is_known(paths: RunPaths) -> None:
    """Its own session is left to it alone: signals to ours don't reach it."""
    with _spawned(paths, *SLEEPER) as child:
        assert os.getsid(child.identity.pid) == child.identity.pid
        child.send(signal.SIGTERM)
        _wait_dead(child)
        assert child.reap() == ExitStatus(signum=signal.SIGTERM)
        assert child.sent == {signal.SIGTERM}


def test_the_lock_is_held_until_the_last_descendant_is_gone(paths: RunPaths) -> None:
    """A grandchild in a session of its own keeps a second trainer from being started, and is found and killed."""
    code = (
        "import os, subprocess; fd = int(os.environ['LONGWATCH_LOCK_FD']);"
        "subprocess.Popen(['sleep', '600'], pass_fds=(fd,), start_new_session=True); print('x', flush=True)"
    )
    with _spawned(paths, sys.executable, "-c", code) as child:
        _wait_dead(child)
        assert not is_free(paths.child_lock)
        (grandchild,) = holders(paths.child_lock)
        with pytest.raises(ChildLockHeldError, match=str(grandchild)):
            spawn(SpawnSpec(paths, 2, SLEEPER))
        child.kill_all()
        wait_until(lambda: is_free(paths.child_lock), "the lock to come free")


def test_the_whole_session_is_killed(paths: RunPaths) -> None:
    """Workers that do not hold the lock belong to the attempt all the same."""
    with _spawned(paths, "sh", "-c", "sleep 600 & sleep 600 & wait") as child:
        wait_until(lambda: len(list(session_members(child.identity.pid))) == 3, "three processes")
        child.kill_all()
        wait_until(lambda: not list(session_members(child.identity.pid)), "an empty session")


def test_an_onlooker_is_no_holder(paths: RunPaths) -> None:
    """A status command that has the lock file open, or tests it, must not be killed as a leftover."""
    paths.child_lock.touch()
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_SH); print(flush=True); input()"
    onlooker = subprocess.Popen(
        [sys.executable, "-c", code, str(paths.child_lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert onlooker.stdout is not None
    onlooker.stdout.readline()
    assert list(holders(paths.child_lock)) == []
    onlooker.communicate(b"\n")


def test_the_very_process_is_adopted_and_no_other(paths: RunPaths) -> None:
    """By boot, pid and start time: a number that was given anew is somebody else."""
    with _spawned(paths, *SLEEPER) as child:
        adopted = adopt(paths, 1, child.identity)
        assert adopted is not None
        assert adopted.adopted
        assert adopted.reap() == ExitStatus()
        adopted.close()
        for other in (replace(child.identity, starttime=1), replace(child.identity, boot_id="another")):
            assert adopt(paths, 1, other) is None
        child.send(signal.SIGKILL)
        _wait_dead(child)
        assert adopt(paths, 1, child.identity) is None, "a zombie lives no more"
    assert adopt(paths, 1, child.identity) is None


def test_stacks_are_asked_for_only_where_the_signal_is_handled(paths: RunPaths) -> None:
    """SIGUSR2 ends a process that does not expect it: evidence must not be the murderer."""
    with _spawned(paths, *SLEEPER) as child:
        assert not child.dump_stacks()
        assert not child.ended()
    code = (
        "import faulthandler, signal, time; faulthandler.register(signal.SIGUSR2, file=open('{run_dir}/dump', 'w'));"
        "print('ready', flush=True); time.sleep(600)"
    )
    with _spawned(paths, sys.executable, "-c", code, attempt=2) as child:
        wait_until(lambda: "ready" in paths.output(2).read_text(), "the handler")
        assert child.dump_stacks()
        wait_until(lambda: "most recent call first" in (paths.root / "dump").read_text(), "the stacks")
        assert not child.ended()


def test_usage_is_of_the_whole_session(paths: RunPaths) -> None:
    """A busy worker speaks for its idle parent."""
    with _spawned(paths, "sh", "-c", "(while :; do :; done) & wait") as child:
        wait_until(lambda: (usage := child.usage()) is not None and usage.cpu_s > 0.05, "CPU time to pass")


def test_what_the_machine_tells_is_read() -> None:
    """Our own identity, and the counter of the OOM killer (None only where the kernel has none)."""
    own = identify(os.getpid())
    assert own is not None
    assert own == identify(os.getpid())
    counted = oom_kills()
    assert counted is None or counted >= 0


def test_the_second_supervisor_is_told_who_has_the_run(paths: RunPaths) -> None:
    """Pid, host and since when; after the first has gone the run is free."""
    assert not is_held(paths.lock)
    with RunLock(paths.lock):
        assert is_held(paths.lock)
        with pytest.raises(RunHeldError, match=f"pid {os.getpid()} on .* since 2"):
            RunLock(paths.lock)
    assert not is_held(paths.lock)
    holder = read_holder(paths.lock)
    assert holder is not None
    assert holder.pid == os.getpid()
    RunLock(paths.lock).release()
