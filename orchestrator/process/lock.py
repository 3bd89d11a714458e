"""The two flocks of a run: one supervisor at a time, and no new attempt while a process of an old one lives.

The child's lock is taken on a descriptor that the child inherits, so the kernel releases it only when the last process
that holds the descriptor is gone: SIGKILL, setsid and double forks make no difference.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.errors import ChildLockHeldError, RunHeldError

_TRIES = 5
_TRY_EVERY_S = 0.02


class Holder(BaseModel):
    """What the lock file says of the supervisor that holds it."""

    model_config = ConfigDict(frozen=True)

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"


class RunLock:
    """The lock of the one supervisor, held until `release` or the end of the process."""

    def __init__(self, path: Path) -> None:
        """Take the lock.

        Raises:
            RunHeldError: another supervisor holds it.
        """
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _taken(self._descriptor):
            holder = read_holder(path)
            os.close(self._descriptor)
            raise RunHeldError(path, str(holder) if holder else "a process that has not said its name") from None
        since = datetime.now(UTC).isoformat(timespec="seconds")
        body = Holder(pid=os.getpid(), host=socket.gethostname(), since=since).model_dump_json()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, body.encode(), 0)

    def release(self) -> None:
        """Give the run back."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.release()


def _taken(descriptor: int) -> bool:
    """Try for a moment: `is_held` of some onlooker may have the lock for an instant."""
    for _ in range(_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_TRY_EVERY_S)
        else:
            return True
    return False


def read_holder(path: Path) -> Holder | None:
    """Who took the lock last; whether it is still held, only `is_held` knows."""
    try:
        return Holder.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def is_held(path: Path) -> bool:
    """Whether anybody has the lock now. Asks for a shared one, by which `holders` knows an onlooker."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def take_child_lock(path: Path) -> int:
    """A descriptor that holds the lock, to be inherited by the child and then closed here.

    Raises:
        ChildLockHeldError: a process of an earlier attempt still has it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not _taken(descriptor):
        os.close(descriptor)
        raise ChildLockHeldError(tuple(holders(path)))
    return descriptor


def is_free(path: Path) -> bool:
    """Whether no process of any attempt holds the child's lock."""
    return not is_held(path)


def holders(path: Path) -> Iterator[int]:
    """Pids, other than our own, that hold the lock; processes of other users can't be seen.

    A process that only looks whether it is held has the file open too, so the lock itself must be seen (fdinfo).
    """
    try:
        wanted = path.stat()
    except FileNotFoundError:
        return
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid() and _holds(process, wanted):
            yield int(process.name)


def _holds(process: Path, wanted: os.stat_result) -> bool:
    try:
        for entry in (process / "fd").iterdir():
            try:
                found = entry.stat()
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    locks = (process / "fdinfo" / entry.name).read_text()
                    if "FLOCK" in locks and "WRITE" in locks:
                        return True
            except OSError:
                continue  # closed in the meantime, or a socket
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False  # gone, or not ours
    return False
