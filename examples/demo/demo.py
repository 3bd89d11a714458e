"""`make demo`: a run that survives a kill, a divergence and a poisoned shard, on the text of this machine.

Prepares byte-level shards from Python's own sources, launches `run.yaml` beside this file in a new numbered directory,
and then checks from the run's own facts that each planted fault was met as it should be. Exit 0 only if all held.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.config import resolve
from orchestrator.report.incidents import cost_text, incident_lines, total_cost
from trainer.contract.config import RunConfig

HERE = Path(__file__).parent
MIN_BYTES = 9_000_000  # after a share is held out, at least 8 MB are to train on
SHARD_TOKENS = 400_000  # at least 16 shards of the above
MAX_VALIDATION_LOSS = 2.3  # nats a byte; bigrams alone give about 2.4

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold at the end, and what was found."""

    holds: bool
    what: str


def main() -> int:
    """Run the demonstration; the exit code says whether everything held."""
    began_s = time.monotonic()
    root = new_directory()
    console.print(f"demo: files go to {root}", markup=False)
    code = prepare(root)
    if code:
        return code
    for name in ("run.yaml", "policy.yaml"):
        shutil.copyfile(HERE / name, root / name)
    code = longwatch("launch", str(root / "run.yaml"))
    config = resolve(root / "run.yaml").config
    assert config.run_dir is not None
    checks = [Check(code == 0, f"the run finished (exit code {code})"), *judge(Path(config.run_dir), config)]
    summarise(Path(config.run_dir), checks, time.monotonic() - began_s)
    return 0 if all(check.holds for check in checks) else 1


def new_directory() -> Path:
    """The next free numbered directory below the working directory."""
    number = 1
    while True:
        root = Path.cwd() / f"demo-run-{number}"
        try:
            root.mkdir()
        except FileExistsError:
            number += 1
        else:
            return root


def longwatch(*arguments: str) -> int:
    """The command line, as a user would type it, on this process's own terminal."""
    with subprocess.Popen([sys.executable, "-m", "orchestrator.cli", *arguments]) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # Ctrl-C reaches it as well: it saves, and then it ends


def facts(*arguments: str) -> dict[str, Any]:
    """What a verb says with --json."""
    command = [sys.executable, "-m", "orchestrator.cli", *arguments, "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


# -- data -------------------------------------------------------------------------------------------------------------


def prepare(root: Path) -> int:
    """Make token shards of the sources on this machine, a share of the files held out."""
    options = ["--suffix", ".py", "--shard-tokens", str(SHARD_TOKENS), "--validation-fraction", "0.04"]
    return longwatch("data", "prepare", *sources(), "--out", str(root / "data" / "train"), *options)


def sources() -> list[str]:
    """Python's standard library; where a system ships little of it, its tests and what is installed beside it too."""
    library, installed = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    parts = [path for path in sorted(library.iterdir()) if path.name not in ("site-packages", "dist-packages", "test")]
    chosen: list[str] = []
    total = 0
    for part in [*parts, library / "test", *sorted(installed.iterdir())]:
        size = sum(file.stat().st_size for file in python_files(part))
        if size and (total < MIN_BYTES or part in parts):
            chosen.append(str(part))
            total += size
    return chosen


def python_files(path: Path) -> list[Path]:
    """Sources at or below a path."""
    if path.is_dir():
        return sorted(path.rglob("*.py"))
    return [path] if path.suffix == ".py" else []


# -- judgement --------------------------------------------------------------------------------------------------------


def judge(run_dir: Path, config: RunConfig) -> Iterator[Check]:
    """Compare what the run says of itself with what was planted."""
    incidents = facts("incidents", str(run_dir))["incidents"]
    status = facts("status", str(run_dir))
    validation = status["validation"][1] if status["validation"] else float("inf")
    yield Check(validation < MAX_VALIDATION_LOSS, f"validation loss {validation:.3f} below {MAX_VALIDATION_LOSS}")
    yield from judge_crash(incidents)
    yield from judge_divergence(incidents, status)
    yield from judge_shard(incidents, status, config)


def judge_crash(incidents: list[dict[str, Any]]) -> Iterator[Check]:
    """The kill was seen as one, and the run went on."""
    crashes = [incident for incident in incidents if incident["class"] == "crash"]
    killed = len(crashes) == 1 and crashes[0]["cause"] == "killed" and "restart" in crashes[0]["decision"]
    yield Check(killed, "the killed trainer was restarted")


def judge_divergence(incidents: list[dict[str, Any]], status: dict[str, Any]) -> Iterator[Check]:
    """The divergence was confirmed, rolled back, skipped, and the learning rate is back on its schedule."""
    spikes = [incident for incident in incidents if incident["class"] == "unrecovered_spike"]
    wanted = {"evaluate", "roll_back", "skip_data", "lower_lr"}
    met = len(spikes) == 1 and wanted <= set(spikes[0]["decision"]) and spikes[0]["validation"] == "confirmed"
    yield Check(met, "the divergence was confirmed by an evaluation, rolled back, its data skipped, the LR lowered")
    yield Check(status["lr_factor"] == 1.0, "the learning rate is back on its schedule")


def judge_shard(incidents: list[dict[str, Any]], status: dict[str, Any], config: RunConfig) -> Iterator[Check]:
    """The garbage shard, and no other, was quarantined."""
    planted = [fault.shard for fault in config.faults if fault.kind == "bad_shard"]
    found = [shard for i in incidents if i["class"] == "repeated_spikes_by_shards" for shard in i["shards"]]
    yield Check(found == planted, f"quarantined shards {found}, planted {planted}")
    yield Check(len(status["quarantined_shards"]) == len(planted), f"in force: {status['quarantined_shards']}")


def summarise(run_dir: Path, checks: list[Check], seconds: float) -> None:
    """Every incident with its cost, the checks, the place of the files."""
    incidents = facts("incidents", str(run_dir))["incidents"]
    console.rule("incidents")
    for line in incident_lines(incidents):
        console.print(line)
    console.print(f"cost in all: {cost_text(total_cost(incidents))}", markup=False)
    console.rule("checks")
    for check in checks:
        console.print(("ok      " if check.holds else "FAILED  ") + check.what, markup=False)
    console.print(f"took {seconds:.0f} s; the run's files: {run_dir}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
