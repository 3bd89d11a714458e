"""The machine and what this process may do on it. What cannot be observed is said so, and is no failure."""

import ctypes
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.findings import Finding, graded
from orchestrator.process.stacks import py_spy

_SHM = Path("/dev/shm")  # noqa: S108  (only looked at)
_FILES = 4096  # shards are mapped one by one, and sockets and logs come on top
_STA_UNSYNC = 0x0040  # adjtimex(2)
_LEAST_MEMORY = 4 << 30
_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" by a number near 2^63


def examine_machine() -> list[Finding]:
    """Everything that needs no run."""
    return [
        *_software(),
        *_processors(),
        *_memory(),
        _shared_memory(),
        _open_files(),
        _clock(),
        _tracing(),
        _kernel_messages(),
        _handles(),
    ]


def _software() -> Iterator[Finding]:
    python = sys.version.split()[0]
    yield graded("python", python, good=sys.version_info >= (3, 11), remedy="use 3.11 or later", otherwise="fail")
    try:
        yield Finding("torch", "pass", version("torch"))
    except PackageNotFoundError:
        yield Finding("torch", "fail", "not installed", "`make setup` installs it")


def _processors() -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0))
    quota = cpu_quota(_read(Path("/sys/fs/cgroup/cpu.max")))
    seen = f"{usable} cores" + (f", of which the cgroup grants {quota:g}" if quota is not None else "")
    throttled = quota is not None and quota < usable
    remedy = "set launch.threads to what is granted, or raise the cgroup's cpu.max"
    yield graded("processors", seen, good=not throttled, remedy=remedy)


def cpu_quota(text: str | None) -> float | None:
    """Cores that a cgroup's `cpu.max` grants ("200000 100000" is 2); None for no limit."""
    parts = (text or "").split()
    if len(parts) != 2 or parts[0] == "max":
        return None
    return int(parts[0]) / int(parts[1])


def _memory() -> Iterator[Finding]:
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(info[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    limit = memory_limit(_read(Path("/sys/fs/cgroup/memory.max")))
    seen = f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB available"
    if limit is not None:
        seen += f"; the cgroup allows {limit / 1e9:.1f} GB"
    remedy = "a trainer and two copies of its state must fit; free memory, or raise the cgroup's memory.max"
    yield graded("memory", seen, good=min(free, limit or free) >= _LEAST_MEMORY, remedy=remedy)


def memory_limit(text: str | None) -> int | None:
    """Bytes that a cgroup's `memory.max` allows; None for no limit."""
    text = (text or "").strip()
    return int(text) if text.isdigit() and int(text) < _UNLIMITED else None


def _shared_memory() -> Finding:
    if not _SHM.is_dir():
        return Finding("shared memory", "warn", "none", "mount a tmpfs at /dev/shm, or saves are as slow as the disk")
    free = shutil.disk_usage(_SHM).free
    remedy = "a save wants two copies of the state there; enlarge it (--shm-size for a container)"
    return graded("shared memory", f"{free / 1e9:.1f} GB free", good=free >= 1 << 30, remedy=remedy)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    seen = f"{soft} (at most {hard})"
    return graded("open files", seen, good=soft >= _FILES, remedy=f"ulimit -n {_FILES}, or LimitNOFILE of the unit")


def _clock() -> Finding:
    """Whether something keeps the clock right; liveness needs none, but records and alerts carry its time."""
    timex = ctypes.create_string_buffer(512)  # larger than struct timex; modes is its first int, 0 for reading
    state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    if state < 0:
        return Finding("clock", "pass", "cannot be observed here")
    status = ctypes.c_int.from_buffer(timex, _STATUS_OFFSET).value
    remedy = "run chrony or systemd-timesyncd: the times of records and alerts come from this clock"
    synchronised = not status & _STA_UNSYNC
    return graded("clock", "kept by NTP" if synchronised else "nobody keeps it", good=synchronised, remedy=remedy)


_STATUS_OFFSET = 40  # of struct timex on 64-bit Linux: modes (4, padded to 8), four longs, then status


def _tracing() -> Finding:
    scope = (_read(Path("/proc/sys/kernel/yama/ptrace_scope")) or "0").strip()
    may = {"0": "allowed", "1": "allowed for descendants"}.get(scope, "refused")
    spy = py_spy() is not None
    remedy = (
        "without both only the trainer's own handler describes a hang, and native code can keep that from running: "
        "kernel.yama.ptrace_scope=1, and pip install 'longwatch[spy]'"
    )
    seen = f"tracing {may}; py-spy is {'there' if spy else 'not installed'}"
    return graded("stacks of a hang", seen, good=spy and may != "refused", remedy=remedy)


def _kernel_messages() -> Finding:
    readable = os.access("/dev/kmsg", os.R_OK)
    seen = "readable" if readable else "not readable: a GPU's Xid errors stay unknown"
    remedy = "kernel.dmesg_restrict=0, or CAP_SYSLOG for the supervisor"
    return graded("kernel messages", seen, good=readable, remedy=remedy)


def _handles() -> Finding:
    """pidfd: a process is watched and signalled by a handle that no reuse of its number can confuse."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:
        return Finding(
            "process handles", "fail", f"no pidfd ({error})", "use Linux 5.3 or later; some sandboxes forbid"
        )
    return Finding("process handles", "pass", "pidfd works")


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
