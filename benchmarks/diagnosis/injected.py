"""Real training runs of a tiny GPT with faults of the arithmetic put in, launched as a user launches runs.

What happened is told by a twin: the same run without the fault. Both see the same data with the same random numbers, so
that their difference is the fault's own trace: gone, it was transient; still there, it was not.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.diagnosis.synthetic import Floats, Run, Truth
from monitors.detect.nonfinite import is_finite
from monitors.records import ActivationRecord, EvalRecord, Record, StepRecord, parse_record
from monitors.taxonomy import IncidentClass
from trainer.contract.paths import RunPaths

STEPS = 700
_WARMUP_STEPS = 20
_CORPUS_BYTES = 2_000_000
_SHARDS = 8
_MATTERS_NATS = 0.3  # a fault that moves the loss by less, or by less than six sigma, is no incident
_LASTS_NATS = 0.1
_RETURN_STEPS, _PATIENCE_STEPS = 50, 250
_DUE_SHARE, _DUE_NATS = 0.05, 0.1
_AT_ONCE = 2  # runs side by side; each has one thread

Fault = dict[str, Any]


def faults(seed: int) -> dict[str, tuple[Fault, ...]]:
    """Each cause with its onset drawn from the settled part of the run; the empty one is the twin."""
    rng = np.random.default_rng(seed)

    def at(first: int, last: int) -> int:
        return int(rng.integers(first, last))

    def window(kind: str, onset: int, length: int, **more: Any) -> Fault:
        return {"kind": kind, "steps": [onset, onset + length - 1], **more}

    dead = at(250, 300)
    return {
        "twin": (),
        "garbage": (window("bad_shard", at(250, 350), 1),),
        "lr_bomb": (window("lr_bomb", at(250, 350), 4, factor=float(rng.uniform(200, 400))),),
        "weight_bit": (window("bit_flip", at(250, 350), 1, target="weight"),),
        "creep": (window("loss_drift", at(250, 300), 400, once=False, factor=float(rng.uniform(0.001, 0.003))),),
        "leak": (window("leak_targets", at(250, 300), 400, once=False, factor=20.0),),
        "gradient_nan": (window("nan_grad", at(250, 350), 8, once=False),),
        "early_nan": (window("nan_loss", at(3, 20), STEPS, once=False),),
        "dead_then_nan": (window("zero_layer", dead, 150, once=False), window("nan_loss", dead + 150, 40, once=False)),
    }


def injected_runs(seeds: range) -> Iterator[Run]:
    """Train every cause with every seed; each run comes with what really happened in it."""
    with tempfile.TemporaryDirectory(prefix="longwatch-injected-") as directory, ThreadPoolExecutor(_AT_ONCE) as pool:
        corpus = _write_corpus(Path(directory) / "corpus")
        for seed in seeds:
            causes = faults(seed)
            trained = pool.map(
                lambda cause, seed=seed, causes=causes: _train(
                    Path(directory) / f"{seed}-{cause}", corpus, seed, causes[cause]
                ),
                causes,
            )
            found = dict(zip(causes, trained, strict=True))
            twin = _losses(found["twin"])
            for cause, records in found.items():
                yield _labelled(f"{cause}/{seed}", records, twin, causes[cause])


def _write_corpus(root: Path) -> Path:
    """This machine's own Python sources as bytes, in llm.c's format."""
    root.mkdir()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = np.frombuffer(b"".join(path.read_bytes() for path in sources)[:_CORPUS_BYTES], dtype=np.uint8)
    for number, part in enumerate(np.array_split(text.astype(np.uint16), _SHARDS)):
        header = np.zeros(256, dtype=np.int32)
        header[:3] = (20240520, 1, len(part))
        (root / f"shard-{number:03d}.bin").write_bytes(header.tobytes() + part.tobytes())
    return root


def _train(root: Path, corpus: Path, seed: int, planted: tuple[Fault, ...]) -> list[Record]:
    """One run by the command line in observe mode: nothing is done about what is seen."""
    root.mkdir()
    config = {
        "name": "run", "seed": seed, "steps": STEPS, "precision": "fp32", "policy": "policy.yaml",
        "model": {"layers": 2, "heads": 2, "width": 32}, "optimizer": {"peak_lr": 3e-3},
        "schedule": {"kind": "constant", "warmup_steps": _WARMUP_STEPS},
        "batch": {"sequences": 32, "sequence_tokens": 64},
        "data": {"train": str(corpus), "validation": str(corpus), "vocab_size": 256},
        "evaluate": {"every_steps": 50, "sequences": 16}, "checkpoint": {"every_steps": STEPS},
        "monitor": {"details_every": 10}, "metrics": {"port": None}, "launch": {"threads": 1},
        "faults": planted,
    }  # fmt: skip
    (root / "run.yaml").write_text(json.dumps(config))
    (root / "policy.yaml").write_text(json.dumps({"version": 1, "mode": "observe"}))
    subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "launch", "run.yaml"],
        cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}, stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    lines = RunPaths(root / "runs" / "run").records(1).read_text().splitlines()
    records = (parse_record(line) for line in lines)
    return [one for one in records if isinstance(one, StepRecord | EvalRecord | ActivationRecord)]


def _losses(records: list[Record]) -> Floats:
    return np.array([record.loss for record in records if isinstance(record, StepRecord)])


def _labelled(name: str, records: list[Record], twin: Floats, planted: tuple[Fault, ...]) -> Run:
    found = (_truth(records, twin, fault, after_another=number > 0) for number, fault in enumerate(planted))
    truths = tuple(truth for truth in found if truth is not None)
    return Run(
        name=f"injected/{name}", records=records, truths=truths, steps=STEPS, warmup_steps=_WARMUP_STEPS,
        healthy_steps=truths[0].onset_step - 1 if truths else STEPS, found="injected",
    )  # fmt: skip


def _truth(records: list[Record], twin: Floats, fault: Fault, *, after_another: bool) -> Truth | None:
    """What the fault did; None where it did nothing that would count."""
    onset, last = fault["steps"]
    losses, bad = _losses(records), _non_finite(records, onset)
    match fault["kind"]:
        case "nan_loss":
            cls = IncidentClass.PLATEAU_THEN_NAN if after_another else IncidentClass.IMMEDIATE_NAN
            return Truth(cls, onset, min(last, STEPS))
        case "leak_targets":
            return Truth(IncidentClass.LOSS_IMPLAUSIBLY_LOW, onset, STEPS, float(np.max(twin - losses)))
        case "nan_grad" | "bit_flip" if bad:
            return Truth(IncidentClass.SUDDEN_NAN, bad[0], bad[-1])
    excess, sigma = losses - twin, 1.4826 * float(np.median(np.abs(np.diff(twin[onset // 2 : onset])))) / np.sqrt(2)
    return _truth_of_excess(excess, sigma, onset, float(np.median(twin[onset - 20 : onset])), fault["kind"])


def _non_finite(records: list[Record], onset: int) -> list[int]:
    """Steps soon after a fault whose loss or gradient was not finite."""
    steps = (record for record in records if isinstance(record, StepRecord) and record.step >= onset)
    return [record.step for record in steps if not is_finite(record) and record.step < onset + _RETURN_STEPS]


def _truth_of_excess(excess: Floats, sigma: float, onset: int, level: float, kind: str) -> Truth | None:
    after = excess[onset - 1 :]
    if kind == "loss_drift":
        smooth = np.convolve(after, np.ones(10) / 10, mode="valid")
        due = np.flatnonzero(smooth > max(_DUE_NATS, _DUE_SHARE * level))
        due_step = onset + int(due[0]) + 9 if len(due) else STEPS
        return Truth(IncidentClass.SLOW_DIVERGENCE, onset, STEPS, float(np.max(smooth)), due_step=due_step)
    peak = float(np.max(after[:_RETURN_STEPS]))
    if peak < max(_MATTERS_NATS, 6 * sigma):
        return None
    lasting = max(_LASTS_NATS, 3 * sigma)
    middles = [float(np.median(after[begin : begin + 10])) for begin in range(0, _PATIENCE_STEPS, 10)]
    back = next((10 * number for number, middle in enumerate(middles) if number and middle < lasting), None)
    late = back is None or (back > _RETURN_STEPS and middles[_RETURN_STEPS // 10] >= 0.5 * peak)
    cls = IncidentClass.UNRECOVERED_SPIKE if late else IncidentClass.TRANSIENT_SPIKE
    return Truth(cls, onset, STEPS if late or back is None else onset + back, peak)
