"""`make simulate`: many runs on all seeds from one on, a line for each failure, and a page of where the time went."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from statistics import fmean
from time import perf_counter

from benchmarks.common import RESULTS, machine, stem_of
from tests.simulation.batch import Failed, daly_of, goodput_problems, mean_shares, percentile, profile_of, simulate
from tests.simulation.page import write_page
from tests.simulation.profile import PROFILES
from tests.simulation.world import Result, World

_TOLD_EVERY = 200


def _one(number: int) -> Result | Failed:
    return simulate(profile_of(number), number)


def _results(numbers: range, jobs: int) -> Iterator[Result | Failed]:
    if jobs == 1:
        yield from map(_one, numbers)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(_one, numbers, chunksize=5)


def _replay(name: str, seed: int) -> int:
    """One run told as it goes on, for whoever looks into a failure."""
    profile = next(profile for profile in PROFILES if profile.name == name)
    result = World(profile, seed, trace=True).run()
    print(f"goodput {result.goodput:.4f} over {result.weeks:.1f} weeks, {result.attempts} attempts")
    return 0


def _figures(results: Sequence[Result]) -> dict[str, dict[str, object]]:
    figures: dict[str, dict[str, object]] = {}
    for profile in PROFILES:
        mine = [one for one in results if one.profile == profile.name]
        if mine:
            shares = sorted(one.goodput for one in mine)
            figures[profile.name] = {
                "runs": len(mine), "goodput_mean": round(fmean(shares), 5),
                "goodput_p0.1": round(percentile(shares, 0.1), 5), "goodput_min": round(shares[0], 5),
                "daly_process_faults": round(daly_of(profile), 5),
                "attempts_mean": round(fmean(one.attempts for one in mine), 1),
                "shares": {bucket: round(share, 5) for bucket, share in mean_shares(mine).items()},
            }  # fmt: skip
    return figures


def _run(numbers: range, jobs: int) -> int:
    began_s = perf_counter()
    results: list[Result] = []
    failed = 0
    for done, one in enumerate(_results(numbers, jobs), start=1):
        if isinstance(one, Failed):
            failed += 1
            print(f"FAILED {one.why}", flush=True)
        else:
            results.append(one)
        if done % _TOLD_EVERY == 0:
            print(f"{done} of {len(numbers)} runs, {perf_counter() - began_s:.0f} s", flush=True)
    missed = goodput_problems(results)
    figures = _figures(results)
    faults = dict(sum((one.faults for one in results), start=Counter[str]()).most_common())
    report = {
        "bench": "simulation", "runs": len(numbers), "first_seed": numbers.start, "failed": failed, "missed": missed,
        "seconds": round(perf_counter() - began_s, 1), "jobs": jobs, "figures": figures, "faults": faults,
        "machine": machine(),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    stem = stem_of("simulation")
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    write_page(stem.with_suffix(".html"), figures)
    for line in missed:
        print(f"MISSED {line}")
    for name, figure in figures.items():
        print(f"{name}: goodput {figure['goodput_mean']}, least {figure['goodput_min']}, {figure['runs']} runs")
    print(f"{len(numbers) - failed} passed, {failed} failed")
    return 1 if failed or missed else 0


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the others follow")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--replay", metavar="PROFILE", choices=[profile.name for profile in PROFILES])
    given = parser.parse_args()
    if given.replay is not None:
        return _replay(given.replay, given.seed)
    return _run(range(given.seed, given.seed + given.runs), given.jobs)


if __name__ == "__main__":
    sys.exit(main())
