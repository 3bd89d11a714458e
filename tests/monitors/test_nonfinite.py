"""Non-finite values: a signal of their own, decided first, told apart by what came before."""

import math

import pytest

from monitors.diagnosis import Diagnosis
from monitors.records import ActivationRecord, ActivationStats, Record
from monitors.taxonomy import IncidentClass
from tests.monitors.curves import Shape, classes, healthy, records, step_record, watch

_NAN = math.nan


def _nan_from(step: int, base: Shape | None = None) -> Shape:
    shape = base or healthy(1)
    return lambda number: shape(number) if number < step else _NAN


@pytest.mark.parametrize("first", [1, 2, 5, 20])
def test_at_the_very_beginning(first: int) -> None:
    """`immediate_nan`: there is nothing to go back to."""
    assert classes(watch(Diagnosis(), records(_nan_from(first), range(1, 40)))) == [IncidentClass.IMMEDIATE_NAN]


@pytest.mark.parametrize("value", [_NAN, math.inf, -math.inf])
def test_out_of_a_healthy_run(value: float) -> None:
    """`sudden_nan`, at the first such loss that was not skipped."""
    found = watch(Diagnosis(), records(lambda step: value if step >= 500 else healthy(1)(step), range(1, 510)))

    assert classes(found) == [IncidentClass.SUDDEN_NAN]
    assert (found[0].onset_step, found[0].step) == (500, 500)


def test_after_a_plateau() -> None:
    """Flat, then non-finite: dead or saturated layers as a rule."""

    def flat(step: int) -> float:
        return healthy(1)(min(step, 200)) + 1e-3 * math.sin(step)

    assert classes(watch(Diagnosis(), records(_nan_from(800, flat), range(1, 805)))) == [IncidentClass.PLATEAU_THEN_NAN]


def test_after_dead_units_were_seen() -> None:
    """The activations say so even where the loss still fell."""
    stats = {"mid": ActivationStats(rms=0.1, max=1.0, dead=0.9, saturated=0.0)}
    stream: list[Record] = list(records(healthy(1), range(1, 300)))
    stream.append(ActivationRecord(seq=1, attempt=1, at_s=0.0, step=299, groups=stats))
    stream += records(_nan_from(300), range(300, 305))

    assert classes(watch(Diagnosis(), stream)) == [IncidentClass.PLATEAU_THEN_NAN]


def test_soon_after_a_load() -> None:
    """`nan_after_load`: within ten steps of a restore."""
    diagnosis = Diagnosis()
    watch(diagnosis, records(healthy(1), range(1, 400)))
    diagnosis.rewind(300)

    assert classes(watch(diagnosis, records(_nan_from(304), range(301, 310)))) == [IncidentClass.NAN_AFTER_LOAD]


def test_skipped_updates_do_no_harm_until_they_are_many() -> None:
    """Decided on the device: a lone skipped update is nothing, three in a row are an incident."""
    lone, streak = Diagnosis(), Diagnosis()
    for diagnosis in (lone, streak):
        watch(diagnosis, records(healthy(1), range(1, 400)))

    once = [step_record(400, _NAN, skipped=True), *records(healthy(1), range(401, 430))]
    thrice = [step_record(step, _NAN, skipped=True) for step in range(400, 403)]

    assert watch(lone, once) == []
    assert classes(watch(streak, thrice)) == [IncidentClass.SUDDEN_NAN]


def test_more_than_one_percent_of_skipped_updates_are_an_incident() -> None:
    """Eleven of a thousand steps, none of them next to each other."""
    stream = [
        step_record(step, _NAN, skipped=True) if step >= 300 and step % 20 == 0 else step_record(step, healthy(1)(step))
        for step in range(1, 600)
    ]

    found = watch(Diagnosis(), stream)

    assert classes(found)[0] == IncidentClass.SUDDEN_NAN
    assert found[0].step == 300 + 10 * 20


def test_a_non_finite_gradient_counts_even_if_the_loss_is_finite() -> None:
    """It was not skipped, so the weights are gone."""
    stream = [*records(healthy(1), range(1, 300)), step_record(300, 2.5, grad_norm=math.inf)]

    found = watch(Diagnosis(), stream)

    assert classes(found) == [IncidentClass.SUDDEN_NAN]
    assert "gradient" in found[0].why


def test_it_is_over_after_ten_finite_steps() -> None:
    """And the band has learned nothing from it."""
    found = watch(Diagnosis(), records(lambda step: _NAN if 400 <= step < 405 else healthy(1)(step), range(1, 500)))

    assert classes(found) == [IncidentClass.SUDDEN_NAN]
    assert (found[-1].kind, found[-1].end_step, found[-1].step) == ("closed", 404, 414)
