"""What benchmarks share: interleaved rounds, medians with their spread, the result line and its files.

A figure of one case means little on a noisy machine; so cases take turns within a round, and what is compared are
ratios of medians of the same rounds.
"""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Stats:
    """Of one case over all rounds."""

    min: float
    median: float
    max: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Stats":
        """Of at least one value."""
        return cls(min(values), statistics.median(values), max(values), len(values))

    def as_figure(self) -> dict[str, float]:
        """For the result line."""
        return {"min": self.min, "median": self.median, "max": self.max}


def measure(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Stats]:
    """Each case once a round, its place moving on from round to round; a case returns its own figure."""
    values: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for number in range(rounds):
        for name in (*names[number % len(names) :], *names[: number % len(names)]):
            values[name].append(cases[name]())
    return {name: Stats.of(found) for name, found in values.items()}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": [round(one, 2) for one in os.getloadavg()],
    }


def report(name: str, figures: Mapping[str, Any], targets: Mapping[str, Any], met: bool, table: str) -> None:
    """Write the result files and print the table and, last, the result line."""
    here = machine()
    result = {
        "bench": name,
        "figures": dict(figures),
        "targets": dict(targets),
        "met": met,
        "machine": here,
        "commit": _commit(),
    }
    RESULTS.mkdir(exist_ok=True)
    stem = stem_of(name)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(f"# {name}\n\n{table}\n")
    print(table)
    print(json.dumps(result))


def stem_of(name: str) -> Path:
    """Of the result files of today on this machine, without a suffix."""
    return RESULTS / f"{name}-{_slug(_cpu_name())}-{datetime.now(UTC):%Y%m%d}"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split()[:4])


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()
