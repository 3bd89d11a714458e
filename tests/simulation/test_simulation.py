"""Weeks of simulated training: whatever goes wrong, what must hold holds. A failure says which profile and seed."""

from collections import Counter
from dataclasses import replace

import pytest

from tests.simulation.batch import Failed, daly_of, goodput_problems, profile_of, simulate
from tests.simulation.goodput import daly_goodput
from tests.simulation.profile import DAY_S, PROFILES
from tests.simulation.world import Result, World

_PARTS = 8
_RUNS = 200
_SHORT = replace(
    PROFILES[1], name="short", weeks=0.03,
    every_s={"death": 2400.0, "hang": 9000.0, "reboot": 9000.0, "outage": 9000.0, "preemption": 9000.0},
)  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("part", range(_PARTS))
def test_eight_weeks_hold(part: int) -> None:
    """Every run finishes with nothing lost, nothing read twice, nobody stuck; goodput is what it should be."""
    numbers = range(part * _RUNS // _PARTS, (part + 1) * _RUNS // _PARTS)
    results = [simulate(profile_of(number), number) for number in numbers]

    assert [one.why for one in results if isinstance(one, Failed)] == []
    assert goodput_problems([one for one in results if isinstance(one, Result)]) == []


def test_a_seed_replays_exactly() -> None:
    """The same run to the last event, also where a supervisor is killed half way through something."""
    profile = replace(PROFILES[1], weeks=2.0)
    worlds = [World(profile, 5), World(profile, 5)]
    results = [world.run() for world in worlds]

    assert results[0] == results[1]
    assert worlds[0].kill_points == worlds[1].kill_points > 100


@pytest.mark.long
def test_a_supervisor_may_be_killed_at_every_place() -> None:
    """Before a transaction, after it, between two effects, around a spawn: at each place once, the run ends well."""
    world = World(_SHORT, 1)
    world.run()
    for point in range(1, world.kill_points + 1):
        killed = World(_SHORT, 1)
        killed.kill_at_point = point
        killed.run()
        assert killed.fired["supervisor killed at a point"] == 1, f"place {point} was never come to"
    assert world.kill_points > 50


def test_every_fault_strikes() -> None:
    """The faults of the profile with everything fire, so that what holds has held against them."""
    profile = replace(PROFILES[3], weeks=2.0)
    faults = sum((World(profile, seed).run().faults for seed in range(3)), start=Counter[str]())

    wanted = {
        "death", "hang", "outage", "reboot", "operator", "preemption", "clock_jump", "data_away", "disk_full",
        "torn_read", "stale_listing", "lost_response", "supervisor killed at a point", "disease", "damaged_checkpoint",
    }  # fmt: skip
    assert wanted - faults.keys() == set()


def test_dalys_formula() -> None:
    """The figures known for M = 3.09 h and a stall of 2 s: 0.971 with R = 120 s; and its limits."""
    best = daly_goodput(2.0, 3.09 * 3600, 60.0)

    assert round(daly_goodput(2.0, 3.09 * 3600, 120.0), 3) == 0.971
    assert best > daly_goodput(2.0, 3.09 * 3600, 60.0, interval_s=600.0)
    assert daly_of(PROFILES[0]) < best
    assert daly_goodput(2.0, 400 * DAY_S, 60.0) > 0.999


def test_a_few_runs_of_each_kind() -> None:
    """What `make test` has time for; the two hundred are among the long tests, ten thousand in `make simulate`."""
    results = [simulate(profile_of(number), number) for number in range(1001, 1021)]
    assert [one.why for one in results if isinstance(one, Failed)] == []
