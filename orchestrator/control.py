"""The control socket: the command line asks the running supervisor over a Unix socket in the run directory.

One JSON line each way. The directory is private (0700), the socket 0600, and the peer's uid is checked as well; there
are no control verbs on TCP at all.
"""

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from orchestrator.errors import ControlError, NotRunningError

_MAX_REQUEST_BYTES = 65536
_UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7)


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StatusRequest(_Message):
    """How does the run stand?"""

    kind: Literal["status"] = "status"


class StopRequest(_Message):
    """Stop the run, with a checkpoint unless told otherwise."""

    kind: Literal["stop"] = "stop"
    save: bool = True


class CheckpointRequest(_Message):
    """Save a checkpoint now."""

    kind: Literal["checkpoint"] = "checkpoint"


Request = Annotated[StatusRequest | StopRequest | CheckpointRequest, Field(discriminator="kind")]
_REQUESTS: TypeAdapter[Request] = TypeAdapter(Request)


class Response(_Message):
    """`ok` means that the request is journaled; what comes of it is seen in the status."""

    ok: bool
    error: str = ""
    pid: int = 0
    status: dict[str, Any] | None = None


@dataclass(slots=True, eq=False)
class Client:
    """A connection on the server's side, from its acceptance to its answer."""

    connection: socket.socket
    buffer: bytearray = field(default_factory=bytearray)

    def fileno(self) -> int:
        """For a selector."""
        return self.connection.fileno()

    def read(self) -> Request | None:
        """The request once it is complete; None while it is not.

        Raises:
            ControlError: it is no request, or the peer is gone or not allowed to ask.
        """
        try:
            chunk = self.connection.recv(_MAX_REQUEST_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise ControlError(error.strerror or "connection lost") from error
        self.buffer += chunk
        if b"\n" not in self.buffer:
            if not chunk or len(self.buffer) > _MAX_REQUEST_BYTES:
                raise ControlError("the request is not one line")
            return None
        try:
            return _REQUESTS.validate_json(bytes(self.buffer).partition(b"\n")[0])
        except ValidationError as error:
            raise ControlError(f"not a request ({error.error_count()} errors)") from error

    def answer(self, response: Response) -> None:
        """Answer and hang up; an asker that has gone away is no error."""
        try:
            self.connection.send(response.model_dump_json().encode() + b"\n")
        except OSError:
            pass  # the request is carried out all the same
        finally:
            self.connection.close()


class Server:
    """The supervisor's end: accepts; reading and answering are the loop's business."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        path.unlink(missing_ok=True)  # of a supervisor that was killed: the run's lock is ours
        with _short_address(path) as address:
            self._socket.bind(address)
        path.chmod(0o600)
        self._socket.listen(16)

    def fileno(self) -> int:
        """For a selector."""
        return self._socket.fileno()

    def accept(self) -> Client | None:
        """The next connection of the same user; None if there is none, or it is another's."""
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        if _UCRED.unpack(raw)[1] not in (os.geteuid(), 0):
            connection.close()
            return None
        connection.setblocking(False)
        return Client(connection)

    def close(self) -> None:
        """Stop listening and remove the socket."""
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask(control_socket: Path, request: Request, timeout_s: float = 10.0) -> Response:
    """Ask the supervisor of a run.

    Raises:
        NotRunningError: there is none.
        ControlError: it refused, or did not answer in time.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            with _short_address(control_socket) as address:
                connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NotRunningError(control_socket.parent) from error
        try:
            connection.sendall(request.model_dump_json().encode() + b"\n")
            with connection.makefile("rb") as answers:
                line = answers.readline()
            response = Response.model_validate_json(line)
        except (OSError, ValidationError) as error:
            raise ControlError(f"no answer within {timeout_s:.0f} s") from error
    if not response.ok:
        raise ControlError(response.error)
    return response


@contextmanager
def _short_address(path: Path) -> Iterator[str]:
    """An address has at most 108 bytes, a run directory's path any number: go through its descriptor."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
