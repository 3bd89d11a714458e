"""Requests from outside as events: signals to the supervisor and connections to the control socket."""

import os
import selectors
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.control import CheckpointRequest, Client, Request, Response, Server, StatusRequest, StopRequest
from orchestrator.errors import ControlError
from orchestrator.policy.events import CheckpointRequested, Event, StopRequested
from orchestrator.policy.state import RunStatus

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_UNHEARD = (signal.SIGHUP,)  # a closed terminal is no reason to stop a run of weeks


@contextmanager
def signal_pipe() -> Iterator[int]:
    """While the block runs, signals are bytes in a pipe, whose read end is returned; none ends the process."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = {signum: signal.signal(signum, _noted) for signum in (*SIGNALS, *_UNHEARD)}
    wakeup_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(read)
        os.close(write)


def _noted(signum: int, frame: object) -> None:
    """The byte in the pipe is all that is needed."""


class FrontDesk:
    """Takes requests in and answers them once they are journaled."""

    def __init__(self, selector: selectors.BaseSelector, server: Server, signals: int) -> None:
        self._selector = selector
        self._server = server
        self._signals = signals
        self._clients: list[Client] = []
        self._waiting: list[Client] = []
        self._interrupts = 0
        selector.register(server, selectors.EVENT_READ)
        selector.register(signals, selectors.EVENT_READ)

    def take_in(self, ready: set[object]) -> list[Event]:
        """Events for everything that has been asked."""
        events = self._signalled() if self._signals in ready else []
        for client in [client for client in self._clients if client in ready]:
            request = self._read(client)
            if request is not None:
                self._waiting.append(client)
                events += _events_of(request)
        if self._server in ready and (accepted := self._server.accept()) is not None:
            self._clients.append(accepted)
            self._selector.register(accepted, selectors.EVENT_READ)
        return events

    def answer(self, status: RunStatus) -> None:
        """What was asked is journaled by now: say so, with the status as it is."""
        for client in self._waiting:
            client.answer(Response(ok=True, pid=os.getpid(), status=status.model_dump(mode="json")))
        self._waiting.clear()

    def close(self) -> None:
        """Hang up on everybody."""
        for client in (*self._clients, *self._waiting):
            client.connection.close()

    def _signalled(self) -> list[Event]:
        events: list[Event] = []
        for signum in os.read(self._signals, 512):
            if signum in SIGNALS:
                self._interrupts += signum == signal.SIGINT
                by = "operator" if signum == signal.SIGINT else "preemption"
                save = self._interrupts < 2  # interrupted twice: somebody does not want to wait for a checkpoint
                events.append(StopRequested.model_validate({"at_s": time.time(), "by": by, "save": save}))
        return events

    def _read(self, client: Client) -> Request | None:
        try:
            request = client.read()
        except ControlError as error:
            self._forget(client)
            client.answer(Response(ok=False, error=error.why))
            return None
        if request is not None:
            self._forget(client)
        return request

    def _forget(self, client: Client) -> None:
        self._clients.remove(client)
        self._selector.unregister(client)


def _events_of(request: Request) -> list[Event]:
    match request:
        case StopRequest():
            return [StopRequested(at_s=time.time(), by="operator", save=request.save)]
        case CheckpointRequest():
            return [CheckpointRequested(at_s=time.time())]
        case StatusRequest():
            return []  # every answer carries the status
