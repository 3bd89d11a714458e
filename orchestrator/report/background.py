"""Output that never holds the supervisor up: a thread of its own writes, and gives up where nobody reads.

A pipe whose reader has stalled blocks a write for ever, one whose reader is gone or a full disk fails it. None of that
is a reason to stop watching a run.
"""

import contextlib
import io
import os
import queue
import threading
from typing import IO

_MAX_WAITING = 2000  # texts; beyond that somebody is not reading, and the newest are dropped


class BackgroundFile(io.TextIOBase):
    """Stands for a file with a descriptor: what is written is queued, what can't be written is dropped."""

    def __init__(self, file: IO[str]) -> None:
        file.flush()
        self._file = file
        self._descriptor = file.fileno()
        self._queue: queue.Queue[bytes | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        """Queue it."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(text.encode(errors="replace"))
        return len(text)

    def fileno(self) -> int:
        """Of the file that it stands for, so that its width and colours can be asked for."""
        return self._descriptor

    def isatty(self) -> bool:
        """Of the file that it stands for."""
        return os.isatty(self._descriptor)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """What is written in."""
        return "utf-8"

    def finish(self, timeout_s: float) -> None:
        """Wait for what is queued, but not for ever."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout_s)
            self._thread.join(timeout_s)

    def _run(self) -> None:
        readable = True
        while (data := self._queue.get()) is not None:
            try:
                while readable and data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:  # no reader, no space, no terminal: the journal and the logs have it all
                readable = False
