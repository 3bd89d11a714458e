"""Keeps a run's logbook current while it is supervised: in a process of its own, so that nothing waits for it.

Written when an incident begins or ends, every so many minutes, and at the end. What fails or takes long costs the run
nothing: the next one is written later, and `longwatch report` writes one at any time.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from trainer.contract.paths import RunPaths

_LOG = structlog.get_logger(__name__)
_SOON_S = 20.0  # between two for the sake of incidents: they come in bursts
_REST = 20.0  # times as long as one took: a twentieth of one core at most, however long the run has become

Standing = tuple[str, int, int]
"""(state, incidents, open incidents)"""


class Keeper:
    """Starts a writer when one is due and none runs; never waits before `finish`."""

    def __init__(self, paths: RunPaths, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._paths = paths
        self._every_s = every_s
        self._clock = clock
        self._writer: subprocess.Popen[bytes] | None = None
        self._begun_s = clock()
        self._rest_until_s = clock()
        self._written: Standing | None = None
        self.started = 0

    def seen(self, standing: Standing) -> None:
        """How the run stands now; called with every update."""
        if self.is_writing:
            return
        now_s = self._clock()
        news = self._written is not None and standing != self._written
        due_s = self._begun_s + (_SOON_S if news else self._every_s)
        if self._written is None:
            self._written = standing
        elif now_s >= max(due_s, self._rest_until_s):
            self._written = standing
            self._start()

    def finish(self, wait_s: float) -> None:
        """Write the last one; it goes on by itself if it takes longer than may be waited."""
        end_s = self._clock() + wait_s
        if self._writer is not None:
            self._wait(wait_s)
        self._start()
        self._wait(max(0.0, end_s - self._clock()))

    @property
    def is_writing(self) -> bool:
        """Whether a writer still runs; one that has ended is looked at."""
        if self._writer is None:
            return False
        code = self._writer.poll()
        if code is None:
            return True
        took_s = self._clock() - self._begun_s
        self._rest_until_s = self._clock() + _REST * took_s
        if code:
            _LOG.warning("logbook_not_written", code=code, output=str(_output(self._paths)))
        self._writer = None
        return False

    def _start(self) -> None:
        self._begun_s = self._clock()
        self.started += 1
        command = [sys.executable, "-m", "orchestrator.logbook", str(self._paths.root)]
        try:
            with _output(self._paths).open("wb") as output:
                self._writer = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )
        except OSError as error:
            _LOG.warning("logbook_not_written", error=str(error))

    def _wait(self, wait_s: float) -> None:
        if self._writer is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._writer.wait(wait_s)


def _output(paths: RunPaths) -> Path:
    return paths.root / "logs" / "logbook.out"
