"""The diagnosis as a fold: deterministic, restorable at any point, and never taken in by a new attempt."""

import json
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from monitors.diagnosis import Diagnosis
from monitors.records import Record
from monitors.settings import DetectSettings
from monitors.taxonomy import IncidentClass
from tests.monitors.curves import bump, classes, climb, eval_record, healthy, records, step_record, watch


def _eventful() -> list[Record]:
    """A spike, evaluations, a leak, a climb, a non-finite stretch."""
    base = climb(bump(bump(healthy(1), 150, 4, 2.0), 300, 80, 1.5, decay=True), 420, 0.004)
    stream: list[Record] = []
    for step in range(1, 620):
        loss = math.nan if 600 <= step < 604 else base(step)
        stream.append(step_record(step, loss, shards={step % 5: (8, 8 * loss)}, update_ratio={"mid": 1e-3}))
        if step % 60 == 0:
            stream.append(eval_record(step, base(step)))
    return stream


_STREAM = _eventful()


@settings(max_examples=15, deadline=None)
@given(cut=st.integers(0, len(_STREAM)))
def test_state_survives_json_at_any_point(cut: int) -> None:
    """A supervisor that dies anywhere goes on with the same findings, to the last digit."""
    whole = Diagnosis()
    before = watch(whole, _STREAM[:cut])
    frozen = json.loads(json.dumps(whole.to_state()))
    thawed = Diagnosis.from_state(DetectSettings(), frozen)

    assert watch(thawed, _STREAM[cut:]) == watch(whole, _STREAM[cut:])
    assert thawed.to_state() == whole.to_state()
    assert watch(Diagnosis(), _STREAM[:cut]) == before


def test_every_anomaly_has_a_key_of_its_own_and_its_end() -> None:
    """A key is never used again, and nothing is said of an anomaly that is over."""
    found = watch(Diagnosis(), _STREAM)

    assert len({finding.cls for finding in found}) >= 3
    over: set[int] = set()
    for finding in found:
        assert finding.key not in over
        if finding.kind in ("closed", "dismissed"):
            over.add(finding.key)


def test_a_crash_during_a_divergence_does_not_make_it_the_new_normal() -> None:
    """Baselines are rebuilt from what survives: back at step 390 the loss is judged by what 390 steps had shown."""
    diagnosis = Diagnosis()
    watch(diagnosis, records(bump(healthy(2), 400, 10**9, 2.0), range(1, 480)))
    diagnosis.rewind(390)

    again = watch(diagnosis, records(bump(healthy(2), 400, 10**9, 2.0), range(391, 480)))

    assert classes(again) == [IncidentClass.UNRECOVERED_SPIKE]
    assert again[0].onset_step == 400


def test_a_crash_while_a_nan_goes_on_is_told_again() -> None:
    """Streaks are cleared at the boundary, the fact is not."""
    diagnosis = Diagnosis()
    sick = records(lambda step: math.nan if step >= 400 else healthy(2)(step), range(1, 410))
    assert classes(watch(diagnosis, sick)) == [IncidentClass.SUDDEN_NAN]
    diagnosis.rewind(350)

    assert classes(watch(diagnosis, sick[350:])) == [IncidentClass.SUDDEN_NAN]


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 12)), max_size=80))
def test_no_sequence_of_losses_breaks_it(values: list[float]) -> None:
    """Negative, huge, infinite, not a number: it says what it sees and stays serialisable."""
    diagnosis = Diagnosis()

    watch(diagnosis, [step_record(index + 1, value) for index, value in enumerate(values)])

    json.dumps(diagnosis.to_state(), allow_nan=False)


def test_what_is_remembered_ends_at_the_loaded_step() -> None:
    """Rows of a branch that was left would be a second, later history of the same steps."""
    diagnosis = Diagnosis()
    watch(diagnosis, records(healthy(), range(1, 201)))
    diagnosis.rewind(120)
    assert max(row["step"] for row in diagnosis.to_state()["history"]) == 120
