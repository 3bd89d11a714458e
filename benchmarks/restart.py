"""From a SIGKILL of the trainer to the end of its first new step: with the standby, without, and under torchrun.

`python -m benchmarks.restart [--rounds N]`. Each round starts each case anew, lets it train until it is steady (and the
standby warm), kills the training process several times, and takes the time until the next step record is written. The
same tiny GPT and the same corpus in all; torchrun restarts a plain script that saves with torch.save and loads what it
saved. Where Longwatch's time goes is told from its journal: death noticed, process there, state loaded, first step.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import Stats, report
from orchestrator.journal import Journal
from tests.runs import tiny_config, write_corpus
from trainer.contract.paths import RunPaths

STANDBY, COLD, TORCHRUN = "longwatch, standby", "longwatch, cold", "torchrun --max-restarts"
PHASES = ("noticed", "spawned", "loaded", "first step")
_TARGET_SPEED_UP = 8.0
_KILLS = 3
_STEADY_S = 3.0
_WARM_S = 15.0  # imports of a standby beside a trainer on two cores
_WITHIN_S = 120.0
_CONFIG = {
    "steps": 10_000_000,
    "evaluate": {"every_steps": 1_000_000, "sequences": 16},
    "schedule": {"kind": "constant"},
}


@dataclass(frozen=True, slots=True)
class Restart:
    """Seconds from the kill to the first new step, and to what happened on the way."""

    total_s: float
    phases: tuple[float, ...] = ()


def _wait(find: Callable[[], float | None], what: str) -> float:
    end_s = time.monotonic() + _WITHIN_S
    while time.monotonic() < end_s:
        found = find()
        if found is not None:
            return found
        time.sleep(0.002)
    raise TimeoutError(f"{what} not within {_WITHIN_S:.0f} s")


def _records(path: Path, kind: str) -> Iterator[float]:
    """When records of a kind were made."""
    if path.exists():
        for line in path.read_bytes().rpartition(b"\n")[0].splitlines():
            row = json.loads(line)
            if row["kind"] == kind:
                yield row["at_s"]


def _first_record(paths: RunPaths, attempt: int) -> float | None:
    return next(_records(paths.records(attempt), "step"), None)


@contextmanager
def _launched(root: Path, corpus: Path, *, standby: bool) -> Iterator[RunPaths]:
    config = tiny_config(corpus, **_CONFIG, launch={"threads": 1, "standby": standby})
    root.mkdir()
    (root / "run.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "orchestrator.cli", "launch", str(root / "run.yaml")]
    with (root / "out").open("wb") as output:
        process = subprocess.Popen(command, cwd=root, stdout=output, stderr=output)
        try:
            yield RunPaths(root / "runs" / "tiny")
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(_WITHIN_S)


def _longwatch(root: Path, corpus: Path, *, standby: bool) -> list[Restart]:
    """Kill one run several times."""
    restarts = []
    with _launched(root, corpus, standby=standby) as paths:
        for attempt in range(1, _KILLS + 1):
            _wait(partial(_first_record, paths, attempt), "the first step")
            time.sleep(_WARM_S if standby else _STEADY_S)
            with closing(Journal.read_only(paths.database)) as journal:
                row = journal.last_attempt()
                assert row is not None
            killed_s = time.time()
            os.kill(row["pid"], signal.SIGKILL)
            first_s = _wait(partial(_first_record, paths, attempt + 1), "the first new step")
            time.sleep(0.5)  # the journal has it too
            restarts.append(Restart(first_s - killed_s, _phases(paths, attempt, killed_s, first_s)))
    return restarts


def _phases(paths: RunPaths, attempt: int, killed_s: float, first_s: float) -> tuple[float, ...]:
    with closing(Journal.read_only(paths.database)) as journal:
        events = list(journal.events())
    noticed = next(e.at_s for e in events if e.kind == "attempt_exited" and e.attempt == attempt)
    spawned = next(e.at_s for e in events if e.kind == "attempt_spawned" and e.attempt == attempt + 1)
    loaded = next(_records(paths.records(attempt + 1), "started"))
    moments = (killed_s, noticed, spawned, loaded, first_s)
    return tuple(later - earlier for earlier, later in pairwise(moments))


def _torchrun(root: Path, corpus: Path) -> list[Restart]:
    """The same under torchrun: its agent starts the script again."""
    root.mkdir()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
        "--max-restarts", "100", "-m", "benchmarks.torchrun_script", str(corpus), str(root),
    ]  # fmt: skip
    restarts = []
    with (root / "out").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            for start in range(_KILLS):
                _wait(partial(_first_step, root, start), "the first step")
                time.sleep(_STEADY_S)
                killed_s = time.time()
                os.kill(int((root / f"pid-{start}").read_text()), signal.SIGKILL)
                first_s = _wait(partial(_first_step, root, start + 1), "the first new step")
                restarts.append(Restart(first_s - killed_s))
        finally:
            process.terminate()
            process.wait(_WITHIN_S)
    return restarts


def _first_step(root: Path, start: int) -> float | None:
    path = root / f"first-{start}"
    return float(path.read_text()) if path.exists() and path.read_text() else None


def _table(stats: dict[str, Stats], phases: dict[str, list[float]]) -> str:
    lines = ["| case | seconds from the kill to the first new step: median (spread) |", "|---|---|"]
    lines += [f"| {name} | {one.median:.2f} ({one.min:.2f} to {one.max:.2f}) |" for name, one in stats.items()]
    lines += ["", f"| case | {' | '.join(PHASES)} |", "|---|" + "---|" * len(PHASES)]
    lines += [f"| {name} | {' | '.join(f'{one:.2f}' for one in found)} |" for name, found in phases.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restart", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    found: dict[str, list[Restart]] = {STANDBY: [], COLD: [], TORCHRUN: []}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        corpus = write_corpus(root / "corpus")
        for number in range(rounds):
            found[STANDBY] += _longwatch(root / f"warm-{number}", corpus, standby=True)
            found[COLD] += _longwatch(root / f"cold-{number}", corpus, standby=False)
            found[TORCHRUN] += _torchrun(root / f"torchrun-{number}", corpus)
    stats = {case: Stats.of([one.total_s for one in restarts]) for case, restarts in found.items()}
    phases = {
        case: [statistics.median(one.phases[place] for one in found[case]) for place in range(len(PHASES))]
        for case in (STANDBY, COLD)
    }
    speed_up = stats[COLD].median / stats[STANDBY].median
    figures: dict[str, Any] = {
        "seconds": {case: one.as_figure() for case, one in stats.items()},
        "phases_s": {case: dict(zip(PHASES, found, strict=True)) for case, found in phases.items()},
        "cold_over_standby": speed_up,
        "torchrun_over_standby": stats[TORCHRUN].median / stats[STANDBY].median,
    }
    targets = {"cold_over_standby": _TARGET_SPEED_UP}
    report("restart", figures, targets, speed_up >= _TARGET_SPEED_UP, _table(stats, phases))


if __name__ == "__main__":
    main()
