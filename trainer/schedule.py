"""The learning rate as a pure function of the step. Overlays are not applied here.

Update number N uses `lr_at(N - 1)`: the first update of a run with warm-up has a rate of 0.
"""

import math
from typing import assert_never

from trainer.contract.config import ScheduleConfig


def lr_at(step: int, schedule: ScheduleConfig, peak_lr: float, total_steps: int) -> float:
    """Rate after `step` updates: warm-up from 0 (Vaswani 2017), then the shape; past the end it stays where it ended.

    Cosine is Loshchilov & Hutter 2016 without restarts. WSD (MiniCPM, arXiv:2404.06395) decays linearly over its last
    `decay_steps`, a tenth of the run unless given.
    """
    if step < schedule.warmup_steps:
        return peak_lr * step / schedule.warmup_steps
    return peak_lr * _shape(step, schedule, total_steps)


def _shape(step: int, schedule: ScheduleConfig, total_steps: int) -> float:
    """Share of the peak after warm-up: 1 down to `min_ratio`."""
    floor = schedule.min_ratio
    match schedule.kind:
        case "constant":
            return 1.0
        case "cosine":
            progress = _progress(step, schedule.warmup_steps, total_steps)
            return floor if progress >= 1 else floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
        case "wsd":
            length = schedule.decay_steps or max(1, total_steps // 10)
            progress = _progress(step, max(schedule.warmup_steps, total_steps - length), total_steps)
            return floor if progress >= 1 else 1 - (1 - floor) * progress
        case _:
            assert_never(schedule.kind)


def _progress(step: int, begin: int, end: int) -> float:
    """Share of [begin, end) that is done, within [0, 1]."""
    if step >= end:
        return 1.0
    return max(0.0, (step - begin) / (end - begin))
