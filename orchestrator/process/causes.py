"""Why an attempt ended: one ordered table, the first row that fits the evidence wins.

Causes are what policy rules name in `when: {cause: ...}`. Sources: exit codes are the trainer's contract; signals and
messages are from research/supervision 2.4 (kernel, CUDA, NCCL and libc texts).
"""

import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.process.kernel import NEEDS_RESET
from trainer.contract.exit_codes import ExitCode

_TAIL_BYTES = 16384
_DETAIL_CHARS = 500


class ErrorFacts(BaseModel):
    """The error record in an exit file; every trainer may leave out what it does not know."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: str = ""
    message: str = ""
    frames: tuple[str, ...] = ()


class ExitFile(BaseModel):
    """What a trainer wrote when it left by itself."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    code: int
    reason: str = ""
    error: ErrorFacts | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known of an ended attempt."""

    code: int | None = None
    signum: int | None = None
    sent: frozenset[int] = frozenset()
    hang_confirmed: bool = False
    host_lost: bool = False
    error: ErrorFacts | None = None
    oom_kills: int = 0
    xids: tuple[int, ...] = ()
    tail: str = ""
    step: int = 0

    @property
    def text(self) -> str:
        """The error and the end of the output, in which messages are looked for."""
        error = f"{self.error.type}: {self.error.message}\n" if self.error else ""
        return error + self.tail

    def says(self, pattern: re.Pattern[str]) -> bool:
        """Whether a message is to be found."""
        return pattern.search(self.text) is not None

    @property
    def error_type(self) -> str:
        """Type of the exception, without its module."""
        if self.error is not None:
            return self.error.type.rpartition(".")[2]
        found = re.findall(r"^([A-Za-z_][\w.]*(?:Error|Exception|Interrupt))\b", self.tail, re.MULTILINE)
        return str(found[-1]).rpartition(".")[2] if found else ""


@dataclass(frozen=True, slots=True)
class Row:
    """One cause: its name, when it applies, and where that comes from."""

    cause: str
    applies: Callable[[Evidence], bool]
    source: str


@dataclass(frozen=True, slots=True)
class Cause:
    """The verdict on an ended attempt."""

    cause: str
    detail: str
    frames: tuple[str, ...]


_DISK = re.compile(r"No space left on device|Disk quota exceeded|\bENOSPC\b|\bEDQUOT\b")
_CUDA_OOM = re.compile(r"CUDA out of memory|torch\.cuda\.OutOfMemoryError|HIP out of memory|CUDA error: out of memory")
_HOST_OOM = re.compile(
    r"^MemoryError\b|^OutOfMemoryError\b|can't allocate memory|Cannot allocate memory"
    r"|DataLoader worker .*killed by signal: Killed",
    re.MULTILINE,
)
_NCCL = re.compile(
    r"ncclInternalError|ncclSystemError|ncclRemoteError|ncclUnhandledCudaError|NCCL error|DistBackendError"
    r"|Watchdog caught collective operation timeout|ProcessGroupNCCL.*(?:timeout|terminat|abort)"
)
_GPU = re.compile(
    r"NVRM: Xid|uncorrectable (?:NVLink|ECC)|unspecified launch failure|illegal memory access|device-side assert"
    r"|CUDA error:|CUDA driver error|CUBLAS_STATUS|CUDNN_STATUS|fell off the bus|no CUDA-capable device"
)
_XID = re.compile(r"NVRM: Xid \([^)]*\): (\d+)")
_USER_TYPES = frozenset(
    {"ImportError", "ModuleNotFoundError", "TypeError", "AttributeError", "KeyError", "NameError", "SyntaxError",
     "IndentationError"}
)  # fmt: skip
_NATIVE = frozenset(
    {signal.SIGSEGV, signal.SIGILL, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGSYS, signal.SIGTRAP}
)


def _coded(code: ExitCode) -> Callable[[Evidence], bool]:
    return lambda evidence: evidence.code == code


def _hung(evidence: Evidence) -> bool:
    return evidence.hang_confirmed and evidence.code is None and evidence.signum in (None, signal.SIGKILL)


def _host_oom(evidence: Evidence) -> bool:
    killed = evidence.signum == signal.SIGKILL and signal.SIGKILL not in evidence.sent and evidence.oom_kills > 0
    return killed or evidence.says(_HOST_OOM)


def _needs_reset(evidence: Evidence) -> bool:
    said = (int(number) for number in _XID.findall(evidence.text))
    return any(xid in NEEDS_RESET for xid in (*evidence.xids, *said))


TABLE: tuple[Row, ...] = (
    Row("hang", _hung, "we killed it after its deadline had passed twice"),
    Row("finished", _coded(ExitCode.FINISHED), "exit 0"),
    Row("preempted", _coded(ExitCode.PREEMPTED), "exit 75: a checkpoint is committed"),
    Row("left", _coded(ExitCode.LEFT), "exit 76: asked to leave without saving"),
    Row("replay_done", _coded(ExitCode.REPLAY_DONE), "exit 71"),
    Row("orphaned", _coded(ExitCode.ORPHANED), "exit 79: no supervisor for deadlines.orphan_s"),
    Row("config", _coded(ExitCode.CONFIG), "exit 2, also argparse's"),
    Row("data", _coded(ExitCode.DATA), "exit 65, EX_DATAERR"),
    Row("data_unreachable", _coded(ExitCode.DATA_UNREACHABLE), "exit 68, EX_NOHOST"),
    Row("checkpoint", _coded(ExitCode.CHECKPOINT), "exit 66: no candidate verified"),
    Row("host_lost", lambda e: e.host_lost and e.code is None, "the machine was started anew, or another goes on"),
    Row("disk_full", lambda e: e.code == ExitCode.DISK_FULL or e.says(_DISK), "exit 74, ENOSPC or EDQUOT"),
    Row("store", _coded(ExitCode.STORE), "exit 69, EX_UNAVAILABLE"),
    Row("cuda_oom", lambda e: e.says(_CUDA_OOM), "torch's allocator message"),
    Row("host_oom", _host_oom, "SIGKILL not ours and the kernel's oom_kill counter rose, or malloc failed"),
    Row("nccl", lambda e: e.says(_NCCL), "NCCL watchdog, error names of nccl.h"),
    Row("gpu_needs_reset", _needs_reset, "an Xid after which only a reset or reboot helps"),
    Row("gpu", lambda e: bool(e.xids) or e.says(_GPU), "Xid, ECC, CUDA runtime error texts"),
    Row("native_crash", lambda e: e.signum in _NATIVE, "SIGSEGV, SIGABRT, ...: a fault in native code"),
    Row("killed", lambda e: e.signum is not None, "another signal; the detail says whose"),
    Row("user_error", lambda e: e.step == 0 and e.error_type in _USER_TYPES, "a programming error before step 1"),
    Row("error", lambda e: e.code is not None or e.error is not None, "any other exit code or exception"),
    Row("unknown", lambda e: True, "no evidence: an adopted process that left no exit file"),
)
CAUSES: tuple[str, ...] = tuple(row.cause for row in TABLE)


def classify(evidence: Evidence) -> Cause:
    """The first row of the table that fits."""
    row = next(row for row in TABLE if row.applies(evidence))
    frames = evidence.error.frames if evidence.error else ()
    return Cause(row.cause, _detail(evidence)[:_DETAIL_CHARS], frames)


def _detail(evidence: Evidence) -> str:
    if evidence.signum is not None:
        name = {member.value: member.name for member in signal.Signals}.get(evidence.signum, evidence.signum)
        return f"{name}, sent by {'the supervisor' if evidence.signum in evidence.sent else 'somebody else'}"
    if evidence.error is not None:
        return f"{evidence.error.type}: {evidence.error.message}"
    if evidence.code:
        lines = [line.strip() for line in evidence.tail.splitlines() if line.strip()]
        return f"exit code {evidence.code}" + (f": {lines[-1]}" if lines else "")
    return ""


def read_exit_file(path: Path) -> ExitFile | None:
    """What the trainer said when it left; None if it said nothing that can be read."""
    try:
        return ExitFile.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def output_tail(path: Path) -> str:
    """The end of an attempt's output."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
