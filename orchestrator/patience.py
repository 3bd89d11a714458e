"""A disk that takes no write may take one in a moment: how long the journal is tried again before the run is given up.

Meanwhile nothing is decided, and a healthy trainer needs nobody; signals are taken in afterwards. CLOCK_MONOTONIC.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from orchestrator.errors import JournalWriteError

_RETRY_S = 1.0
_FORGIVEN_S = 60.0  # failures further apart are not one outage
_LOG = structlog.get_logger(__name__)


@dataclass(slots=True)
class DiskPatience:
    """Waits and says whether to try again: as long as one outage has not lasted `most_s` seconds."""

    most_s: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _since_s: float = -math.inf
    _tried_s: float = -math.inf

    def __call__(self, error: JournalWriteError) -> bool:
        """A write has failed."""
        now_s = self.clock()
        if now_s - self._tried_s > _FORGIVEN_S:
            self._since_s = now_s
        if now_s - self._since_s > self.most_s:
            return False
        _LOG.critical("journal_not_written", error=str(error), again_in_s=_RETRY_S)
        self.sleep(_RETRY_S)
        self._tried_s = self.clock()
        return True
