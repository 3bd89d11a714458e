"""`python -m tests.soak --hours N --seed S`: round after round until the time is over. `make soak`."""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.cycles import run_chaos, small_disk
from tests.chaos.world import World
from tests.powercut.work import cut, work
from tests.simulation.batch import Failed, profile_of, simulate

_RUNS, _CUTS, _CYCLES = 60, 200, 25
_DISK_MB = 96


def _simulated(seed: int) -> Iterator[str]:
    for number in range(seed * _RUNS, (seed + 1) * _RUNS):
        result = simulate(profile_of(number), number)
        if isinstance(result, Failed):
            yield result.why


def _power_cuts(seed: int) -> Iterator[str]:
    yield from cut(work(seed, batches=300), seed, _CUTS)


def _chaos(seed: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="longwatch-soak-") as name, small_disk(Path(name), _DISK_MB) as disk:
        world = World(Path(name) / "world", disk or Path(name))
        try:
            yield from run_chaos(world, seed, _CYCLES, own_disk=disk is not None, tell=lambda _: None).wrong
        finally:
            world.close()


def main() -> int:
    """Rounds until the time is over; the last line counts the parts of rounds in which nothing was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1000)
    arguments = parser.parse_args()
    end_s, seed, passed, failed = time.monotonic() + 3600 * arguments.hours, arguments.seed, 0, 0
    while time.monotonic() < end_s:
        for name, part in (("simulate", _simulated), ("power cuts", _power_cuts), ("chaos", _chaos)):
            begun_s = time.monotonic()
            wrong = list(part(seed))
            passed, failed = passed + (not wrong), failed + bool(wrong)
            print(f"seed {seed} {name}: {len(wrong)} wrong, {time.monotonic() - begun_s:.0f} s", flush=True)
            for one in wrong:
                print(f"WRONG {one}", flush=True)
        seed += 1
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
