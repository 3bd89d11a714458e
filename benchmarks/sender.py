"""A trainer that computes nothing and reports steps at a given rate: what is left is the cost of watching.

Run by the supervisor as its `launch.command`: `python -m benchmarks.sender STEPS_PER_SECOND`.
"""

import os
import random
import sys
import time
from contextlib import closing
from pathlib import Path

from monitors.records import LAYER_GROUPS, DataRange, FinishedRecord, StartedRecord, StepRecord, StepTime
from trainer.contract.commands import CommandReader, Leave
from trainer.contract.exit_codes import ExitCode
from trainer.contract.liveness import LivenessWriter, Phase
from trainer.contract.paths import RunPaths
from trainer.reporter import Reporter

_SEQUENCES = 32
_SHARDS = 64
_TOKENS = 1024


def main(steps_per_second: float) -> int:
    """Report steps until told to leave."""
    paths, attempt = RunPaths(Path(os.environ["LONGWATCH_RUN_DIR"])), int(os.environ["LONGWATCH_ATTEMPT"])
    commands = CommandReader(paths.commands(attempt))
    chance = random.Random(0)
    with closing(Reporter(paths, attempt)) as reporter, LivenessWriter(paths.liveness(attempt)) as page:
        reporter.emit(
            StartedRecord, step=0, position=0, tokens=0, loaded=None, precision="bf16", device="cpu", parameters=10**9,
            vocab_size=50304, batch_samples=_SEQUENCES, sample_tokens=_TOKENS, total_steps=10**7,
            total_samples=10**9, shards=tuple(f"shard-{number}" for number in range(_SHARDS)), peak_lr=3e-4,
            warmup_steps=100,
        )  # fmt: skip
        page.enter(Phase.TRAIN)
        step, begun_s = 0, time.monotonic()
        while not any(isinstance(command, Leave) for command in commands.poll()):
            step += 1
            time.sleep(max(0.0, begun_s + step / steps_per_second - time.monotonic()))
            _report(reporter, chance, step)
            page.beat(step)
        reporter.emit(FinishedRecord, step=step, reason="left")
    return int(ExitCode.LEFT)


def _report(reporter: Reporter, chance: random.Random, step: int) -> None:
    loss = 2.0 + 8.0 / (1 + step / 50) + chance.gauss(0, 0.02)
    reporter.emit(
        StepRecord, step=step, loss=loss, grad_norm=abs(chance.gauss(0.5, 0.05)), lr=3e-4, lr_planned=3e-4,
        tokens=_SEQUENCES * _TOKENS, update_ratio={group: chance.gauss(1e-3, 1e-5) for group in LAYER_GROUPS},
        step_time_s=StepTime(data=0.001, compute=0.09, other=0.001),
        data=DataRange(begin=(step - 1) * _SEQUENCES, end=step * _SEQUENCES),
        shards=dict.fromkeys(chance.sample(range(_SHARDS), 8), (4, 4 * loss)),
        worst=((step - 1) * _SEQUENCES, loss + 1.0),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
