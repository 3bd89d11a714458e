"""Which shard did it: convicted by several batches in which it alone stands out, never by company."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from monitors.diagnosis import Diagnosis
from monitors.records import StepRecord
from monitors.taxonomy import IncidentClass
from tests.monitors.curves import BATCH, classes, healthy, step_record, watch

_SHARDS = 12
_PER_SHARD = BATCH // 2


def _step(step: int, excess: dict[int, float], *, state: float = 0.0) -> StepRecord:
    """A batch of two shards; `excess` is what each shard's sequences have on top, `state` what everything has."""
    chooser = random.Random(step)
    pair = chooser.sample(range(_SHARDS), 2)
    loss = healthy(1)(step) + state
    shards = {
        shard: (_PER_SHARD, _PER_SHARD * (loss + excess.get(shard, 0.0) + chooser.gauss(0, 0.05))) for shard in pair
    }
    return step_record(step, sum(total for _, total in shards.values()) / BATCH, shards=shards)


@settings(max_examples=15, deadline=None)
@given(bad=st.integers(0, _SHARDS - 1), excess=st.floats(1.5, 6.0))
def test_a_poisoned_shard_is_named_and_no_other(bad: int, excess: float) -> None:
    """It raises the loss of every batch it is in, and its companions are not to blame."""
    found = watch(Diagnosis(), (_step(step, {bad: excess} if step >= 300 else {}) for step in range(1, 500)))

    convicted = [finding for finding in found if finding.cls is IncidentClass.REPEATED_SPIKES_BY_SHARDS]
    assert {shard for finding in convicted for shard in finding.shards} == {bad}


def test_shards_of_another_kind_are_not_bad_for_being_different() -> None:
    """Code and maths have their own level, known before any of it is called an excess."""
    kinds = {0: 1.2, 1: -0.8, 2: 0.6, 3: -0.5}

    assert watch(Diagnosis(), (_step(step, kinds) for step in range(1, 800))) == []


def test_a_diverging_state_convicts_no_shard() -> None:
    """Every shard of the batch is up: it is the model."""
    found = watch(Diagnosis(), (_step(step, {}, state=3.0 if step >= 400 else 0.0) for step in range(1, 520)))

    assert classes(found) == [IncidentClass.UNRECOVERED_SPIKE]
    assert all(not finding.shards for finding in found)


def test_one_bad_read_is_not_enough() -> None:
    """A hard document is no pathological shard."""
    stream = [_step(step, {}) for step in range(1, 600)]
    victim = next(record for record in stream if record.step >= 300 and 4 in record.shards)
    stream[victim.step - 1] = _step(victim.step, {4: 5.0})

    found = classes(watch(Diagnosis(), stream))

    assert IncidentClass.REPEATED_SPIKES_BY_SHARDS not in found


def test_a_quarantined_shard_is_not_convicted_again() -> None:
    """What was read of it before the quarantine took hold is old news."""
    diagnosis = Diagnosis()
    watch(diagnosis, (_step(step, {}) for step in range(1, 300)))
    diagnosis.rewind(299, quarantined=(4,))

    found = watch(diagnosis, (_step(step, {4: 3.0}) for step in range(300, 420)))

    assert all(finding.cls is not IncidentClass.REPEATED_SPIKES_BY_SHARDS for finding in found)
