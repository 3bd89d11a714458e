"""Climbs without a jump, and losses that are too good to be true."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors.diagnosis import Diagnosis
from monitors.records import Record
from monitors.taxonomy import IncidentClass
from tests.monitors.curves import classes, climb, eval_record, healthy, records, settled, step_record, watch


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000), noise=st.sampled_from([0.003, 0.02, 0.05]), begin=st.integers(500, 900),
    slope=st.floats(0.002, 0.004),
)  # fmt: skip
def test_a_climb_is_one_slow_divergence(seed: int, noise: float, begin: int, slope: float) -> None:
    """One incident, whose onset is dated back to where the loss was lowest."""
    found = watch(Diagnosis(), records(climb(healthy(seed, noise=noise), begin, slope), range(1, begin + 450)))

    assert classes(found) == [IncidentClass.SLOW_DIVERGENCE]
    verdict = next(finding for finding in found if finding.kind == "classified")
    assert begin - 250 <= verdict.onset_step <= begin + 150
    assert verdict.step - begin < 400


def test_a_climb_that_goes_on_is_told_again() -> None:
    """What was done about it did not help: a new incident, whose onset is that of the first."""
    found = settled(watch(Diagnosis(), records(climb(healthy(1), 600, 0.002), range(1, 1500))))

    first, second = list(found.values())[:2]
    assert [first.cls, second.cls] == [IncidentClass.SLOW_DIVERGENCE] * 2
    assert second.onset_step == first.onset_step
    assert second.step - first.step < 600


def test_it_is_over_when_the_loss_falls_again() -> None:
    """Closed, and the next climb is another one."""

    def shape(step: int) -> float:
        return healthy(1, noise=0.005)(step) + 0.005 * (min(max(0, step - 600), 150) - min(max(0, step - 750), 150))

    found = settled(watch(Diagnosis(), records(shape, range(1, 1200))))

    assert [(finding.cls, finding.kind) for finding in found.values()] == [(IncidentClass.SLOW_DIVERGENCE, "closed")]


def test_a_climb_within_an_overlay_is_its_own_trace() -> None:
    """A lowered LR that ramps back lets the loss rise a little by intention."""
    diagnosis = Diagnosis()
    diagnosis.note_overlays(((500, 900),))

    assert watch(diagnosis, records(climb(healthy(1, noise=0.005), 600, 0.001), range(1, 900))) == []


def _leak(follows: bool) -> list[Record]:
    stream: list[Record] = []
    for step in range(1, 700):
        loss = healthy(1)(step) * (0.5 if step >= 500 else 1.0)
        stream.append(step_record(step, loss))
        if step % 50 == 0:
            stream.append(eval_record(step, loss if follows else healthy(1)(step)))
    return stream


def test_a_loss_that_validation_does_not_follow_is_implausibly_low() -> None:
    """Leaked targets: half the loss from one step to the next, and validation where it was."""
    found = watch(Diagnosis(), _leak(follows=False))

    assert classes(found) == [IncidentClass.LOSS_IMPLAUSIBLY_LOW]
    assert next(finding for finding in found if finding.kind == "classified").onset_step == 500


def test_one_that_validation_follows_is_a_success() -> None:
    """Dismissed: grokking, or easier data, but nothing is wrong."""
    found = watch(Diagnosis(), _leak(follows=True))

    assert found
    assert settled(found) == {}


@pytest.mark.parametrize("share", [0.9, 0.85])
def test_a_little_lower_is_nothing(share: float) -> None:
    """A fall of less than a fifth has many innocent reasons."""
    stream = [step_record(s, healthy(1)(s) * (share if s >= 500 else 1.0)) for s in range(1, 600)]

    assert IncidentClass.LOSS_IMPLAUSIBLY_LOW not in classes(watch(Diagnosis(), stream))
