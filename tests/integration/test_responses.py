"""Fault against response on real runs: the response that fits the cause ends the matter, the others demonstrably fail.

Every fault here meets every attempt, because one that fires once lets any rollback look like a cure. A wrong response
relapses, the ladder is at its end, and a person is asked; it never ends in a run that finished on a damaged state.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.runs import Run, tiny_config

pytestmark = pytest.mark.training

_BATCH = 8
_BACK: dict[str, Any] = {"roll_back": {"margin_steps": 10}}
_RESPONSES: dict[str, dict[str, Any]] = {
    "skip": {**_BACK, "skip_data": "24 batches"},
    "cut": {**_BACK, "lower_lr": {"factor": 0.02, "min_factor": 0.01, "keep": True}},
    "reseed": {**_BACK, "reseed": {}},
}
_FAULTS: dict[str, dict[str, Any]] = {
    "data": {"kind": "lr_bomb", "data": [80 * _BATCH, 84 * _BATCH], "factor": 30_000.0},
    "learning rate": {"kind": "lr_bomb", "steps": [80, 100_000], "factor": 300.0},
    "hardware": {"kind": "lr_bomb", "steps": [80, 83], "factor": 30_000.0},
}
_CURES = {("data", "skip"), ("learning rate", "cut")}


@pytest.mark.long
@pytest.mark.parametrize("response", _RESPONSES)
@pytest.mark.parametrize("fault", _FAULTS)
def test_only_the_response_that_fits_the_cause_ends_it(tmp_path: Path, corpus: Path, fault: str, response: str) -> None:
    """Poison in the data wants the skip, an LR too high the cut; against a broken machine nothing helps but to stop."""
    policy = {
        "version": 1,
        "detect": {"recover_steps": 10, "recover_steps_max": 20},
        "guards": {"max_skipped_share": 0.5, "max_discarded_share": 1.0, "relapse_steps": 100},
        "rules": [{"on": "unrecovered_spike", "ladder": [_RESPONSES[response], {"halt": {}}]}],
    }
    faults = [{**_FAULTS[fault], "once": False}]
    run = Run(tmp_path, tiny_config(corpus, steps=140, faults=faults), policy)

    cured = (fault, response) in _CURES
    run.launch(expect=0 if cured else 3)

    outcomes = [i["outcome"] for i in run.incidents() if i["class"] == "unrecovered_spike"]
    assert outcomes == (["worked"] if cured else ["relapsed", "halted"])
    if cured:
        assert run.records(len(run.attempts()), "eval")[-1]["loss"] < 2.0
