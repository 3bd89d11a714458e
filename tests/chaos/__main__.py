"""`python -m tests.chaos --cycles N --seed S`: disturb a real run N times. `make chaos`."""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from tests.chaos.cycles import Report, run_chaos, small_disk
from tests.chaos.world import World

_DISK_MB = 96
_CYCLE_MB = 0.5  # what a cycle adds for good: journal and records of its steps


def main() -> int:
    """Run and tell; the last line says how many cycles were survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    disk_mb = round(_DISK_MB + _CYCLE_MB * arguments.cycles)
    with tempfile.TemporaryDirectory(prefix="longwatch-chaos-") as name, small_disk(Path(name), disk_mb) as disk:
        world = World(Path(name) / "world", disk or Path(name))
        try:
            report = run_chaos(
                world,
                arguments.seed,
                arguments.cycles,
                own_disk=disk is not None,
                tell=lambda text: print(text, flush=True),
            )
        finally:
            world.close()
    _tell(report)
    print(f"{report.cycles - len(report.wrong)} passed, {len(report.wrong)} failed")
    return 1 if report.wrong else 0


def _tell(report: Report) -> None:
    print(f"{report.steps} steps in {report.seconds:.0f} s")
    for name, took in sorted(report.recovered_s.items()):
        print(f"  {name}: {len(took)} times, {statistics.median(took):.1f} s to progress (at most {max(took):.1f})")
    if report.samples:
        rss = max(sample.rss_bytes for sample in report.samples) / 1e6
        descriptors = [sample.descriptors for sample in report.samples]
        print(f"  supervisor: at most {rss:.0f} MB, {min(descriptors)} to {max(descriptors)} descriptors")
    for wrong in report.wrong:
        print(f"WRONG {wrong}")


if __name__ == "__main__":
    sys.exit(main())
