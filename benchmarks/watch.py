"""What watching costs: processor time and memory of a supervisor at 1 to 1,000 records a second.

The records come from a process that trains nothing (`benchmarks.sender`) through the whole real path: file, datagram,
engine, journal, metrics. Shares are of one core. Memory is what the kernel counts as resident, of the supervisor alone:
with a store on S3 (a real SeaweedFS) the process that talks to it is counted apart. Targets: DESIGN 15.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Stats, report
from tests import s3
from tests.runs import tiny_config, write_corpus

RATES = (1, 10, 100, 1000)
_TARGET_SHARE = 0.005  # at 10 records a second
_TARGET_MB = 60.0
_STEADY_S = 10.0
_ENDS_WITHIN_S = 120.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one supervisor over one stretch."""

    share: float
    rss_mb: float
    apart_mb: float


@contextmanager
def _supervised(root: Path, corpus: Path, rate: int, store: dict[str, Any]) -> Iterator[int]:
    """The pid of a supervisor that watches a sender."""
    launch = {"command": [sys.executable, "-m", "benchmarks.sender", str(rate)]}
    config = tiny_config(corpus, steps=10**7, launch=launch, store=store, checkpoint={"every_steps": 10**6})
    root.mkdir(parents=True)
    (root / "run.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "orchestrator.cli", "launch", str(root / "run.yaml")]
    with (root / "out").open("wb") as output:
        process = subprocess.Popen(command, cwd=root, stdout=output, stderr=output, env=_environment())
        try:
            yield process.pid
        finally:
            process.terminate()
            process.wait(_ENDS_WITHIN_S)


def _environment() -> dict[str, str]:
    here = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": here}


def _seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _apart_mb(pid: int) -> float:
    """Of the process that talks to the store, if there is one."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(
        _resident_mb(int(one)) for one in children if b"contract.apart" in Path(f"/proc/{one}/cmdline").read_bytes()
    )


def _measured(root: Path, corpus: Path, rate: int, store: dict[str, Any], stretch_s: float) -> Cost:
    with _supervised(root, corpus, rate, store) as pid:
        time.sleep(_STEADY_S)
        before_s, began_s = _seconds(pid), time.monotonic()
        time.sleep(stretch_s)
        share = (_seconds(pid) - before_s) / (time.monotonic() - began_s)
        return Cost(share, _resident_mb(pid), _apart_mb(pid))


def _table(shares: dict[str, Stats], memory: dict[str, Stats]) -> str:
    lines = ["| records a second | share of a core: median (spread) | resident MB |", "|---|---|---|"]
    lines += [
        f"| {case} | {one.median:.2%} ({one.min:.2%} to {one.max:.2%}) | {memory[case].median:.1f} |"
        for case, one in shares.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watch", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stretch-s", type=float, default=30.0)
    chosen = parser.parse_args()
    os.environ |= {s3.KEY_ENV: s3.ACCESS_KEY, s3.SECRET_ENV: s3.SECRET_KEY}
    costs: dict[str, list[Cost]] = {}
    with tempfile.TemporaryDirectory() as name, s3.seaweedfs(Path(name) / "weed") as server:
        root = Path(name)
        corpus = write_corpus(root / "corpus")
        remote = server.config().model_dump(mode="json", exclude_defaults=True)
        for number in range(chosen.rounds):
            for rate in RATES:
                cost = _measured(root / f"{number}-{rate}", corpus, rate, {"url": "./store"}, chosen.stretch_s)
                costs.setdefault(str(rate), []).append(cost)
            store = {**remote, "url": f"{remote['url']}/{number}"}
            cost = _measured(root / f"{number}-s3", corpus, 10, store, chosen.stretch_s)
            costs.setdefault("10, store on S3", []).append(cost)
    shares = {case: Stats.of([one.share for one in found]) for case, found in costs.items()}
    memory = {case: Stats.of([one.rss_mb for one in found]) for case, found in costs.items()}
    figures = {
        "share_of_a_core": {case: one.as_figure() for case, one in shares.items()},
        "resident_mb": {case: one.as_figure() for case, one in memory.items()},
        "store_process_mb": max(one.apart_mb for found in costs.values() for one in found),
    }
    targets = {"share_at_10": _TARGET_SHARE, "resident_mb": _TARGET_MB}
    met = shares["10"].median <= _TARGET_SHARE and all(one.median <= _TARGET_MB for one in memory.values())
    report("watch", figures, targets, met, _table(shares, memory))


if __name__ == "__main__":
    main()
