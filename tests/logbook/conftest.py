"""One real run that diverged and was rolled back, for all tests that only read it."""

from typing import Any

import pytest

from orchestrator.logbook.gather import gather
from orchestrator.logbook.model import Logbook
from tests.runs import Run, tiny_config, write_corpus

_GUARDS = {"max_skipped_share": 0.5, "max_discarded_share": 1.0, "max_quarantined_share": 0.3, "relapse_steps": 60}
_CUT = {"factor": 0.5, "hold_steps": 15, "ramp_steps": 20}
_ROLL_BACK: dict[str, Any] = {"roll_back": {"margin_steps": 10}, "skip_data": "12 batches", "lower_lr": _CUT}
_POLICY: dict[str, Any] = {
    "version": 1,
    "detect": {"recover_steps": 10, "recover_steps_max": 20},
    "guards": _GUARDS,
    "rules": [{"on": "unrecovered_spike", "when": {"validation_confirms": True}, "ladder": [_ROLL_BACK, {"halt": {}}]}],
}


@pytest.fixture(scope="session", name="diverged")
def _diverged(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A learning-rate bomb at step 80: evaluated, rolled back, data skipped, LR lowered, finished."""
    root = tmp_path_factory.mktemp("diverged")
    corpus = write_corpus(root / "corpus")
    faults = [{"kind": "lr_bomb", "steps": [80, 83], "factor": 300.0}]
    launch = {"threads": 1, "standby": False, "logbook_minutes": 60}
    run = Run(root, tiny_config(corpus, steps=150, faults=faults, launch=launch), _POLICY)
    run.launch()
    return run


@pytest.fixture(scope="session", name="book")
def _book(diverged: Run) -> Logbook:
    """Its facts."""
    return gather(diverged.paths)
