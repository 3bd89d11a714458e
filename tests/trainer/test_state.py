"""The full training state: what is collected comes back, bit for bit, dice included."""

import json
import random

import numpy as np
import torch

from tests.trainer.tiny import changed, frozen_state, tiny_model, tiny_step, tiny_tokens
from trainer.state import Progress, collect, restore, restore_rng, seed_everything

PROGRESS = Progress(step=3, tokens=192, position=12)


def test_state_survives_the_way_through_json() -> None:
    """Weights, moments and progress are equal after a restore into another model; the next update too."""
    one, two = tiny_step(tiny_model(seed=0)), tiny_step(tiny_model(seed=9))
    for seed in range(3):
        one(tiny_tokens(seed=seed), 1e-3)
    state = collect(one.model, one.optimizer, None, PROGRESS, 0, {})
    tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
    progress = restore(two.model, two.optimizer, None, tensors, json.loads(json.dumps(state.extra)))
    assert progress == PROGRESS
    one(tiny_tokens(), 1e-3)
    two(tiny_tokens(), 1e-3)
    assert not changed(frozen_state(one.model, one.optimizer), frozen_state(two.model, two.optimizer))


def _throw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def _collected(branch: int) -> dict[str, object]:
    step = tiny_step(tiny_model())
    return dict(json.loads(json.dumps(collect(step.model, step.optimizer, None, PROGRESS, branch, {}).extra)))


def test_a_crash_repeats_the_dice() -> None:
    """On the branch that the checkpoint belongs to, every generator goes on where it was."""
    seed_everything(5)
    extra = _collected(branch=2)
    expected = _throw()
    seed_everything(6)
    restore_rng(extra, seed=5, branch=2)
    assert _throw() == expected


def test_a_rollback_throws_other_dice() -> None:
    """A new branch throws its own dice, the same ones each time."""
    seed_everything(5)
    extra = _collected(branch=0)
    expected = _throw()
    thrown = []
    for branch in (1, 1, 2):
        restore_rng(extra, seed=5, branch=branch)
        thrown.append(_throw())
    assert thrown[0] == thrown[1]
    assert len({expected, thrown[0], thrown[2]}) == 3
