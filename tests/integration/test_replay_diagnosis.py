"""Diagnosis by replay on the real trainer: the right cause, and nothing skipped that it does not convict.

`make bench-replay-diagnosis` has twenty trials of each kind.
"""

import pytest

from benchmarks.replay_diagnosis import CAUSES, figures_of, is_met, run, table_of

pytestmark = pytest.mark.training

_SEEDS = {"flip in a weight": (0, 1), "non-finite data": (0, 1), "LR bomb": (0, 1)}


@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind in CAUSES for seed in _SEEDS.get(kind, (0,))])
def test_the_cause_is_named_and_decides_what_is_skipped(kind: str, seed: int) -> None:
    """Hardware: nothing; bad data: its window; a bomb in the schedule: nothing, the LR is lowered."""
    trial = run(kind, seed)

    assert trial.right, trial
    figures = figures_of([trial])
    assert is_met(figures)
    assert kind in table_of(figures)
