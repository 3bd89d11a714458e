"""The control socket: asked by the command line, answered by the supervisor's loop, by nobody else."""

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.control import (
    CheckpointRequest,
    Request,
    Response,
    Server,
    StatusRequest,
    StopRequest,
    ask,
)
from orchestrator.errors import ControlError, NotRunningError


@contextmanager
def _serving(path: Path, seen: list[Request]) -> Iterator[None]:
    """A loop like the supervisor's, in a thread: answers everything until the block ends."""
    ended = threading.Event()

    def loop(server: Server) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            while not ended.is_set():
                for key, _ in selector.select(0.02):
                    if key.fileobj is server:
                        client = server.accept()
                        if client is not None:
                            selector.register(client, selectors.EVENT_READ, client)
                        continue
                    client = key.data
                    try:
                        request = client.read()
                    except ControlError as error:
                        selector.unregister(client)
                        client.answer(Response(ok=False, error=error.why))
                        continue
                    if request is not None:
                        selector.unregister(client)
                        seen.append(request)
                        client.answer(Response(ok=True, pid=42, status={"step": 7}))

    with Server(path) as server:
        thread = threading.Thread(target=loop, args=(server,))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def test_requests_arrive_and_are_answered(tmp_path: Path) -> None:
    """Also below a path that is longer than a socket address may be."""
    path = tmp_path / ("d" * 100) / "control.sock"
    path.parent.mkdir()
    seen: list[Request] = []
    with _serving(path, seen):
        assert path.stat().st_mode & 0o777 == 0o600
        for request in (StatusRequest(), StopRequest(save=False), CheckpointRequest()):
            assert ask(path, request) == Response(ok=True, pid=42, status={"step": 7})
    assert seen == [StatusRequest(), StopRequest(save=False), CheckpointRequest()]
    assert not path.exists()


def test_nonsense_is_refused_and_harms_nobody(tmp_path: Path) -> None:
    """Not JSON, not a request, endless, or hung up: the next asker is served."""
    path = tmp_path / "control.sock"
    seen: list[Request] = []
    with _serving(path, seen):
        for nonsense in (b"hello\n", b'{"kind": "format_disk"}\n', b"x" * 70_000):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(10)
                connection.connect(str(path))
                connection.sendall(nonsense)
                answer = connection.recv(4096)
                assert b'"ok":false' in answer
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
        assert ask(path, StatusRequest()).ok
    assert seen == [StatusRequest()]


def test_a_request_in_pieces_is_put_together(tmp_path: Path) -> None:
    """One line, however it was sent."""
    path = tmp_path / "control.sock"
    with _serving(path, []), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        for piece in (b'{"kind"', b': "sta', b'tus"}', b"\n"):
            connection.sendall(piece)
        assert b'"ok":true' in connection.recv(4096)


def test_without_a_supervisor_that_is_said(tmp_path: Path) -> None:
    """No socket, or one that a killed supervisor left behind."""
    path = tmp_path / "control.sock"
    with pytest.raises(NotRunningError, match="longwatch launch"):
        ask(path, StatusRequest())
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with pytest.raises(NotRunningError):
        ask(path, StatusRequest())


def test_a_supervisor_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    """A bounded time, then an error."""
    path = tmp_path / "control.sock"
    with Server(path), pytest.raises(ControlError, match="no answer"):
        ask(path, StatusRequest(), timeout_s=0.1)
