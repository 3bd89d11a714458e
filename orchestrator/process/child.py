"""One trainer process: spawned blocked and released later, or adopted from a supervisor that died.

It has its own session and holds the run's child lock by inheritance. A process is known by (boot id, pid, start time),
which no other process ever has. Nothing here decides anything.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.errors import SpawnError
from orchestrator.process.lock import holders, take_child_lock
from orchestrator.process.standby import Standby
from trainer.contract.paths import RunPaths

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_STARTTIME, _SESSION, _UTIME, _STIME = 19, 3, 11, 12  # fields of /proc/PID/stat after the name, proc(5)
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Identity:
    """A process, beyond doubt."""

    boot_id: str
    pid: int
    starttime: int


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended; both None if that can't be known (it was not our child)."""

    code: int | None = None
    signum: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What the processes of an attempt have used so far."""

    cpu_s: float
    io_bytes: int


@dataclass(frozen=True, slots=True)
class SpawnSpec:
    """What is to be started. `command` may contain {run_dir} and {attempt}."""

    paths: RunPaths
    attempt: int
    command: tuple[str, ...] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None

    def argv(self) -> list[str]:
        """The command line: our own trainer unless another is configured."""
        values = {"{run_dir}": str(self.paths.root), "{attempt}": str(self.attempt)}
        if self.command is None:
            own = [sys.executable, "-m", "trainer", "--run-dir", str(self.paths.root)]
            return [*own, "--attempt", str(self.attempt)]
        return [_filled(word, values) for word in self.command]

    def environment(self) -> dict[str, str]:
        """The child's environment: ours, what run.yaml adds, and the contract's variables but for the descriptors."""
        contract = {
            "PYTHONUNBUFFERED": "1",
            "LONGWATCH_RUN_DIR": str(self.paths.root),
            "LONGWATCH_ATTEMPT": str(self.attempt),
        }
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        own = _OF_OUR_TRAINER if self.command is None else {}
        return {**os.environ, **own, **threads, **self.env, **contract}

    def request(self) -> dict[str, object]:
        """What the standby is asked for."""
        return {"run_dir": str(self.paths.root), "attempt": self.attempt, "environment": self.environment()}


#: Our trainer does no linear algebra in numpy, whose library would start a thread for each core as it loads.
_OF_OUR_TRAINER = {"OPENBLAS_NUM_THREADS": "1"}


def _descriptors(release_fd: int, lock_fd: int) -> dict[str, str]:
    return {"LONGWATCH_RELEASE_FD": str(release_fd), "LONGWATCH_LOCK_FD": str(lock_fd)}


def _filled(word: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


class Child:
    """A trainer process that was spawned here (`process` given) or adopted."""

    def __init__(
        self,
        paths: RunPaths,
        attempt: int,
        identity: Identity,
        pidfd: int,
        process: subprocess.Popen[bytes] | None = None,
        release_fd: int | None = None,
        *,
        forked: bool = False,
    ) -> None:
        self.paths = paths
        self.attempt = attempt
        self.identity = identity
        self.pidfd = pidfd
        self.adopted = process is None and not forked
        self.sent: set[int] = set()
        self.is_cold = not forked
        self._process = process
        self._release_fd = release_fd

    def release(self) -> None:
        """Let it run: its identity is journaled. A child that died meanwhile is no error here."""
        if self._release_fd is not None:
            with suppress(BrokenPipeError):
                os.write(self._release_fd, b"1")
            os.close(self._release_fd)
            self._release_fd = None

    def send(self, signum: signal.Signals) -> None:
        """Signal the process itself, never one that has its number by now."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signum)
            self.sent.add(signum)

    def kill_all(self) -> None:
        """SIGKILL everything of this attempt: the process, its session, and whoever holds its lock."""
        self.send(signal.SIGKILL)
        kill_leftovers(self.paths.child_lock, self.identity.pid)

    def dump_stacks(self) -> bool:
        """Ask faulthandler for the stacks by SIGUSR2, but only if that signal is handled: it would kill otherwise."""
        try:
            status = Path(f"/proc/{self.identity.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        masks = {key: int(value, 16) for key, value in _fields(status) if key in ("SigCgt", "SigBlk")}
        bit = 1 << (signal.SIGUSR2 - 1)
        if not masks.get("SigCgt", 0) & bit or masks.get("SigBlk", 0) & bit:
            return False
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGUSR2)
        return True

    def usage(self) -> Usage | None:
        """CPU time and bytes moved by every process of the session; None once it is gone."""
        readings = [_usage_of(pid) for pid in session_members(self.identity.pid)]
        known = [reading for reading in readings if reading is not None]
        if not known:
            return None
        return Usage(sum(reading.cpu_s for reading in known), sum(reading.io_bytes for reading in known))

    def is_stopped(self) -> bool:
        """Whether a signal or a debugger holds it."""
        stat = _stat(self.identity.pid)
        return stat is not None and stat[0] in ("T", "t")

    def ended(self) -> bool:
        """Whether the process itself is dead."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return bool(poller.poll(0))

    def reap(self) -> ExitStatus:
        """How it ended; to be called once `pidfd` is readable. An adopted one is not ours to reap."""
        if self.adopted:
            return ExitStatus()
        code = self._process.wait() if self._process is not None else _wait_for(self.pidfd)
        if code is None:
            return ExitStatus()
        return ExitStatus(signum=-code) if code < 0 else ExitStatus(code=code)

    def close(self) -> None:
        """Release the descriptors; a child that was never released sees the pipe close and leaves."""
        if self._release_fd is not None:
            os.close(self._release_fd)
            self._release_fd = None
        os.close(self.pidfd)


def _wait_for(pidfd: int) -> int | None:
    """Exit code, or negative signal, of a dead process that was forked for us and has come to us as its subreaper."""
    try:
        found = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        return None
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def spawn(spec: SpawnSpec, standby: Standby | None = None) -> Child:
    """Start a process that waits on its release pipe: a fork of the standby if that is warm, a new one otherwise.

    Raises:
        ChildLockHeldError: a process of an earlier attempt still lives.
        SpawnError: the command can't be executed.
    """
    lock_fd = take_child_lock(spec.paths.child_lock)
    release_read, release_write = os.pipe()
    output = os.open(spec.paths.output(spec.attempt), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        forked = standby.fork(spec.request(), [release_read, lock_fd, output]) if standby is not None else None
        process = (
            None
            if forked is not None
            else subprocess.Popen(
                spec.argv(),
                env={**spec.environment(), **_descriptors(release_read, lock_fd)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lock_fd, release_read),
                start_new_session=True,  # with pass_fds and without preexec_fn: no fork of our memory
            )
        )
    except (OSError, ValueError) as error:  # ValueError: a name or value that no environment can hold
        os.close(release_write)
        raise SpawnError(spec.argv()[0], str(error)) from error
    finally:
        for descriptor in (lock_fd, release_read, output):
            os.close(descriptor)
    pid = process.pid if process is not None else forked
    identity = identify(pid) if pid is not None else None
    assert pid is not None
    assert identity is not None, "a child that was not reaped keeps its entry in /proc"
    pidfd = os.pidfd_open(pid)
    _offer_to_oom_killer(pid)
    return Child(spec.paths, spec.attempt, identity, pidfd, process, release_write, forked=process is None)


def _offer_to_oom_killer(pid: int) -> None:
    """A supervisor may be protected (OOMScoreAdjust of its unit) and hands that down; a trainer must not be."""
    score = Path(f"/proc/{pid}/oom_score_adj")
    with suppress(OSError):
        if int(score.read_text()) < 0:
            score.write_text("0")


def adopt(paths: RunPaths, attempt: int, identity: Identity) -> Child | None:
    """Take over a living process of a dead supervisor; None if that very process is gone."""
    try:
        pidfd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return None
    child = Child(paths, attempt, identity, pidfd)
    if identify(identity.pid) != identity or child.ended():  # compared after the pidfd is held: no race
        child.close()
        return None
    return child


def become_subreaper() -> None:
    """Orphans of our children come to us instead of to init, so that none is out of reach."""
    if _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "prctl(PR_SET_CHILD_SUBREAPER)")


def reap_orphans() -> None:
    """Reap dead grandchildren that came to us; children of our own session belong to somebody else here."""
    for pid in _own_children():
        stat = _stat(pid)
        if stat is not None and stat[0] == "Z" and int(stat[_SESSION]) != os.getsid(0) and int(stat[_SESSION]) != pid:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _own_children() -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except FileNotFoundError:
        return []  # a kernel without CONFIG_PROC_CHILDREN


def identify(pid: int) -> Identity | None:
    """The identity of a living or not yet reaped process."""
    stat = _stat(pid)
    return None if stat is None else Identity(boot_id(), pid, int(stat[_STARTTIME]))


def boot_id() -> str:
    """Changes with every boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def session_members(session: int) -> Iterator[int]:
    """Living processes of a session."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            stat = _stat(int(entry.name))
            if stat is not None and int(stat[_SESSION]) == session and stat[0] != "Z":
                yield int(entry.name)


def kill_leftovers(child_lock: Path, session: int | None = None) -> None:
    """SIGKILL every holder of the child lock and, if given, every member of a session."""
    _kill_each(lambda: holders(child_lock))
    if session is not None:
        _kill_each(lambda: session_members(session))


def _kill_each(find: Callable[[], Iterator[int]]) -> None:
    """Between finding a pid and signalling it the number may be given anew: hold it by a pidfd and look again."""
    for pid in find():
        with suppress(ProcessLookupError, PermissionError):
            pidfd = os.pidfd_open(pid)
            try:
                if pid in find():
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)


def oom_kills() -> int | None:
    """Processes that the kernel's OOM killer has killed, of our own cgroup if it tells, else of the machine."""
    for path in (*_cgroup_files(), Path("/proc/vmstat")):
        try:
            found = [int(value) for key, value in _fields(path.read_text()) if key == "oom_kill"]
        except (OSError, ValueError):
            continue
        if found:
            return found[0]
    return None


def _cgroup_files() -> Iterator[Path]:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield Path(f"/sys/fs/cgroup{path}/memory.events")
        elif controllers == "memory":
            yield Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control")


def _fields(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2:
            yield words[0].rstrip(":"), words[1]


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat after the name, which may itself contain blanks and parentheses."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _usage_of(pid: int) -> Usage | None:
    stat = _stat(pid)
    if stat is None:
        return None
    try:
        counters = dict(_fields(Path(f"/proc/{pid}/io").read_text()))
        moved = sum(int(counters.get(name, "0")) for name in ("rchar", "wchar"))
    except (OSError, ValueError):
        moved = 0  # not allowed to look, or gone between the two reads
    return Usage((int(stat[_UTIME]) + int(stat[_STIME])) / _TICKS_PER_S, moved)
