"""How long an outage of the data's storage is waited for: attempts again with backoff, up to a total deadline."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import structlog

from trainer.data.errors import DataError, DataUnreachableError
from trainer.data.storage import CALL_TIMEOUT_S

T = TypeVar("T")
log = structlog.get_logger(__name__)

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 10.0  # soon enough after the end of an outage, and after a signal to stop
_LEAST_CALL_S = 1.0  # the last attempt, at the deadline, gets so long
_DICE = random.Random()  # its own: the global one is part of the training state


@dataclass(frozen=True, slots=True)
class Patience:
    """Waits up to `timeout_s` in all, with exponential backoff and full jitter, so that ranks do not come in step."""

    timeout_s: float
    give_up: Callable[[], bool] = lambda: False  # asked between two attempts
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def outlast(self, attempt: Callable[[float], T]) -> T:
        """What `attempt` gives, which is told for how many seconds its call may last.

        Raises:
            DataUnreachableError: there was an outage for the whole time, or until it was given up.
            DataError: the data is damaged or missing, and was at a second look too.
        """
        begun_s, wait_s, doubted = self.clock(), _FIRST_WAIT_S, False
        while True:
            left_s = begun_s + self.timeout_s - self.clock()
            try:
                return attempt(min(CALL_TIMEOUT_S, max(left_s, _LEAST_CALL_S)))
            except DataUnreachableError as error:
                left_s = begun_s + self.timeout_s - self.clock()
                if left_s <= 0 or self.give_up():
                    what = f"{error.what} (tried for {self.clock() - begun_s:.0f} s)"
                    raise DataUnreachableError(what, error.remedy, shard=error.shard) from error
                pause_s = min(_DICE.uniform(0, wait_s), left_s)
                log.warning("data_unreachable", why=error.what, left_s=round(left_s, 1), next_s=round(pause_s, 1))
                self.sleep(pause_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            except DataError:
                if doubted:
                    raise
                doubted = True  # a proxy may have cut an answer short
