"""What each rung of the prevention ladder costs: its own work beside that of an update which is only clipped.

`python -m benchmarks.prevention [--rounds N]`. The rungs' work does not depend on the size of the model: some tens of
small kernels on a GPU, some hundred microseconds on a CPU. Too little to be seen in the noise of whole updates, so it
is timed by itself, many times over, and given as a share of an update of a small model: the worst case. On a GPU what
counts is whether the host keeps ahead of the device, which it does as long as an update takes longer than its launch.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import Stats, measure, report
from trainer.contract.config import BatchConfig, ModelConfig, OptimizerConfig, PreventionConfig
from trainer.guards import Guards
from trainer.model import GPT
from trainer.optim import build_optimizer
from trainer.precision import resolve
from trainer.step import TrainStep

UPDATE, NONE = "a whole update", "clip_norm alone"
_RUNGS: dict[str, dict[str, Any]] = {
    NONE: {},
    "skip_update": {"skip_update": {}},
    "adaptive_clip": {"adaptive_clip": {}},
    "both": {"skip_update": {}, "adaptive_clip": {}},
}
_TARGET_SHARE = 0.01
_CALLS = 200
_SMALL = ModelConfig(layers=4, heads=4, width=128), BatchConfig(sequences=32, sequence_tokens=128), 256
_LARGE = ModelConfig(), BatchConfig(sequences=8, sequence_tokens=1024), 50_304


def _update(device: torch.device) -> Callable[[], float]:
    """Seconds of an update: the quickstart's model on a CPU, GPT-2 124M with one small batch on a GPU."""
    config, batch, vocab = _LARGE if device.type == "cuda" else _SMALL
    model = GPT(config, vocab, batch.sequence_tokens).to(device)
    optimizer = build_optimizer(model, OptimizerConfig())
    precision = resolve("bf16" if device.type == "cuda" else "fp32", device)
    step = TrainStep(model, optimizer, precision=precision, clip_norm=1.0)
    tokens = torch.randint(0, vocab, (batch.sequences, batch.sequence_tokens + 1)).to(device)
    step(tokens, 1e-4).read()

    def timed() -> float:
        begun_s = time.perf_counter()
        step(tokens, 1e-4).read()
        return time.perf_counter() - begun_s

    return timed


def _judgement(device: torch.device, rungs: dict[str, Any]) -> Callable[[], float]:
    """Seconds of one judgement by armed rungs."""
    guards = Guards(PreventionConfig.model_validate(rungs), 1.0, device)
    norm, loss = torch.full((), 0.5, device=device), torch.full((), 2.0, device=device)

    def timed() -> float:
        begun_s = time.perf_counter()
        for _ in range(_CALLS):
            parts = guards.judge(norm, loss)
        parts["skipped"].item()  # the device has done all of it
        return (time.perf_counter() - begun_s) / _CALLS

    timed()
    return timed


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    rounds: int = parser.parse_args().rounds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = {UPDATE: _update(device)} | {name: _judgement(device, rungs) for name, rungs in _RUNGS.items()}
    found = measure(cases, rounds)
    shares = {name: (found[name].median - found[NONE].median) / found[UPDATE].median for name in _RUNGS}
    figures = {"device": str(device), "shares": shares, "seconds": {n: s.as_figure() for n, s in found.items()}}
    met = max(shares.values()) <= _TARGET_SHARE
    report("prevention", figures, {"share_of_an_update": _TARGET_SHARE}, met, _table(found, shares))


def _table(found: dict[str, Stats], shares: dict[str, float]) -> str:
    rows = [
        f"| {name} | {stats.median * 1e6:.0f} ({stats.min * 1e6:.0f} to {stats.max * 1e6:.0f}) | "
        + (f"{shares[name]:.3%} |" if name in shares else "|")
        for name, stats in found.items()
    ]
    return "\n".join(
        ["| | microseconds (least to most) | more than clip_norm alone, of an update |", "|---|---|---|", *rows]
    )


if __name__ == "__main__":
    main()
