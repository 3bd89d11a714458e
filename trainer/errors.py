"""What can end an attempt, and the exit code that each end has.

Owns the mapping from exceptions to `ExitCode` and the normal form of a traceback, by which the supervisor recognises
the same failure twice. Torch-free at import.
"""

import errno
import traceback
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.exit_codes import ExitCode

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NUM_FRAMES = 5  # enough to tell two failures apart, few enough to survive a change of torch's inner layers


class TrainerError(Exception):
    """Base of what the trainer raises by itself; `code` is how the process then leaves."""

    code = ExitCode.ERROR


class SetupError(TrainerError):
    """The configuration cannot work here. `what` states the fact, `remedy` what to do about it."""

    code = ExitCode.CONFIG

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}: {remedy}")
        self.what = what
        self.remedy = remedy


class NoCandidateError(TrainerError):
    """None of the plan's candidates could be loaded; `condemned` pairs each commit with the reason."""

    code = ExitCode.CHECKPOINT

    def __init__(self, condemned: tuple[tuple[str, str], ...]) -> None:
        reasons = "; ".join(f"{commit}: {why}" for commit, why in condemned)
        super().__init__(f"no candidate checkpoint could be loaded ({reasons}): name an older one")
        self.condemned = condemned


class SaveFailedError(TrainerError):
    """A checkpoint without which the attempt cannot go on, or end well, could not be committed."""

    code = ExitCode.STORE

    def __init__(self, step: int, why: str) -> None:
        super().__init__(f"checkpoint of step {step} not committed ({why}): check that the store can be written to")
        self.step = step
        self.why = why


class SupersededError(TrainerError):
    """Another writer claimed a later epoch: this attempt is stale and nothing that it does will count."""

    def __init__(self, step: int, why: str) -> None:
        super().__init__(f"save of step {step} refused ({why}): another supervisor runs this run; stop one of them")
        self.step = step
        self.why = why


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception as the error record and the exit file tell it."""

    code: ExitCode
    type: str
    message: str
    where: str
    frames: tuple[str, ...]
    traceback: str


def describe(error: BaseException) -> Failure:
    """Turn an exception into what the supervisor is told."""
    frames = normalised_frames(error)
    return Failure(
        code=exit_code_of(error),
        type=type_of(error),
        message=str(error)[:2000],
        where=frames[0] if frames else "",
        frames=frames,
        traceback="".join(traceback.format_exception(error))[-8000:],
    )


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit code that an exception stands for; full disks are recognised through the chain of causes."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in _FULL:
            return ExitCode.DISK_FULL
        link = link.__cause__ or link.__context__
    code = getattr(error, "code", None)
    if isinstance(code, ExitCode):
        return code
    return _BY_MODULE.get(type(error).__module__, ExitCode.ERROR)


_BY_MODULE = {
    "trainer.data.errors": ExitCode.DATA,
    "trainer.checkpointing.errors": ExitCode.CHECKPOINT,
    "trainer.contract.store": ExitCode.STORE,
    "pydantic_core._pydantic_core": ExitCode.CONFIG,
}


def type_of(error: BaseException) -> str:
    """Name of the exception's type; an allocation refused on the CPU counts as `OutOfMemoryError` like one on a GPU."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "OutOfMemoryError"
    return type(error).__name__


def normalised_frames(error: BaseException) -> tuple[str, ...]:
    """The innermost frames as `file:function`, innermost first: no line numbers, so an edit does not change them."""
    stack = traceback.extract_tb(error.__traceback__)
    return tuple(f"{Path(frame.filename).name}:{frame.name}" for frame in reversed(stack[-_NUM_FRAMES:]))
