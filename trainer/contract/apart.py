"""A remote storage behind a process of its own: the same calls, asked over a socket pair.

The libraries that talk to S3 take more memory than a whole supervisor, run threads in it, and hang in their own ways.
Apart from it they cost it nothing, and one that hangs or dies is a store that did not answer: the next call starts
another process. That process ends when its socket closes, so none outlives who started it by more than one call.

A message is a JSON header and raw bytes, each preceded by its length. Secrets pass through the environment only.
"""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.contract.backends import Backend
from trainer.contract.config import StoreConfig
from trainer.contract.store import StoreConfigInvalid, StoreError, meaning

_LENGTHS = struct.Struct("!IQ")
_STARTS_WITHIN_S = 60.0  # interpreter and libraries, on a machine that is busy with a start
_MARGIN_S = 10.0  # beyond the call's own deadline: only a process that hangs needs it
_ENDS_WITHIN_S = 5.0
_FAILURES: dict[str, type[StoreError]] = {kind.__name__: kind for kind in StoreError.__subclasses__()}


class _Channel:
    """One end of the socket pair."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, header: Mapping[str, Any], data: bytes = b"") -> None:
        """Send one message."""
        text = json.dumps(header).encode()
        self._socket.sendall(_LENGTHS.pack(len(text), len(data)) + text)
        if data:
            self._socket.sendall(data)

    def receive(self, timeout_s: float | None = None) -> tuple[dict[str, Any], bytes] | None:
        """The next message; None when the other end is closed."""
        self._socket.settimeout(timeout_s)
        lengths = self._exactly(_LENGTHS.size)
        if lengths is None:
            return None
        num_text, num_data = _LENGTHS.unpack(lengths)
        text, data = self._exactly(num_text), self._exactly(num_data)
        return None if text is None or data is None else (json.loads(text), data)

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _exactly(self, size: int) -> bytes | None:
        read = bytearray()
        while len(read) < size:
            chunk = self._socket.recv(min(size - len(read), 1 << 20))
            if not chunk:
                return None
            read += chunk
        return bytes(read)


class ApartBackend:
    """The storage as seen from outside. What goes wrong there is raised as the `StoreError` that it means."""

    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, config: StoreConfig, url: str, prefix: str, env: Mapping[str, str]) -> None:
        self._opening = {"config": config.model_dump(mode="json"), "url": url, "prefix": prefix}
        self._env = {**os.environ, **env}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: _Channel | None = None
        self._open()  # what is wrong with the configuration is said now

    def create(self, key: str, data: bytes, timeout_s: float) -> None:
        """See `Backend`."""
        self._ask("create", timeout_s, data, key=key)

    def put_file(self, key: str, path: Path, timeout_s: float) -> None:
        """See `Backend`."""
        self._ask("put_file", timeout_s, key=key, path=str(path.absolute()))

    def read(self, key: str, start: int, end: int | None, timeout_s: float) -> bytes:
        """See `Backend`."""
        return self._ask("read", timeout_s, key=key, start=start, end=end)[1]

    def size(self, key: str, timeout_s: float) -> int:
        """See `Backend`."""
        return int(self._ask("size", timeout_s, key=key)[0])

    def list(self, prefix: str, timeout_s: float) -> list[tuple[str, int]]:
        """See `Backend`."""
        return [(key, size) for key, size in self._ask("list", timeout_s, key=prefix)[0]]

    def make_place(self) -> None:
        """A bucket is made by a person."""

    def delete(self, key: str, timeout_s: float) -> None:
        """See `Backend`."""
        self._ask("delete", timeout_s, key=key)

    def abort_unfinished(self, prefix: str, timeout_s: float) -> int:
        """See `Backend`."""
        return int(self._ask("abort_unfinished", timeout_s, key=prefix)[0])

    def local_path(self, key: str) -> Path | None:
        """Remote objects lie on no disk of ours."""
        return None

    def close(self) -> None:
        """End the process, also in the middle of a call that hangs."""
        if self._lock.acquire(timeout=_ENDS_WITHIN_S):
            try:
                self._end(_ENDS_WITHIN_S)
            finally:
                self._lock.release()
        elif (process := self._process) is not None:
            process.kill()  # whoever waits for its answer is told so, and reaps it

    def _ask(self, call: str, timeout_s: float, data: bytes = b"", **arguments: Any) -> tuple[Any, bytes]:
        with self._lock:
            if self._channel is None:
                self._open()
            header = {"call": call, "timeout_s": timeout_s, "arguments": arguments}
            return self._answer(header, data, timeout_s + _MARGIN_S)

    def _open(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainer.contract.apart", str(theirs.fileno())],
                env=self._env, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), start_new_session=True,
            )  # fmt: skip
        self._channel = _Channel(ours)
        try:
            self._answer(self._opening, b"", _STARTS_WITHIN_S)
        except StoreError:  # it has said why, and left
            self._end(_ENDS_WITHIN_S)
            raise

    def _answer(self, header: Mapping[str, Any], data: bytes, timeout_s: float) -> tuple[Any, bytes]:
        assert self._channel is not None
        try:
            self._channel.send(header, data)
            answer = self._channel.receive(timeout_s)
        except OSError:
            self._end(0.0)
            raise
        if answer is None:
            self._end(0.0)
            raise ConnectionResetError("the process that talks to it has died; another is started")
        said, bytes_ = answer
        if "failed" in said:
            raise _FAILURES[said["failed"]](said["url"], said["why"], said["key"])
        return said["value"], bytes_

    def _end(self, patience_s: float) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            try:
                self._process.wait(patience_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


def _serve(channel: _Channel) -> None:
    """Answer until nobody asks any more."""
    from trainer.contract.remote import open_remote  # here: who starts this process must not load it

    opening = channel.receive()
    if opening is None:
        return
    said, _ = opening
    try:
        backend = open_remote(StoreConfig.model_validate(said["config"]), said["url"], said["prefix"], os.environ)
    except StoreConfigInvalid as error:
        channel.send(_failure(error))
        return
    channel.send({"value": None})
    while (asked := channel.receive()) is not None:
        header, data = asked
        key = header["arguments"]["key"]
        try:
            value, answer = _carry_out(backend, header["call"], header["timeout_s"], header["arguments"], data)
        except backend.errors as error:
            channel.send(_failure(meaning(said["url"], key, error)))
        else:
            channel.send({"value": value}, answer)


def _failure(error: StoreError) -> dict[str, Any]:
    return {"failed": type(error).__name__, "url": error.url, "why": error.why, "key": error.key}


def _carry_out(
    backend: Backend, call: str, timeout_s: float, arguments: Mapping[str, Any], data: bytes
) -> tuple[Any, bytes]:
    key = arguments["key"]
    match call:
        case "create":
            backend.create(key, data, timeout_s)
        case "put_file":
            backend.put_file(key, Path(arguments["path"]), timeout_s)
        case "delete":
            backend.delete(key, timeout_s)
        case "read":
            return None, backend.read(key, arguments["start"], arguments["end"], timeout_s)
        case "size":
            return backend.size(key, timeout_s), b""
        case "list":
            return backend.list(key, timeout_s), b""
        case "abort_unfinished":
            return backend.abort_unfinished(key, timeout_s), b""
        case _:
            raise ValueError(f"{call!r} is no call of a storage")
    return None, b""


if __name__ == "__main__":
    _serve(_Channel(socket.socket(fileno=int(sys.argv[1]))))
