"""Which fault fires when: pure matching and counting. What a fault does is in `trainer.faults.effects`.

Counts live as long as the run. They are written before the effect, so that a fault that kills the process has
been counted, and a `once` fault does not fire again in the attempt that follows.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.config import FaultConfig, FaultKind


@dataclass(frozen=True, slots=True)
class Occasion:
    """A moment at which faults may fire. Data is the raw range [begin, end) that the batch touches."""

    attempt: int
    step: int
    begin: int = 0
    end: int = 0
    shards: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Firings:
    """How often a fault has fired, and at which step of this attempt it did last (None: only in earlier attempts)."""

    count: int = 0
    step: int | None = None


@dataclass(frozen=True, slots=True)
class Fired:
    """A fault whose effect is due now; `count` includes this time."""

    fault: FaultConfig
    count: int


def matches(fault: FaultConfig, occasion: Occasion) -> bool:
    """Whether all conditions that the fault names hold."""
    if fault.attempt is not None and occasion.attempt != fault.attempt:
        return False
    if fault.steps is not None and not fault.steps[0] <= occasion.step <= fault.steps[1]:
        return False
    if fault.data is not None and not (fault.data[0] < occasion.end and occasion.begin < fault.data[1]):
        return False
    return fault.shard is None or fault.shard in occasion.shards


def is_spent(fault: FaultConfig, before: Firings, occasion: Occasion) -> bool:
    """Whether a `once` fault has had its time: one step, or one window of steps within one attempt."""
    if not fault.once or before.count == 0:
        return False
    in_its_window = fault.steps is not None and before.step is not None and occasion.step > before.step
    return not in_its_window


def strikes(fault: FaultConfig, occasion: Occasion) -> bool:
    """Whether a fault that fires by chance does so now: a pure function of attempt and step, so it can be repeated."""
    if fault.chance >= 1.0:
        return True
    digest = hashlib.sha256(f"{fault.kind}/{occasion.attempt}/{occasion.step}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 < fault.chance


class Injector:
    """Decides and counts for one attempt. With no faults configured it costs nothing and touches no file."""

    def __init__(self, faults: tuple[FaultConfig, ...], counts_file: Path) -> None:
        self._faults = faults
        self._file = counts_file
        self._firings = _read(counts_file) if faults else {}

    def configured(self, *kinds: FaultKind) -> bool:
        """Whether any fault of these kinds is configured at all."""
        return any(self.of(*kinds))

    def of(self, *kinds: FaultKind) -> list[FaultConfig]:
        """The faults of these kinds."""
        return [fault for fault in self._faults if fault.kind in kinds]

    def due(self, occasion: Occasion, kinds: Iterable[FaultKind]) -> list[Fired]:
        """Faults of `kinds` that fire now; they are counted, durably for other processes, before this returns."""
        wanted = frozenset(kinds)
        fired = []
        for index, fault in enumerate(self._faults):
            key = f"{index}-{fault.kind}"
            before = self._firings.get(key, Firings())
            if fault.kind not in wanted or not matches(fault, occasion) or not strikes(fault, occasion):
                continue
            if not is_spent(fault, before, occasion):
                self._firings[key] = Firings(before.count + 1, occasion.step)
                fired.append(Fired(fault, before.count + 1))
        if fired:
            _write(self._file, self._firings)
        return fired


def _read(path: Path) -> dict[str, Firings]:
    if not path.exists():
        return {}
    return {key: Firings(count) for key, count in json.loads(path.read_bytes()).items()}


def _write(path: Path, firings: Mapping[str, Firings]) -> None:
    """Replace the file as a whole; it must outlive this process, not the machine, so nothing is synced."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps({key: value.count for key, value in firings.items()}))
    os.replace(fresh, path)
