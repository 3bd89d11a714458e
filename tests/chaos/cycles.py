"""Cycle after cycle: disturb, see the run go on, look for strays; at the end compare with an undisturbed run."""

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.journal import Journal
from tests.chaos.faults import choose
from tests.chaos.reference import undisturbed, weights
from tests.chaos.world import Sample, World
from trainer.contract.config import StoreConfig
from trainer.contract.fence import lineage
from trainer.contract.store import open_store

_QUIET_S = 15.0  # for a process that was told to go, on a busy machine
_GROWTH_DESCRIPTORS = 8
_GROWTH_BYTES = 16 << 20


@dataclass
class Report:
    """What came of all cycles."""

    cycles: int = 0
    steps: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    recovered_s: dict[str, list[float]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def run_chaos(world: World, seed: int, cycles: int, *, own_disk: bool, tell: Callable[[str], None]) -> Report:
    """Disturb a run so many times, then compare. Everything that is wrong is in the report."""
    chance, report, begun_s = random.Random(seed), Report(), time.monotonic()
    world.launch()
    world.await_progress()
    for number in range(1, cycles + 1):
        time.sleep(chance.uniform(0.0, 0.6))  # anywhere in a step, a save, an upload
        kind = choose(chance, own_disk=own_disk)
        fault_s = time.monotonic()
        kind.fault(world, chance)
        world.await_progress()
        took_s = time.monotonic() - fault_s
        report.cycles, report.kinds[kind.name] = number, report.kinds[kind.name] + 1
        report.recovered_s.setdefault(kind.name, []).append(took_s)
        report.wrong += [f"seed {seed}, cycle {number}, {kind.name}: {what}" for what in _look(world, report)]
        tell(f"{number} {kind.name}: {took_s:.1f} s")
    report.steps = world.stop()
    report.seconds = time.monotonic() - begun_s
    report.wrong += [f"seed {seed}: after the end {name} is left" for name in _left(world)]
    report.wrong += [f"seed {seed}: {what}" for what in _compare(world, report.steps)]
    return report


def _look(world: World, report: Report) -> Iterator[str]:
    """After a cycle: no process too many, and a supervisor that holds no more than before."""
    end_s = time.monotonic() + _QUIET_S
    while strays := world.strays():
        if time.monotonic() > end_s:
            yield f"more than one process of {strays}"
            break
        time.sleep(0.05)
    sample = world.sample()
    if sample is None:
        return
    report.samples.append(sample)
    same = [one for one in report.samples if one.pid == sample.pid]
    settled = same[min(5, len(same) - 1)]  # the first ones open what a run needs
    if sample.descriptors > settled.descriptors + _GROWTH_DESCRIPTORS:
        yield f"the supervisor's descriptors grew from {settled.descriptors} to {sample.descriptors}"
    if sample.rss_bytes > settled.rss_bytes + _GROWTH_BYTES:
        yield f"the supervisor's memory grew from {settled.rss_bytes} to {sample.rss_bytes} bytes"


def _left(world: World) -> list[str]:
    end_s = time.monotonic() + _QUIET_S
    while left := sorted(world.members().values()):
        if time.monotonic() > end_s:
            return left
        time.sleep(0.05)
    return []


def _compare(world: World, steps: int) -> Iterator[str]:
    """The last commit of the surviving lineage against a run that nothing disturbed."""
    config = StoreConfig.model_validate(world.config["store"])
    with closing(open_store(config, world.root, str(world.config["name"]))) as store:
        commit = lineage(store).commits[-1]
        if not commit.startswith(f"{steps:012d}-"):
            yield f"the store's newest commit is {commit}, the run ended at step {steps}"
            return
        found = weights(store, commit)
    with tempfile.TemporaryDirectory() as name:
        expected, losses = undisturbed(world, steps, Path(name))
    if found != expected:
        with closing(Journal.read_only(world.paths.database)) as journal:
            steps_run = {row["step"]: row["loss"] for row in journal.steps(surviving=True)}
        first = next((step for step, loss in sorted(losses.items()) if steps_run.get(step) != loss), None)
        yield f"the weights at step {steps} are not those of an undisturbed run; losses differ from step {first} on"


@contextmanager
def small_disk(root: Path, megabytes: int) -> Iterator[Path | None]:
    """A file system of its own to lay the run on, where that is permitted; else None."""
    import subprocess

    place = root / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield place if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
