"""Signals: a wish to leave is noted and obeyed by the loop at its next boundary; a wish for stacks is met at once.

A handler does nothing but set a flag. The stacks come from faulthandler, whose C handler works even while the GIL is
held, where a Python handler never runs.
"""

import faulthandler
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class StopFlag:
    """True once SIGTERM or SIGUSR1 (Slurm's warning before a preemption) has arrived."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum

    @contextmanager
    def installed(self) -> Iterator["StopFlag"]:
        """Listen while the block runs; what was there before is put back."""
        previous = {signum: signal.signal(signum, self._note) for signum in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield self
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


@contextmanager
def stacks_on_request(path: Path) -> Iterator[None]:
    """While the block runs SIGUSR2, and any fatal signal, append the stacks of all threads to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    faulthandler.register(signal.SIGUSR2, file=descriptor, all_threads=True, chain=False)
    faulthandler.enable(file=descriptor, all_threads=True)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGUSR2)
        faulthandler.disable()
        os.close(descriptor)
