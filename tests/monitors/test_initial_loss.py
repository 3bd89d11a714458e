"""The first loss of a fresh model: a guess over the vocabulary, or a bug that no night of training mends."""

import math

import pytest

from monitors.diagnosis import Diagnosis
from monitors.records import StartedRecord
from monitors.taxonomy import IncidentClass
from tests.monitors.curves import classes, step_record, watch

_UNIFORM = math.log(50257)


def _started(step: int = 0, loaded: str | None = None) -> StartedRecord:
    return StartedRecord(
        seq=1, attempt=1, at_s=0.0, step=step, position=0, tokens=0, loaded=loaded, precision="bf16", device="cpu",
        parameters=1, vocab_size=50257, batch_samples=8, sample_tokens=32, total_steps=100, total_samples=1000,
        shards=("a",), peak_lr=1e-3, warmup_steps=10,
    )  # fmt: skip


@pytest.mark.parametrize(("off", "told"), [(0.0, False), (0.3, False), (-0.3, False), (2.3, True), (-2.3, True)])
def test_far_from_a_guess(off: float, told: bool) -> None:
    """GPT-2's first loss is 0.1 to 0.2 above ln V, BLOOM's 0.03 below; a fifth of it is neither."""
    found = watch(Diagnosis(), [_started(), step_record(1, _UNIFORM + off), step_record(2, _UNIFORM + off)])
    assert classes(found) == ([IncidentClass.INITIAL_LOSS_OFF] if told else [])


@pytest.mark.parametrize("started", [_started(step=40, loaded="000000000040-e1-1"), _started(loaded="0")])
def test_only_a_fresh_model_is_held_against_it(started: StartedRecord) -> None:
    """What was loaded has learned something, also at step 0 of a new attempt."""
    assert classes(watch(Diagnosis(), [started, step_record(started.step + 1, 3.0)])) == []


def test_only_the_first_step_counts() -> None:
    """A recording that begins later says nothing of the initialisation."""
    assert classes(watch(Diagnosis(), [_started(), step_record(10, 3.0), step_record(11, 3.0)])) == []
