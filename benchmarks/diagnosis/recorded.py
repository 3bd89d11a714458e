"""Loss logs of real runs with labels: third-party data that is read where it lies and is not part of the project."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.diagnosis.synthetic import Floats, Run, Truth
from monitors.records import StepRecord
from monitors.taxonomy import IncidentClass
from monitors.trace import read_trace

TRACES = Path(__file__).parents[3] / "shared" / "traces"
_CLASSES = {"1": IncidentClass.TRANSIENT_SPIKE, "6": IncidentClass.PLATEAU_THEN_NAN}
#: What is no event of its own: a batch that is hard in every run, a whole run's character, a gradient norm that shifts.
_NO_EVENT = ("0", "1-data", "5-run", "G-shift", "HighLR", "B-shift")
_AVERAGED_THOUGH = ("modded-nanogpt__llmc_124M_2024-10-13",)
_LARGE_NATS = 0.5


@dataclass(frozen=True, slots=True)
class Recorded:
    """A trace. `averaged`: its loss is the mean of the batch, not one rank's; `judged`: long enough for rates."""

    run: Run
    averaged: bool
    judged: bool
    hard_batches: tuple[tuple[int, int], ...]


def recorded_runs(folder: Path = TRACES) -> list[Recorded]:
    """Every trace of a folder with its labels, in order of name; empty if it is not there."""
    if not (folder / "labels.json").exists():
        return []
    labels: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for label in json.loads((folder / "labels.json").read_text()):
        labels[label["trace"]].append(label)
    return [_recorded(path, labels[path.stem]) for path in sorted(folder.glob("*.csv"))]


def is_large(truth: Truth) -> bool:
    """An event of half a nat and more."""
    return truth.nats >= _LARGE_NATS


def residuals(runs: list[Recorded]) -> Floats | None:
    """Noise of averaged healthy losses, in units of its own scale, for the generator: each beside its neighbours."""
    parts = []
    for one in runs:
        losses = np.array([r.loss for r in one.run.records if isinstance(r, StepRecord)])
        if not one.averaged or not one.judged or one.run.truths or len(losses) < 4000:
            continue
        losses = losses[len(losses) // 4 :]
        around = np.lib.stride_tricks.sliding_window_view(losses, 31)
        left = losses[15:-15] - np.median(around, axis=1)
        scale = 1.4826 * np.median(np.abs(left))
        if scale > 0:
            parts.append(np.clip(left / scale, -8, 8))
    return np.concatenate(parts) if parts else None


def _recorded(path: Path, labels: list[dict[str, Any]]) -> Recorded:
    records = read_trace(path)
    steps = [record.step for record in records if isinstance(record, StepRecord)]
    truths = tuple(
        Truth(_CLASSES[label["cls"]], label["start"], label["end"], _nats(label))
        for label in labels
        if label["cls"] in _CLASSES
    )
    hard = tuple((label["start"], label["end"]) for label in labels if label["cls"] == "1-data")
    short = "SHORT" in path.stem
    single = path.stem.startswith(("modded-nanogpt", "parameter-golf")) and path.stem not in _AVERAGED_THOUGH
    odd = any(label["cls"] not in (*_NO_EVENT, *_CLASSES) for label in labels)
    run = Run(
        path.stem, list(records), truths, steps=steps[-1] - steps[0] + 1, healthy_steps=0 if odd else len(steps),
        found="found",
    )  # fmt: skip
    return Recorded(run, averaged=not single, judged=not short and not odd, hard_batches=hard)


def _nats(label: dict[str, Any]) -> float:
    peak, base = label.get("peak"), label.get("base")
    return float(peak - base) if peak is not None and base is not None else 0.0
