"""The uploader's second duty: the journal's segments go to the store, and with them a sign that this run is held.

The sign is an object whose number rises every half minute. Whoever wants to go on with the run elsewhere looks twice:
a sign that moves says that it is held. It is a courtesy only; what keeps two writers apart is the fence.
"""

import json
import os
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

import structlog

from trainer.contract.paths import RunPaths
from trainer.contract.segments import SIGNS, send_segments
from trainer.contract.store import Store, StoreError

SIGN_EVERY_S = 30.0
_RETRY_FIRST_S = 1.0
_RETRY_MOST_S = 60.0
log = structlog.get_logger(__name__)


class Outbox:
    """Sends what the supervisor has laid out. Nothing here ever stops a checkpoint from being sent."""

    def __init__(self, paths: RunPaths, store: Store, clock: Callable[[], float]) -> None:
        self._outbox: Path = paths.outbox
        self._store = store
        self._clock = clock
        self._token = uuid.uuid4().hex[:12]
        self._number = 0
        self._signs: list[str] | None = None
        self._sign_at_s = clock()
        self._not_before_s = 0.0
        self._wait_s = _RETRY_FIRST_S

    def turn(self) -> bool:
        """Send what is there, unless the store has just failed; returns whether anything was sent."""
        if self._clock() < self._not_before_s:
            return False
        try:
            sent = send_segments(self._store, self._outbox)
            if self._clock() >= self._sign_at_s:
                self._show()
        except (StoreError, OSError) as error:
            log.warning("journal_not_shipped", why=str(error), again_in_s=self._wait_s)
            self._not_before_s = self._clock() + self._wait_s
            self._wait_s = min(_RETRY_MOST_S, 2 * self._wait_s)
            return False
        self._wait_s = _RETRY_FIRST_S
        return sent > 0

    def _show(self) -> None:
        """The next sign, and away with those before it, also of an uploader that was killed."""
        if self._signs is None:
            self._signs = [item.key for item in self._store.list(SIGNS)]
        self._number += 1
        key = f"{SIGNS}{self._token}-{self._number:08d}.json"
        body = {"host": socket.gethostname(), "pid": os.getpid()}
        self._store.create(key, json.dumps(body).encode())
        self._sign_at_s = self._clock() + SIGN_EVERY_S
        for old in self._signs:
            self._store.delete(old)
        self._signs = [key]

    def close(self) -> None:
        """Take the sign away: whoever goes on elsewhere need not wait."""
        try:
            for key in self._signs or ():
                self._store.delete(key)
        except StoreError as error:
            log.warning("sign_left", why=str(error))
