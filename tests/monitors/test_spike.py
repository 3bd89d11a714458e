"""Spikes: seen at once, told apart by whether they come back, silent on healthy runs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors.diagnosis import Diagnosis
from monitors.settings import DetectSettings
from monitors.taxonomy import IncidentClass
from tests.monitors.curves import bump, classes, eval_record, healthy, records, settled, step_record, watch

_STEPS = range(1, 1201)
_noise = st.sampled_from([0.003, 0.01, 0.03, 0.05])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), noise=_noise, height=st.floats(3.0, 9.0), floor=st.floats(0.8, 3.5))
def test_a_healthy_run_is_left_alone(seed: int, noise: float, height: float, floor: float) -> None:
    """The price of a false alarm is a rollback; early loss falls fast and that is no anomaly either."""
    shape = healthy(seed, noise=noise, floor=floor, height=height)

    assert watch(Diagnosis(), records(shape, _STEPS)) == []


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000), noise=_noise, begin=st.integers(250, 900), length=st.integers(1, 30),
    height=st.floats(0.8, 5.0),
)  # fmt: skip
def test_a_spike_that_comes_back_is_transient(seed: int, noise: float, begin: int, length: int, height: float) -> None:
    """Found on its first step, and its end is the last step that was out."""
    shape = bump(healthy(seed, noise=noise), begin, length, height)

    found = watch(Diagnosis(), records(shape, _STEPS))

    assert classes(found) == [IncidentClass.TRANSIENT_SPIKE]
    assert (found[0].kind, found[0].onset_step, found[0].step) == ("suspected", begin, begin)
    assert (found[-1].kind, found[-1].end_step) == ("closed", begin + length - 1)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), noise=_noise, begin=st.integers(250, 900), height=st.floats(0.8, 6.0))
def test_one_that_stays_out_is_unrecovered_after_fifty_steps(
    seed: int, noise: float, begin: int, height: float
) -> None:
    """DESIGN 6: not back after 50 steps and not falling."""
    shape = bump(healthy(seed, noise=noise), begin, 10**9, height)

    found = watch(Diagnosis(), records(shape, _STEPS))

    assert classes(found) == [IncidentClass.UNRECOVERED_SPIKE]
    verdict = next(finding for finding in found if finding.kind == "classified")
    assert verdict.onset_step == begin
    assert verdict.step == begin + DetectSettings().recover_steps


@pytest.mark.parametrize("length", [55, 65, 140])
def test_one_that_keeps_falling_is_waited_for(length: int) -> None:
    """Real spikes healed by themselves after 55, 65 and 140 steps: those whose excess halves are given the time."""

    def shape(step: int) -> float:
        ahead = step - 400
        excess = 2.0 * (1 - ahead / length) ** 3 if 0 <= ahead < length else 0.0
        return healthy(3)(step) + excess

    assert classes(watch(Diagnosis(), records(shape, _STEPS))) == [IncidentClass.TRANSIENT_SPIKE]


def test_the_band_is_frozen_while_a_spike_goes_on() -> None:
    """Otherwise the diverged loss becomes the new normal, and the return to health a surprise."""
    diagnosis = Diagnosis()
    found = watch(diagnosis, records(bump(healthy(1), 400, 45, 2.0), range(1, 600)))

    assert classes(found) == [IncidentClass.TRANSIENT_SPIKE]
    expected = {finding.evidence["expected"] for finding in found}
    assert max(float(str(value)) for value in expected) < healthy(1, noise=0)(395)


def test_a_small_lasting_excess_is_a_level_shift() -> None:
    """Below 0.1 nats nobody rolls back: the run goes on from its new level, and is watched from there."""
    shape = bump(healthy(2, noise=0.002, floor=1.0), 1000, 10**9, 0.08)

    found = watch(Diagnosis(), records(shape, range(1, 1500)))

    assert classes(found) == [IncidentClass.LEVEL_SHIFT]
    assert found[-1].kind == "closed"


def test_a_shift_that_validation_does_not_share_is_never_a_divergence() -> None:
    """An evaluation at the expected loss, after the onset: the data changed, not the model."""
    shape = bump(healthy(5), 500, 10**9, 0.6)
    stream = [
        record
        for step in range(1, 700)
        for record in ([step_record(step, shape(step))] + ([eval_record(step, 2.0)] if step == 520 else []))
    ]

    assert classes(watch(Diagnosis(), stream)) == [IncidentClass.LEVEL_SHIFT]


def test_a_planned_change_is_a_level_shift_at_once() -> None:
    """`planned_changes` says so beforehand."""
    diagnosis = Diagnosis(planned_changes=(500,))

    found = watch(diagnosis, records(bump(healthy(5), 500, 10**9, 1.5), _STEPS))

    assert classes(found) == [IncidentClass.LEVEL_SHIFT]
    assert found[0].step <= 505


@pytest.mark.parametrize("every", [5, 10, 50])
def test_the_step_axis_is_the_truth_not_the_rows(every: int) -> None:
    """A log of every tenth step tells the same story as the run itself."""
    steps = range(0, 400 * every, every)
    begin = 200 * every
    lasting = bump(healthy(4), begin, 10**9, 1.5)
    brief = bump(healthy(4), begin, every, 1.5)

    assert classes(watch(Diagnosis(), records(brief, steps))) == [IncidentClass.TRANSIENT_SPIKE]
    assert classes(watch(Diagnosis(), records(lasting, steps))) == [IncidentClass.UNRECOVERED_SPIKE]


def test_a_heavy_tail_is_judged_by_itself() -> None:
    """One rank's losses jump by nature: lone outliers of the size already seen are not told again and again."""

    def shape(step: int) -> float:
        return healthy(8)(step) + (0.5 if step % 37 == 0 else 0.0)

    found = watch(Diagnosis(), records(shape, range(1, 4001)))

    outliers = 4000 // 37
    assert len(settled(found)) < outliers / 5


def test_more_and_more_spikes_tied_to_nothing_are_noticed_once() -> None:
    """`repeated_spikes_by_state`: at least three, and twice those of the window before."""

    def shape(step: int) -> float:
        return healthy(6, noise=0.005)(step) + (2.0 if step in (3000, 3001, 3400, 3401, 3700, 3701, 3900, 3901) else 0)

    found = classes(watch(Diagnosis(), records(shape, range(1, 4200))))

    assert found.count(IncidentClass.REPEATED_SPIKES_BY_STATE) == 1
    assert found.count(IncidentClass.TRANSIENT_SPIKE) == 4


def test_no_spike_before_the_band_can_be_trusted() -> None:
    """The first rows of a run fall by whole nats and rise again by chance."""
    losses = [7.2, 9.7, 6.8, 8.4, 8.7, 9.5, 7.9, 7.1]

    assert watch(Diagnosis(), [step_record(step, loss) for step, loss in enumerate(losses, start=1)]) == []


@pytest.mark.parametrize(("norm", "seen"), [(None, True), (0.5, False), (5.0, True)], ids=["unknown", "as ever", "out"])
def test_a_gradient_that_was_as_ever_speaks_for_chance(norm: float | None, seen: bool) -> None:
    """One row alone of seven sigmas, in a run whose norms are known or not; the evidence says what the norm was."""
    shape, at = healthy(3, noise=0.02), 2500

    def norm_at(step: int) -> float | None:
        return None if norm is None else norm if step == at else 0.5 + 0.01 * (step % 5)

    stream = [
        step_record(step, shape(step) + (0.12 if step == at else 0.0), grad_norm=norm_at(step))
        for step in range(1, at + 100)
    ]
    found = watch(Diagnosis(), stream)
    assert classes(found) == ([IncidentClass.TRANSIENT_SPIKE] if seen else [])
    if norm == 5.0:
        assert found[0].evidence["grad_norm_out_since"] == at


def test_a_gradient_alone_is_no_incident() -> None:
    """BERT's doubled for good and harmlessly; a hundredfold one that the loss does not follow is evidence only."""
    shape = healthy(3, noise=0.02)
    stream = [
        step_record(s, shape(s), grad_norm=0.5 if s < 800 else 1.0 if s != 1000 else 50.0) for s in range(1, 1500)
    ]
    assert watch(Diagnosis(), stream) == []


def test_the_gradient_left_its_band_before_the_loss() -> None:
    """The early signal (BLOOM's left four iterations before the loss peaked) is in the evidence of the spike."""
    shape = healthy(3, noise=0.02)
    stream = [
        step_record(s, shape(s) + (2.0 if 804 <= s < 820 else 0.0), grad_norm=20.0 if 800 <= s < 820 else 0.5)
        for s in range(1, 1000)
    ]
    found = watch(Diagnosis(), stream)
    assert classes(found) == [IncidentClass.TRANSIENT_SPIKE]
    assert (found[0].onset_step, found[0].evidence["grad_norm_out_since"]) == (804, 800)
