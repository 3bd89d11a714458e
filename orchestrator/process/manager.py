"""What a service manager is told (sd_notify(3)): that the supervisor is ready, that its loop turns, that it is leaving.

The watchdog is fed from the loop itself: a thread that beats beside a loop that hangs would say nothing.
"""

import os
import socket
from collections.abc import Mapping
from types import TracebackType
from typing import Self

_VARIABLE = "NOTIFY_SOCKET"
_LEAVES_WITHIN_US = 3_600_000_000


class ServiceManager:
    """The socket of the manager that started us; without one, nothing is said to nobody."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get(_VARIABLE, "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)

    def ready(self) -> None:
        """The run is ours, and what its last supervisor left is taken over."""
        self._say("READY=1")

    def alive(self, status: str) -> None:
        """The loop has turned. `status` is what `systemctl status` shows."""
        self._say(f"WATCHDOG=1\nSTATUS={status}")

    def leaving(self) -> None:
        """What is left to do may take as long as the store does, and the loop does not turn any more."""
        self._say(f"STOPPING=1\nWATCHDOG_USEC={_LEAVES_WITHIN_US}")

    def _say(self, text: str) -> None:
        if self._address:
            try:
                self._socket.sendto(text.encode(), self._address)
            except OSError:
                return  # a manager that does not listen is no reason to stop watching

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._socket.close()
