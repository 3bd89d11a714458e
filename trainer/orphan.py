"""The orphan rule: a trainer whose supervisor is gone for long saves and leaves by itself.

Gone means both: the process that spawned it is no longer its parent, and nobody holds the records socket. A new
supervisor that adopts the attempt binds the socket again, and is thereby seen.
"""

import os
import time

from trainer.reporter import Reporter


class OrphanWatch:
    """Looks at parent and socket, at the price of one system call."""

    def __init__(self, reporter: Reporter, patience_s: float, parent_pid: int) -> None:
        """`parent_pid`: who spawned this process, asked before the seconds of imports in which it may die."""
        self._reporter = reporter
        self._patience_s = patience_s
        self._parent_pid = parent_pid

    def is_orphan(self) -> bool:
        """Whether there has been no supervisor for the bounded time."""
        if os.getppid() == self._parent_pid:
            return False
        return time.monotonic() - self._reporter.answered_s > self._patience_s
