"""The liveness page: one small memory-mapped file per rank, written by the trainer's main loop only.

A background thread that beats proves nothing (research: it goes on while the main thread hangs), so there is
none. Phases carry their start on CLOCK_MONOTONIC, which all processes of one boot share.
"""

import mmap
import os
import struct
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

_LAYOUT = struct.Struct("<8sIIQQIxxxxddQ")  # magic, version, pid, sequence, step, phase, started, hint, sequence
_MAGIC = b"LWLIVE\0\1"


class Phase(StrEnum):
    """What the main loop is doing; each has its own deadline (run.yaml, `deadlines`)."""

    SPAWN = "spawn"
    IMPORT = "import"
    LOAD = "load"
    COMPILE = "compile"
    WARM_UP = "warm_up"
    TRAIN = "train"
    EVALUATE = "evaluate"
    SAVE = "save"
    LEAVE = "leave"


_PHASES = tuple(Phase)


@dataclass(frozen=True, slots=True)
class Liveness:
    """One reading of the page. Times are seconds on CLOCK_MONOTONIC; `deadline_hint_s` 0 means none."""

    pid: int
    sequence: int
    step: int
    phase: Phase
    phase_started_s: float
    deadline_hint_s: float


class LivenessWriter:
    """The trainer's side: `enter` at a phase change, `beat` at every step (which restarts the phase's clock)."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, mmap.PAGESIZE)
            self._page = mmap.mmap(descriptor, mmap.PAGESIZE)
        finally:
            os.close(descriptor)
        self._sequence = 0
        self._step = 0
        self._phase = Phase.IMPORT
        self.enter(Phase.IMPORT)

    def enter(self, phase: Phase, deadline_hint_s: float = 0.0) -> None:
        """Say that `phase` begins now; a hint asks for a longer deadline before a known long operation."""
        self._phase = phase
        self._write(deadline_hint_s)

    def beat(self, step: int) -> None:
        """Say that the main loop has come to `step`."""
        self._step = step
        self._write(0.0)

    def _write(self, hint_s: float) -> None:
        self._sequence += 1
        phase = _PHASES.index(self._phase)
        _LAYOUT.pack_into(
            self._page, 0, _MAGIC, 1, os.getpid(), self._sequence, self._step, phase, time.monotonic(), hint_s,
            self._sequence,
        )  # fmt: skip

    def close(self) -> None:
        """Unmap the page; the file stays for the post-mortem."""
        self._page.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_liveness(path: Path) -> Liveness | None:
    """The page as it is now; None if it is not there yet or is being written at this instant."""
    try:
        raw = path.read_bytes()[: _LAYOUT.size]
    except FileNotFoundError:
        return None
    if len(raw) < _LAYOUT.size:
        return None
    magic, _, pid, head, step, phase, started_s, hint_s, tail = _LAYOUT.unpack(raw)
    if magic != _MAGIC or head != tail:
        return None
    return Liveness(pid, head, step, _PHASES[phase], started_s, hint_s)
