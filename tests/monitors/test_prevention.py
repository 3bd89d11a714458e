"""What the prevention ladder holds back is looked at: many skips, a band that gave in, clipping that grows."""

import math

import pytest

from monitors.diagnosis import Diagnosis
from monitors.records import Prevention, Record, StepRecord, parse_record
from monitors.settings import DetectSettings
from monitors.taxonomy import Finding, IncidentClass
from tests.monitors.curves import Shape, classes, climb, healthy, records, step_record, watch

_STATE = IncidentClass.REPEATED_SPIKES_BY_STATE


def _left_out(step: int, shape: Shape = healthy(1)) -> StepRecord:  # noqa: B008  pure
    """A finite update that was skipped for its norm."""
    done = Prevention(skipped="norm", norm_limit=1.5)
    return step_record(step, shape(step), skipped=True, grad_norm=9.0, prevention=done)


def _stream(last: int, *special: StepRecord) -> list[Record]:
    """A healthy run up to `last` with some of its steps replaced."""
    known = {record.step: record for record in special}
    return [known.get(step) or step_record(step, healthy(1)(step)) for step in range(1, last + 1)]


def _noticed(found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.kind == "classified" and finding.cls is _STATE]


def test_a_lone_skip_is_no_incident() -> None:
    """Three of them, far apart, in a healthy run: nothing is said, and nothing is taken for non-finite."""
    stream = _stream(900, *(_left_out(step) for step in (300, 500, 700)))
    assert watch(Diagnosis(), stream) == []


def test_three_in_a_row_are_one() -> None:
    """As for non-finite updates, but as what it is: with the onset, the count, and how the loss fares."""
    found = watch(Diagnosis(), _stream(430, *(_left_out(step) for step in range(400, 405))))

    (told,) = _noticed(found)
    assert classes(found) == [_STATE]
    assert (told.onset_step, told.step) == (400, 402)
    assert "3 in a row" in told.why
    assert told.evidence["loss_meanwhile"] == "still falls"


def test_more_than_one_percent_are_one() -> None:
    """Eleven of a thousand, none next to each other; said once."""
    stream = _stream(900, *(_left_out(step) for step in range(300, 900, 20)))

    (told,) = _noticed(watch(Diagnosis(), stream))
    assert (told.onset_step, told.step) == (300, 300 + 10 * 20)
    assert told.evidence["skipped_in_last_1000"] == 11


@pytest.mark.parametrize("order", [("norm", "nan", "nan"), ("nan", "norm", "nan"), ("nan", "nan", "norm")])
def test_a_row_of_both_kinds_counts_too(order: tuple[str, ...]) -> None:
    """Two non-finite updates and one out of its band: three in a row, in whatever order."""
    row = [
        _left_out(400 + index) if kind == "norm" else step_record(400 + index, math.nan, skipped=True)
        for index, kind in enumerate(order)
    ]
    (told,) = _noticed(watch(Diagnosis(), _stream(430, *row)))
    assert (told.onset_step, told.step) == (400, 402)


def test_a_row_of_non_finite_ones_is_left_to_its_own_detector() -> None:
    """Nothing is said twice."""
    row = [step_record(step, math.nan, skipped=True) for step in range(400, 405)]
    assert classes(watch(Diagnosis(), _stream(430, *row))) == [IncidentClass.SUDDEN_NAN]


def test_a_band_that_gave_in_is_told() -> None:
    """Also after the skips were told: the norm has another level, and that is applied now."""
    gave_in = Prevention(gave_in=True, norm_limit=1.5)
    row = [_left_out(step) for step in range(400, 410)] + [step_record(410, 2.5, grad_norm=9.0, prevention=gave_in)]
    first, second = _noticed(watch(Diagnosis(), _stream(450, *row)))

    assert first.step == 402
    assert (second.onset_step, second.step) == (400, 410)
    assert "given up after 10" in second.why
    assert "9" in second.why
    assert "1.5" in second.why


def _norms(before: float, after: float, *, clip_norm: float = 1.0) -> list[Record]:
    """A thousand steps at one level of the gradient norm, a thousand at another."""
    found: list[Record] = []
    for step in range(1, 2001):
        norm = (before if step <= 1000 else after) * math.exp(0.1 * math.sin(7 * step))
        found.append(step_record(step, healthy(1)(step), grad_norm=norm, clipped=norm > clip_norm))
    return found


@pytest.mark.parametrize(
    ("before", "after", "told"), [(0.4, 2.0, True), (0.8, 2.0, False), (1.5, 9.0, False), (0.1, 0.5, False)]
)
def test_clipping_that_grows_with_the_norm_is_told(before: float, after: float, told: bool) -> None:
    """A norm that is five times as large and now clipped; not BERT's harmless 2.5, nor what was clipped all along."""
    found = _noticed(watch(Diagnosis(), _norms(before, after)))
    assert len(found) == (1 if told else 0)
    assert not told or "100% of the updates are clipped, 0% were" in found[0].why


@pytest.mark.parametrize("norm", [math.nan, math.inf, None])
def test_a_norm_that_is_none_makes_no_level(norm: float | None) -> None:
    """A trainer that does not skip them, or does not record any: a growth of the others is found all the same."""
    stream: list[Record] = []
    for record in _norms(0.4, 2.0):
        assert isinstance(record, StepRecord)
        stream.append(record.model_copy(update={"grad_norm": norm}) if record.step % 2 else record)
    (found,) = _noticed(watch(Diagnosis(), stream))
    assert "grown from 0.4" in found.why


def test_what_was_held_back_is_evidence_of_a_loss_that_climbs() -> None:
    """A slow divergence behind the ladder says how much of it the ladder has hidden."""
    shape = climb(healthy(1), 600, 2e-3)
    stream = [
        _left_out(step, shape) if step % 125 == 0 else step_record(step, shape(step), clipped=step > 200, grad_norm=0.5)
        for step in range(1, 1200)
    ]
    (found,) = [one for one in watch(Diagnosis(), stream) if one.cls is IncidentClass.SLOW_DIVERGENCE][:1]
    assert found.evidence["clipped_share"] == 1.0
    assert found.evidence["skipped_in_last_1000"] == (found.step // 125)


def test_a_new_attempt_starts_its_streak_anew() -> None:
    """Two skips, a restart, one more: not three in a row; and the memory survives its way through JSON."""
    diagnosis = Diagnosis()
    watch(diagnosis, _stream(401, _left_out(400), _left_out(401)))
    again = Diagnosis.from_state(DetectSettings(), diagnosis.to_state())
    again.rewind(401)
    assert watch(again, [_left_out(402), *records(healthy(1), range(403, 420))]) == []
    assert _noticed(watch(diagnosis, [_left_out(402)]))


def test_records_of_before_the_ladder_are_read() -> None:
    """Without `prevention` a skipped update is one that was not finite; with it, the wire keeps it."""
    old = parse_record('{"kind": "step", "seq": 1, "attempt": 1, "at_s": 0, "step": 1, "loss": "NaN", "skipped": true}')
    assert isinstance(old, StepRecord)
    assert (old.prevention, old.skip_reason) == (None, "non_finite")
    new = parse_record(_left_out(3).model_dump_json())
    assert isinstance(new, StepRecord)
    assert new.skip_reason == "norm"
    assert step_record(3, 2.0, clipped=True).skip_reason is None
