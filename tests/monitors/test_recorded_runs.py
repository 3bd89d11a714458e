"""Loss traces of real runs, read by hand and labelled: what must be seen, and what must never be.

The floors are what the diagnosis reaches today; they may rise, not fall. Traces are third-party data and not part of
the repository: without them these tests are skipped.
"""

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from monitors.diagnosis import Diagnosis
from monitors.taxonomy import Finding, IncidentClass
from monitors.trace import read_trace
from tests.monitors.curves import settled, watch

_TRACES = Path(__file__).parents[3] / "shared" / "traces"
_NAMES = sorted(path.stem for path in _TRACES.glob("*.csv"))
_HARMFUL = frozenset(
    {
        IncidentClass.UNRECOVERED_SPIKE,
        IncidentClass.SLOW_DIVERGENCE,
        IncidentClass.IMMEDIATE_NAN,
        IncidentClass.PLATEAU_THEN_NAN,
        IncidentClass.SUDDEN_NAN,
        IncidentClass.NAN_AFTER_LOAD,
        IncidentClass.LOSS_IMPLAUSIBLY_LOW,
    }
)
_ENDS_IN_NAN = "parameter-golf__SHORT_behemoth_v10_nan"
_REACH_STEPS = 20  # labels are good to a point or two, and these logs have every 5th step

pytestmark = pytest.mark.skipif(not _NAMES, reason="the recorded runs are not at hand")


@cache
def _found(name: str) -> tuple[Finding, ...]:
    return tuple(settled(watch(Diagnosis(), read_trace(_TRACES / f"{name}.csv"))).values())


def _labels(cls: str) -> list[dict[str, Any]]:
    labels: list[dict[str, Any]] = json.loads((_TRACES / "labels.json").read_text())
    return [label for label in labels if label["cls"] == cls]


@pytest.mark.parametrize("name", _NAMES)
def test_no_run_that_went_on_well_would_have_been_touched(name: str) -> None:
    """A rollback in any of them would have been a false one; spikes are at most one in 400 rows, heavy tails or not."""
    found = Counter(finding.cls for finding in _found(name))
    rows = len(read_trace(_TRACES / f"{name}.csv"))

    assert name == _ENDS_IN_NAN or not _HARMFUL & found.keys()
    assert found[IncidentClass.TRANSIENT_SPIKE] <= 4 + rows / 400


def _hit(label: dict[str, Any]) -> bool:
    begin, end = label["start"] - _REACH_STEPS, label["end"] + _REACH_STEPS
    return any(
        finding.cls is IncidentClass.TRANSIENT_SPIKE
        and finding.onset_step <= end
        and (finding.end_step is None or finding.end_step >= begin)
        for finding in _found(label["trace"])
    )


def test_labelled_spikes_are_found() -> None:
    """Of those that a reader marked in averaged losses: most from half a nat on, and half of all.

    A lone row is taken for a spike only where the run's own tail makes it improbable, which costs small ones and
    saves most of the false ones: see `test_false_incidents_are_few`.
    """
    spikes = _labels("1")
    large = [label for label in spikes if label.get("peak") and label["peak"] - label["base"] >= 0.5]
    hits = Counter(_hit(label) for label in spikes)

    assert hits[True] >= 28
    assert len(spikes) == 55
    assert sum(map(_hit, large)) >= 0.8 * len(large)


def test_flat_and_then_nan() -> None:
    """About 3.0 for hundreds of steps, then non-finite for good."""
    assert [(finding.cls, finding.onset_step) for finding in _found(_ENDS_IN_NAN)] == [
        (IncidentClass.PLATEAU_THEN_NAN, 1200)
    ]
