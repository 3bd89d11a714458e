"""Stacks of a process from outside, by py-spy: also of one that holds the GIL in native code and answers no signal.

Only where it is installed (extra `spy`) and the kernel lets us trace; the trainer's own handler is asked either way.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import structlog

_LOG = structlog.get_logger(__name__)


def py_spy() -> str | None:
    """The program: beside our interpreter, or on the path."""
    beside = Path(sys.executable).parent / "py-spy"
    return str(beside) if beside.exists() else shutil.which("py-spy")


class OutsideLook:
    """One dump at a time into a file; nothing waits for it."""

    def __init__(self, into: Path) -> None:
        self._into = into
        self._running: subprocess.Popen[bytes] | None = None

    def begin(self, pid: int) -> bool:
        """Have the stacks of all threads of a process appended; False if that can't be done."""
        program = py_spy()
        if program is None or (self._running is not None and self._running.poll() is None):
            return False
        try:
            file = os.open(self._into, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                # only read, never paused: it may be healthy after all, and one that is stopped could not be paused
                self._running = subprocess.Popen(
                    [program, "dump", "--nonblocking", "--pid", str(pid)], stdin=subprocess.DEVNULL, stdout=file,
                    stderr=file, start_new_session=True,
                )  # fmt: skip
            finally:
                os.close(file)
        except OSError as error:
            _LOG.warning("py_spy_not_started", why=str(error))
            return False
        return True

    def end(self) -> None:
        """What is still running is looking at a process that is gone, or that is not ours any more."""
        if self._running is not None:
            self._running.kill()
            self._running.wait()
            self._running = None
