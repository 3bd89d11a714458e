"""Records of the running attempt, each delivered exactly once and in order.

The file that the trainer appends to is the truth; the datagram that it sends afterwards serves only as the bell that
says there is something to read. So a dropped datagram, a supervisor that was away, and an attempt that died between
the two all come to the same thing: the file is read on from where it was read last. A line counts once it is complete.
"""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import structlog
from pydantic import ValidationError

from monitors.records import Record, parse_record
from monitors.tail import Tail
from orchestrator.journal import Cursor
from trainer.contract.paths import KEEPER_ROLES, KeeperRole, RunPaths

_DATAGRAM_BYTES = 1 << 16
_MAX_BELLS = 4096
_LOG = structlog.get_logger(__name__)


class Bell:
    """The datagram socket of a run: becomes readable when a record was written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        path.unlink(missing_ok=True)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._socket.bind(f"/proc/self/fd/{directory}/{path.name}")  # an address has at most 108 bytes
            path.chmod(0o600)
        finally:
            os.close(directory)

    def fileno(self) -> int:
        """For a selector."""
        return self._socket.fileno()

    def drain(self) -> None:
        """Empty the socket without blocking."""
        for _ in range(_MAX_BELLS):
            try:
                self._socket.recv(_DATAGRAM_BYTES)
            except BlockingIOError:
                return

    def close(self) -> None:
        """Close and remove the socket."""
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def keeper_number(role: KeeperRole) -> int:
    """Attempts count from 1, so 0 and below are free for the senders that belong to none."""
    return -KEEPER_ROLES.index(role)


@dataclass(slots=True)
class Inbox:
    """Reads the records of one sender from a cursor on: of an attempt, or of a keeper (`role`), about any attempt."""

    paths: RunPaths
    attempt: int
    cursor: Cursor = field(default_factory=Cursor)
    rejected: int = 0
    role: KeeperRole | None = None

    @classmethod
    def of_keeper(cls, paths: RunPaths, role: KeeperRole, cursor: Cursor) -> Self:
        """The records of a keeper. `attempt` is then the number under which the journal keeps its cursor.

        A power cut may take the end of the file, which is not synced as the journal is: what is left was read before,
        and the keeper will number what it writes from there on.
        """
        file = paths.keeper_records(role)
        size = file.stat().st_size if file.exists() else 0
        if size < cursor.offset:
            _LOG.warning("records_lost_by_the_disk", role=role, read_bytes=cursor.offset, left_bytes=size)
            cursor = Cursor(0, size)
        return cls(paths, keeper_number(role), cursor, role=role)

    def poll(self) -> list[Record]:
        """Records that are complete by now and were not delivered yet, up to about a megabyte of them."""
        file = self.paths.records(self.attempt) if self.role is None else self.paths.keeper_records(self.role)
        tail = Tail(file, self.cursor.offset)
        records = list(self._parsed(tail.poll()))
        seq = records[-1].seq if records else self.cursor.seq
        self.cursor = Cursor(seq, tail.offset)
        return records

    def _parsed(self, lines: list[bytes]) -> Iterator[Record]:
        last = self.cursor.seq
        for line in lines:
            try:
                record = parse_record(line)
            except ValidationError as error:
                self._reject("not a record of this version", error.error_count())
                continue
            if self.role is None and record.attempt != self.attempt:
                self._reject("names another attempt", record.attempt)
            elif record.seq > last:  # a repeated number was delivered already
                if record.seq != last + 1:
                    _LOG.warning("records_missing", attempt=self.attempt, after=last, before=record.seq)
                last = record.seq
                yield record

    def _reject(self, why: str, detail: int) -> None:
        self.rejected += 1
        if self.rejected & (self.rejected - 1) == 0:  # the 1st, 2nd, 4th, ...: a broken sender must not fill the log
            _LOG.error("record_rejected", attempt=self.attempt, why=why, detail=detail, count=self.rejected)
