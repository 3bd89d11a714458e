"""One helper thread for calls that may block: everything that touches the checkpoint store (DESIGN 3).

Jobs run one after another; what came of them is collected by the supervisor's thread, which a byte on a pipe wakes.
Nothing is retried here: when to try again is the loop's business. The thread is a daemon, because a store that hangs
must not keep the supervisor from leaving.
"""

import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from trainer.contract.fence import FenceError
from trainer.contract.store import StoreError


@dataclass(frozen=True, slots=True)
class Finished:
    """What came of a job."""

    decision: int
    error: StoreError | FenceError | ValueError | None


@dataclass(frozen=True, slots=True)
class _Job:
    decision: int
    call: Callable[[], object]


class StoreWorker:
    """The thread, its queue and its results."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Finished] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()
        self.outstanding = 0

    def fileno(self) -> int:
        """Readable when a result is there."""
        return self._wake_read

    def submit(self, decision: int, call: Callable[[], object]) -> None:
        """Queue a call on behalf of a decision."""
        self.outstanding += 1
        self._jobs.put(_Job(decision, call))

    def finished(self) -> list[Finished]:
        """Results since the last time.

        Raises:
            RuntimeError: the thread died of what is no store's error: a bug, which must not look like waiting.
        """
        if not self._thread.is_alive():
            raise RuntimeError("the store thread has died; its traceback is in the log")
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            return []
        results = []
        while not self._results.empty():
            results.append(self._results.get())
        self.outstanding -= len(results)
        return results

    def close(self, wait_s: float) -> None:
        """Let queued jobs come to their end for so long; what does not is done again by the next supervisor."""
        self._jobs.put(None)
        self._thread.join(wait_s)
        if not self._thread.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            error: StoreError | FenceError | ValueError | None = None
            try:
                job.call()
            except (StoreError, FenceError, ValueError) as raised:
                error = raised
            self._results.put(Finished(job.decision, error))
            os.write(self._wake_write, b"1")
