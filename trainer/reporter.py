"""Records out of the trainer: appended to a file, which is the truth, and sent as a datagram, which may be lost.

Whoever reads is woken by the datagram; what a step reports in the ordinary course waits for others of its kind, so that
a run of fast steps costs its supervisor a transaction for several of them, not for each.
Nothing here can stall the loop but the local disk. Whether anybody reads the socket also tells whether there is a
supervisor (the orphan rule), so the time of the last accepted datagram is kept.
"""

import errno
import os
import socket
import time
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import ValidationError

from monitors.records import Record, StepRecord, parse_record
from trainer.contract.paths import KeeperRole, RunPaths

R = TypeVar("R", bound=Record)

_TAIL_BYTES = 1 << 16
_TOGETHER = 16  # ordinary steps that may share a datagram: no incident is noticed later than by so many steps,
_TOGETHER_S = 1.0  # or than by this
#: The socket is bound, only its buffer is full or the record too long for a datagram: somebody is there.
_ANSWERED = (errno.EAGAIN, errno.EMSGSIZE, errno.ENOBUFS)


class Reporter:
    """Numbers and writes the records of one sender: an attempt, or a process that keeps the snapshots of all."""

    def __init__(self, paths: RunPaths, attempt: int) -> None:
        """The records of an attempt's rank 0."""
        self._attempt = attempt
        self._open(paths.records(attempt), paths.records_socket)

    @classmethod
    def of_keeper(cls, paths: RunPaths, role: KeeperRole) -> Self:
        """The records of a keeper, which name the attempt that each is about; a killed one's are continued."""
        reporter = cls.__new__(cls)
        reporter._attempt = None
        reporter._open(paths.keeper_records(role), paths.records_socket)
        return reporter

    _attempt: int | None

    def _open(self, file: Path, bell: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._seq = _last_seq(self._file)
        self._unsaid = 0
        self._said_s = -_TOGETHER_S
        self._socket = _DatagramSender(bell)

    @property
    def answered_s(self) -> float:
        """Monotonic time at which a supervisor was last seen to hold the socket (at first: the start)."""
        return self._socket.answered_s

    def emit(self, kind: type[R], **fields: Any) -> R:
        """Write one record of a kind and send it.

        Raises:
            pydantic.ValidationError: the fields do not fit the kind.
            OSError: the record could not be written to the run directory.
        """
        if self._attempt is not None:
            fields["attempt"] = self._attempt
        record = kind(seq=self._seq + 1, at_s=time.time(), **fields)
        line = record.model_dump_json().encode()
        _write_all(self._file, line + b"\n")
        self._seq += 1
        self._say(record, line)
        return record

    def _say(self, record: Record, line: bytes) -> None:
        self._unsaid += 1
        now_s = time.monotonic()
        waits = self._unsaid < _TOGETHER and now_s - self._said_s < _TOGETHER_S
        if waits and isinstance(record, StepRecord) and record.is_ordinary:
            return
        self._unsaid, self._said_s = 0, now_s
        self._socket.send(line)

    def close(self) -> None:
        """Release file and socket."""
        os.close(self._file)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _DatagramSender:
    """Non-blocking datagrams to a path of any length (addresses are limited to 108 bytes, hence /proc/self/fd)."""

    def __init__(self, path: Path) -> None:
        self.answered_s = time.monotonic()
        self._directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        self._address = f"/proc/self/fd/{self._directory}/{path.name}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def send(self, payload: bytes) -> None:
        """Send, or don't: the file has it anyway."""
        try:
            self._socket.sendto(payload, self._address)
        except OSError as error:
            if error.errno not in _ANSWERED:
                return
        self.answered_s = time.monotonic()

    def close(self) -> None:
        """Release the descriptors."""
        self._socket.close()
        os.close(self._directory)


def _last_seq(descriptor: int) -> int:
    """The number of the newest record of a file; a line that a death tore is ended, so that it spoils no other."""
    raw = b""
    size = os.fstat(descriptor).st_size
    while len(raw) < size and raw.rstrip(b"\n").count(b"\n") < 2:
        begin = max(0, size - len(raw) - _TAIL_BYTES)
        raw = os.pread(descriptor, size - len(raw) - begin, begin) + raw
    if raw and not raw.endswith(b"\n"):
        _write_all(descriptor, b"\n")
    for line in reversed(raw.splitlines()):
        try:
            return parse_record(line).seq
        except ValidationError:
            continue
    return 0


def _write_all(descriptor: int, data: bytes) -> None:
    """A short write (a disk that fills up) is continued until the disk says why."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
