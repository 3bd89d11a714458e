"""The bounds of the test that ties spikes to shards, by simulation: its power, its false convictions, its symmetry."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.diagnosis.score import wilson
from monitors.detect.evalues import Hit, e_value
from monitors.detect.shards import ShardDetector
from monitors.settings import DetectSettings
from monitors.window import Band
from tests.monitors.shard_worlds import FAMILIES, SHARDS, World, batch, convictions

_BAND = Band(anchor_step=0.0, level=3.0, slope=0.0, scale=0.05, reach=1.0)


@pytest.mark.parametrize("chance", [0.02, 0.3])
def test_an_e_value_crosses_one_in_a_as_seldom_as_it_promises(chance: float) -> None:
    """Ville's bound at a = 1/20 under the null, looked at after each of 60 events: 2,000 paths, seed 1."""
    rng = random.Random(1)
    crossed = 0
    for _ in range(2000):
        hits: list[Hit] = []
        peak = 0.0
        for event in range(1, 61):
            if rng.random() < chance:
                hits.append(Hit(step=event, event=event, read=len(hits) + 1, chance=chance))
                peak = max(peak, e_value(hits))
        crossed += peak >= 20
    assert wilson(crossed, 2000)[0] <= 0.05


@pytest.mark.parametrize(("width", "trials"), [(1, 12), (8, 40), (64, 40)])
def test_a_poisoned_shard_of_a_thousand_is_named_after_three_spikes(width: int, trials: int) -> None:
    """Of 1, 8 or 64 shards in a batch; 4 to 8 nats over the trend, seeds 0 to `trials` - 1, noise in turn.

    One sequence of a shard alone, of 64 that are heavy-tailed, may take a fourth: that noise is left out there.
    """
    quick = 0
    for seed in range(trials):
        chooser = random.Random(seed)
        bad, nats = chooser.randrange(SHARDS), chooser.uniform(4.0, 8.0)
        family = ("normal", "kinds", "normal" if width == 64 else "heavy")[seed % 3]
        world = World(seed, width, family, poison=((bad, nats),))
        found = convictions(world, 10 * SHARDS // width, until=1)
        assert [conviction.shard for conviction, _ in found] in ([bad], [])
        quick += bool(found) and found[0][1][bad] <= 3
    assert quick >= 0.95 * trials


def test_innocent_shards_are_convicted_in_fewer_than_one_run_of_a_hundred() -> None:
    """Runs without poison over all noises, widths and orders, with per-shard losses and without: 0 of 432 runs.

    Hard samples, a state that spikes and bursts of it, kinds: the upper end of Wilson's interval is below 1 %.
    """
    cases = itertools.product(FAMILIES, (1, 8, 64), ("shuffled", "windows"), (True, False))
    worlds = [
        World(50_000 + seed, width, family, composition, losses=losses)
        for family, width, composition, losses in cases
        for seed in range(6)
    ]
    convicted = sum(bool(convictions(world, 90, until=1)) for world in worlds)
    assert wilson(convicted, len(worlds))[1] < 0.01


def test_company_alone_convicts_nobody() -> None:
    """Without losses, shards that are always read together cannot be told apart, and none of them is taken."""
    detector = ShardDetector(DetectSettings())
    detector.declare(100)
    rng = random.Random(3)
    found = []
    for step in range(1, 400):
        shards = [1, 2] if step % 20 == 0 else rng.sample(range(3, 100), 2)
        record = batch(step, dict.fromkeys(shards, (4, math.nan)))
        found.append(detector.observe(record, _BAND))
        if step % 20 == 0:
            found.append(detector.on_onset(step))
    assert not any(found)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_membership_alone_names_a_shard_whose_damage_shows_later(lag: int) -> None:
    """No per-shard losses at all: the batches before the spikes have one shard in common."""
    detector = ShardDetector(DetectSettings())
    detector.declare(SHARDS)
    rng = random.Random(lag)
    found = []
    for step in range(1, 600):
        shards = rng.sample(range(1, SHARDS), 4) + ([0] if step % 90 == 0 else [])
        record = batch(step, dict.fromkeys(shards, (4, math.nan)))
        detector.observe(record, _BAND)
        if step > lag and (step - lag) % 90 == 0:
            found.append(detector.on_onset(step))
    convicted = [conviction for conviction in found if conviction is not None]
    assert [conviction.shard for conviction in convicted] == [0]
    assert int(str(convicted[0].evidence["spikes"])) <= 5


def test_a_rolled_back_spike_does_not_speak_twice() -> None:
    """The same batch, re-run after a rollback, is no new evidence; without the rollback it would convict."""
    for rewound in (False, True):
        detector = ShardDetector(DetectSettings())
        detector.declare(SHARDS)
        rng, found = random.Random(5), []
        for _ in range(6):
            for step in range(1, 41):
                shards = {shard: (8, 24.0 + rng.gauss(0, 0.2)) for shard in rng.sample(range(1, SHARDS), 8)}
                if step == 40:
                    shards[0] = (8, 64.0)
                found.append(detector.observe(batch(step, shards), _BAND))
            if rewound:
                detector.rewind(0, [])
        assert any(found) is not rewound


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.sampled_from([2, 8]), shift=st.integers(1, SHARDS - 1))
def test_names_of_shards_do_not_matter(seed: int, width: int, shift: int) -> None:
    """Shards renamed one to one are convicted at the same steps under their new names."""
    verdicts = []
    for renamed in (False, True):
        detector, found = ShardDetector(DetectSettings()), []
        world = World(seed, width, "hard_samples", poison=tuple((shard, 6.0) for shard in range(0, SHARDS, 50)))
        for record, spikes in world.steps(150):
            names = {s: (s + shift) % SHARDS if renamed else s for s in record.shards}
            seen = record.model_copy(update={"shards": {names[s]: told for s, told in record.shards.items()}})
            convicted = detector.observe(seen, _BAND) or (detector.on_onset(seen.step) if spikes else None)
            if convicted is not None:
                found.append((record.step, (convicted.shard - shift) % SHARDS if renamed else convicted.shard))
        verdicts.append(found)
    assert verdicts[0] == verdicts[1]


def test_what_is_remembered_is_bounded_by_the_shards() -> None:
    """A long unstable run makes no shard's memory grow beyond its bound."""
    detector = ShardDetector(DetectSettings())
    for record, _ in World(1, 8, "state").steps(400):
        detector.observe(record.model_copy(update={"shards": {s % 10: t for s, t in record.shards.items()}}), _BAND)
        detector.on_onset(record.step)
    state = detector.state
    assert len(state.shards) == 10
    assert len(state.levels) <= 256
    assert len(state.noise) <= 256
    assert all(len(hits) <= 16 for known in state.shards.values() for hits in (known.loud, *known.onsets))
