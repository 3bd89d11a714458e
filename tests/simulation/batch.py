"""Many runs: which profile and seed each has, and what their goodput comes to."""

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from tests.simulation.goodput import BUCKETS, daly_goodput
from tests.simulation.invariants import Broken
from tests.simulation.profile import PROFILES, Profile
from tests.simulation.world import Result, World

#: One in fifty at the stress rates, which take ten times as long.
_STRESS_PROCESS, _NODE_ALL, _NODE_PROCESS, _STRESS_ALL = PROFILES
_ROUND = 100


@dataclass(frozen=True, slots=True)
class Failed:
    """A run that broke what must hold, and what replays it."""

    why: str


def profile_of(number: int) -> Profile:
    """Of the so many-th run."""
    if number % _ROUND == 0:
        return _STRESS_PROCESS
    if number % _ROUND == _ROUND // 2:
        return _STRESS_ALL
    return _NODE_PROCESS if number % 2 else _NODE_ALL


def simulate(profile: Profile, seed: int) -> Result | Failed:
    """One run. Collecting garbage takes a fifth of the time otherwise; what a run leaves goes at its end."""
    gc.disable()
    try:
        return World(profile, seed).run()
    except Broken as error:
        return Failed(str(error))
    finally:
        gc.enable()
        gc.collect()


def daly_of(profile: Profile) -> float:
    """What Daly's formula gives for process faults: a hang costs its detection before its restart."""
    rates = {fault: 1.0 / every_s for fault, every_s in profile.every_s.items() if fault in ("death", "hang")}
    total = sum(rates.values())
    restart_s = profile.restart_s + profile.hang_limit_s * rates["hang"] / total
    return daly_goodput(profile.stall_s, 1.0 / total, restart_s)


def goodput_problems(results: Sequence[Result]) -> list[str]:
    """Targets that are missed, in words."""
    problems = []
    for profile in PROFILES:
        shares = sorted(one.goodput for one in results if one.profile == profile.name)
        if not shares:
            continue
        if profile.goodput_mean is not None and fmean(shares) < profile.goodput_mean:
            problems.append(f"{profile.name}: mean goodput {fmean(shares):.4f}, wanted {profile.goodput_mean}")
        if profile.goodput_p01 is not None and percentile(shares, 0.1) < profile.goodput_p01:
            problems.append(f"{profile.name}: p0.1 of goodput {shares[0]:.4f}, wanted {profile.goodput_p01}")
    return problems


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which so many per cent lie; the least where there are too few to tell."""
    return ordered[int(len(ordered) * percent / 100)]


def mean_shares(results: Iterable[Result]) -> dict[str, float]:
    """Where the time went, on average."""
    shares = [one.shares for one in results]
    return {bucket: fmean(one[bucket] for one in shares) for bucket in BUCKETS}
