"""A file of lines that others append to, read on from an offset. A line counts once it is complete."""

import os
from pathlib import Path

_READ_BYTES = 1 << 20  # of one poll: bounds its time and what becomes of it


class Tail:
    """Reads complete lines as they come; `offset` is where it goes on."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset

    @classmethod
    def from_end(cls, path: Path) -> "Tail":
        """Only what is written from now on."""
        try:
            return cls(path, path.stat().st_size)
        except FileNotFoundError:
            return cls(path)

    def poll(self) -> list[bytes]:
        """Lines that have become complete, up to about a megabyte of them, without their ends."""
        raw = self._read()
        complete = raw[: raw.rfind(b"\n") + 1]
        self.offset += len(complete)
        return complete.splitlines()

    def _read(self) -> bytes:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        try:
            if os.fstat(descriptor).st_size <= self.offset:
                return b""
            raw = os.pread(descriptor, _READ_BYTES, self.offset)
            while b"\n" not in raw:  # one line longer than a read: take it whole
                more = os.pread(descriptor, _READ_BYTES, self.offset + len(raw))
                if not more:
                    break
                raw += more
            return raw
        finally:
            os.close(descriptor)
