"""Signals that only notify, and the two proofs of a resume: the LR as planned, the losses as recorded."""

import random
from collections.abc import Iterable

from monitors.diagnosis import Diagnosis
from monitors.records import ActivationRecord, ActivationStats, Record, StepRecord, StepTime
from monitors.taxonomy import IncidentClass
from tests.monitors.curves import LR, bump, classes, eval_record, healthy, records, step_record, watch


def _ratios(factor_from_100: float, *, lr_falls: bool = False) -> Iterable[StepRecord]:
    for step in range(1, 201):
        lr = LR * (0.98**step if lr_falls else 1.0)
        ratio = lr * random.Random(step).uniform(0.9, 1.1) * (factor_from_100 if step >= 100 else 1.0)
        yield step_record(step, healthy(1)(step), lr=lr, lr_planned=lr, update_ratio={"mid": ratio})


def test_update_ratio_out_of_its_band() -> None:
    """Ten times up or down is told once, with the layer group."""
    high, low = watch(Diagnosis(), _ratios(10.0)), watch(Diagnosis(), _ratios(0.1))

    assert classes(high) == [IncidentClass.UPDATE_RATIO_HIGH]
    assert classes(low) == [IncidentClass.UPDATE_RATIO_LOW]
    assert high[0].onset_step == 100
    assert "mid" in high[0].why


def test_update_ratio_that_falls_with_the_lr_is_as_it_should_be() -> None:
    """It is judged over the LR: the schedule moves it by orders of magnitude."""
    assert watch(Diagnosis(), _ratios(1.0, lr_falls=True)) == []


def _activations(rms_from_30: float) -> Iterable[Record]:
    for step in range(1, 61):
        yield step_record(step, healthy(1)(step))
        rms = random.Random(step).uniform(0.95, 1.05) * (rms_from_30 if step >= 30 else 1.0)
        groups = {"late": ActivationStats(rms=rms, max=4.0, dead=0.0, saturated=0.0)}
        yield ActivationRecord(seq=1, attempt=1, at_s=0.0, step=step, groups=groups)


def test_activations_out_of_their_band() -> None:
    """RMS per layer group, twenty times up or down."""
    assert classes(watch(Diagnosis(), _activations(20.0))) == [IncidentClass.ACTIVATION_EXPLOSION]
    assert classes(watch(Diagnosis(), _activations(0.05))) == [IncidentClass.ACTIVATION_VANISHING]
    assert watch(Diagnosis(), _activations(1.5)) == []


def _speeds(seconds_from_200: float) -> Iterable[StepRecord]:
    for step in range(1, 301):
        seconds = seconds_from_200 if step >= 200 else 1.0
        took = StepTime(data=0.0, compute=seconds, other=0.0)
        yield step_record(step, healthy(1)(step), tokens=1000, step_time_s=took)


def test_throughput_drop_is_told_once() -> None:
    """Against this attempt's own speed."""
    assert classes(watch(Diagnosis(), _speeds(2.0))) == [IncidentClass.THROUGHPUT_DROP]
    assert watch(Diagnosis(), _speeds(1.1)) == []


def test_validation_that_rises_while_training_falls() -> None:
    """Three evaluations running, more than 0.02 nats above the best: overfitting, or a leak."""
    stream: list[Record] = []
    for step in range(1, 601):
        stream.append(step_record(step, healthy(1, noise=0.005)(step)))
        if step % 50 == 0:
            stream.append(eval_record(step, 3.0 if step < 400 else 3.0 + 0.03 * (step - 350) / 50))

    found = watch(Diagnosis(), stream)

    assert classes(found) == [IncidentClass.VALIDATION_DIVERGENCE]
    assert found[0].step == 500


def test_lr_that_is_not_the_one_planned() -> None:
    """Seen in the first record of it, closed by the first that is right again."""
    stream = [
        step_record(step, healthy(1)(step), lr=LR * (1.01 if 100 <= step < 110 else 1.0)) for step in range(1, 150)
    ]

    found = watch(Diagnosis(), stream)

    assert [(finding.kind, finding.cls, finding.step) for finding in found] == [
        ("classified", IncidentClass.LR_MISMATCH, 100),
        ("closed", IncidentClass.LR_MISMATCH, 110),
    ]


def _resumed(difference: float, *, shifted: int = 0) -> list[IncidentClass]:
    """Steps 1 to 300, then again from 250 with losses that differ by so much, on data shifted by so many samples."""
    diagnosis = Diagnosis()
    watch(diagnosis, records(healthy(1), range(1, 301)))
    diagnosis.rewind(250, expect_same=True)
    again = [
        step_record(
            step, healthy(1)(step) + difference, data={"begin": (step - 1) * 8 + shifted, "end": step * 8 + shifted}
        )
        for step in range(251, 301)
    ]
    return classes(watch(diagnosis, again))


def test_a_resume_must_give_the_recorded_losses_on_the_same_data() -> None:
    """+0.1 nats lies well within a band, and still says that the state is not what was saved."""
    assert _resumed(0.1) == [IncidentClass.LOSS_DISCONTINUITY]
    assert _resumed(0.0) == []
    assert _resumed(1e-4) == []
    assert _resumed(0.1, shifted=8) == []


def test_a_doubted_attempt_is_no_reference_for_the_next() -> None:
    """It ran beyond what was known before it left; the next one gives the true losses there."""
    diagnosis = Diagnosis()
    watch(diagnosis, records(healthy(1), range(1, 256)))
    diagnosis.rewind(250, expect_same=True)
    wrong = [step_record(step, healthy(1)(step) + 0.1) for step in range(251, 280)]
    assert classes(watch(diagnosis, wrong)) == [IncidentClass.LOSS_DISCONTINUITY]

    diagnosis.rewind(250, expect_same=True)

    assert watch(diagnosis, records(healthy(1), range(251, 280))) == []


def test_a_re_run_is_not_held_against_steps_that_were_sick() -> None:
    """After a crash in the middle of a divergence, or with another LR, other losses are the hope, not a fault."""
    diverged, other_lr = Diagnosis(), Diagnosis()
    watch(diverged, records(bump(healthy(1), 252, 100, 3.0), range(1, 301)))
    watch(
        other_lr,
        [step_record(s, healthy(1)(s) + 0.1 * (s > 252), lr=LR * (2.0 if s >= 252 else 1.0)) for s in range(1, 301)],
    )

    for diagnosis in (diverged, other_lr):
        diagnosis.rewind(250, expect_same=True)
        assert classes(watch(diagnosis, records(healthy(1), range(251, 301)))) == []


def test_a_changed_schedule_or_a_planned_change_gives_other_losses_by_intention() -> None:
    """More `steps` move the LR of steps that are run again; the proof returns with what is recorded under it."""
    fields = {"lr": LR / 2, "lr_planned": LR / 2}
    announced, rescheduled = Diagnosis(planned_changes=(251,)), Diagnosis()
    for diagnosis in (announced, rescheduled):
        watch(diagnosis, records(healthy(1), range(1, 301)))
        diagnosis.rewind(250, expect_same=True)

    assert classes(watch(announced, records(lambda step: healthy(1)(step) + 0.1, range(251, 301)))) == []
    again = [step_record(step, healthy(1)(step) + 0.1, **fields) for step in range(251, 301)]
    assert classes(watch(rescheduled, again)) == []

    rescheduled.rewind(250, expect_same=True)
    worse = [step_record(step, healthy(1)(step) + 0.2, **fields) for step in range(251, 301)]
    assert classes(watch(rescheduled, worse)) == [IncidentClass.LOSS_DISCONTINUITY]
