"""Injected faults: when they fire, that they are counted, and what they really do to a model."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.tiny import VOCAB, changed, frozen_state, tiny_model, tiny_step, tiny_tokens
from trainer.contract.backends import LocalBackend
from trainer.contract.config import FaultConfig, FaultKind
from trainer.contract.store import Store, StoreError
from trainer.faults import effects, process, storage
from trainer.faults.injector import Firings, Injector, Occasion, is_spent, matches, strikes


def fault(kind: str = "nan_loss", **conditions: Any) -> FaultConfig:
    """A fault as run.yaml would give it."""
    return FaultConfig.model_validate({"kind": kind, **conditions})


def at(
    step: int, *, attempt: int = 1, data: tuple[int, int] = (0, 0), shards: frozenset[int] = frozenset()
) -> Occasion:
    """An occasion with what the test cares about."""
    return Occasion(attempt, step, *data, shards)


@pytest.mark.parametrize(
    ("conditions", "occasion", "expected"),
    [
        ({"steps": (5, 7)}, at(5), True),
        ({"steps": (5, 7)}, at(8), False),
        ({"attempt": 2}, at(1, attempt=1), False),
        ({"data": (80, 88)}, at(1, data=(72, 80)), False),
        ({"data": (80, 88)}, at(1, data=(79, 81)), True),
        ({"shard": 3}, at(1, shards=frozenset({1, 2})), False),
        ({"shard": 3, "steps": (1, 1)}, at(1, shards=frozenset({3})), True),
    ],
)
def test_all_named_conditions_must_hold(conditions: dict[str, Any], occasion: Occasion, expected: bool) -> None:
    """Steps are inclusive, data is half-open, and every condition counts."""
    assert matches(fault(**conditions), occasion) is expected


@given(st.lists(st.lists(st.integers(1, 12), max_size=12), max_size=4))
def test_once_is_one_window_of_one_attempt(attempts: list[list[int]]) -> None:
    """However often steps are visited again, a once fault fires in its first attempt only, at most once a step."""
    config = fault(steps=(4, 6))
    count, fired = 0, []
    for attempt, steps in enumerate(attempts, 1):
        before = Firings(count)
        for step in steps:
            occasion = at(step, attempt=attempt)
            if matches(config, occasion) and not is_spent(config, before, occasion):
                before = Firings(before.count + 1, step)
                fired.append((attempt, step))
        count = before.count
    assert len(fired) == len(set(fired)) == count <= 3
    assert len({attempt for attempt, _ in fired}) <= 1


def test_a_once_fault_without_steps_fires_once(tmp_path: Path) -> None:
    """Tied to data alone, it is over after one step."""
    injector = Injector((fault(data=(0, 100)),), tmp_path / "faults.json")
    hits = [bool(injector.due(at(step, data=(0, 8)), ("nan_loss",))) for step in range(1, 4)]
    assert hits == [True, False, False]


def test_counts_outlive_the_process(tmp_path: Path) -> None:
    """What a killed attempt has counted, the next one knows; an endless fault goes on counting."""
    faults = (fault("sigkill", steps=(3, 3)), fault("slow", once=False))
    kinds: tuple[FaultKind, ...] = ("sigkill", "slow")
    first = Injector(faults, tmp_path / "faults.json").due(at(3), kinds)
    again = Injector(faults, tmp_path / "faults.json").due(at(3, attempt=2), kinds)
    assert [(fired.fault.kind, fired.count) for fired in first] == [("sigkill", 1), ("slow", 1)]
    assert [(fired.fault.kind, fired.count) for fired in again] == [("slow", 2)]


def test_no_faults_touch_no_file(tmp_path: Path) -> None:
    """Without configuration nothing is read or written."""
    injector = Injector((), tmp_path / "faults.json")
    assert injector.due(at(1), ("nan_loss",)) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["nan_loss", "nan_grad"])
def test_poison_is_refused_by_the_step(kind: str) -> None:
    """A NaN put into losses or gradients makes an update that is not applied."""
    step = tiny_step(tiny_model())
    if kind == "nan_loss":
        step.transform_losses = effects.poison_losses
    else:
        step.after_backward = lambda model: effects.poison_gradient(model, fault(kind))
    before = frozen_state(step.model, step.optimizer)
    result = step(tiny_tokens(), 1e-3).read()
    assert result.skipped
    assert math.isnan(result.grad_norm)
    assert not changed(before, frozen_state(step.model, step.optimizer))


def test_leaked_targets_lower_the_training_loss_alone() -> None:
    """The training loss falls by the leak, evaluation sees nothing of it."""
    step = tiny_step(tiny_model())
    leak = effects.TargetLeak(step.model)
    tokens = tiny_tokens()
    honest = step(tokens, 0.0).read().loss
    leak.odds = 100.0
    leaking = step(tokens, 0.0).read().loss
    step.model.eval()
    with torch.no_grad():
        validation = step.model(tokens[:, :-1], tokens[:, 1:]).losses.mean().item()
    assert leaking < 0.5 * honest
    assert validation == pytest.approx(honest, rel=1e-5)


def test_bit_flips_change_one_number_beyond_recognition() -> None:
    """One exponent bit of one weight; one of one gradient, once it is whole."""
    step = tiny_step(tiny_model())
    before = frozen_state(step.model, step.optimizer)
    effects.flip_weight_bit(step.model, fault("bit_flip", layer=1))
    after = frozen_state(step.model, step.optimizer)
    assert changed(before, after) == {"model.blocks.1.up.weight"}
    assert int((before["model.blocks.1.up.weight"] != after["model.blocks.1.up.weight"]).sum()) == 1
    step = tiny_step(tiny_model())
    step.after_backward = lambda model: effects.flip_gradient_bit(model, fault("bit_flip", layer=0))
    assert step(tiny_tokens(), 1e-3).read().grad_norm > 1e20


def test_an_activation_flips_while_it_is_armed_and_in_training_alone() -> None:
    """One unit of one token; the weights are as they were, and an evaluation sees nothing of it."""
    step = tiny_step(tiny_model())
    flip = effects.ActivationFlip(step.model, fault("bit_flip", target="activation", layer=1))
    tokens = tiny_tokens()
    honest = step.model(tokens[:, :-1], tokens[:, 1:]).losses
    flip.armed = True
    struck = step.model(tokens[:, :-1], tokens[:, 1:]).losses
    step.model.eval()
    assert not torch.equal(struck[0], honest[0])
    assert torch.equal(struck[1:], honest[1:])
    assert torch.equal(step.model(tokens[:, :-1], tokens[:, 1:]).losses, honest)


def test_a_loose_contact_strikes_by_chance_and_elsewhere_in_every_attempt() -> None:
    """About as often as it should, the same whenever it is asked, and not at the same steps in another attempt."""
    loose = fault("bit_flip", chance=0.2, once=False)
    struck = [[strikes(loose, at(step, attempt=attempt)) for step in range(1000)] for attempt in (1, 1, 2)]
    assert struck[0] == struck[1] != struck[2]
    assert 150 < sum(struck[0]) < 250
    assert strikes(fault("bit_flip"), at(1))


def test_weight_faults_hit_their_layer() -> None:
    """Zeroed, saturated and sharpened weights are those that the fault names."""
    model = tiny_model()
    effects.zero_layer(model, fault("zero_layer", layer=1))
    assert not any(p.any() for p in model.blocks[1].parameters() if p.ndim >= 2)
    queries = model.get_parameter("blocks.0.attention.qkv.weight").detach().clone()
    effects.scale_qk(model, fault("scale_qk", factor=16.0))
    now = model.get_parameter("blocks.0.attention.qkv.weight").detach()
    assert torch.equal(now[:32], 16 * queries[:32])
    assert torch.equal(now[32:], queries[32:])


def test_drift_raises_the_loss_slowly_although_training_goes_on() -> None:
    """The optimizer cannot keep up, and no single step is a jump."""
    step = tiny_step(tiny_model())
    tokens = tiny_tokens()
    for _ in range(80):
        step(tokens, 3e-3)
    losses = []
    for number in range(1, 81):
        effects.drift(step.model, fault("loss_drift", factor=0.02, steps=(1, 80)), number, number)
        losses.append(step(tokens, 3e-3).read().loss)
    early, late = np.mean(losses[:10]), np.mean(losses[-10:])
    assert late > early + 0.3
    assert max(np.diff(losses)) < 0.6 * (late - early)


def test_drop_moments_forgets_everything() -> None:
    """Moments and step counts are as before the first update."""
    step = tiny_step(tiny_model())
    step(tiny_tokens(), 1e-3)
    effects.drop_moments(step.optimizer)
    assert not any(value.any() for state in step.optimizer.state.values() for value in state.values())


def test_garbage_is_the_same_whenever_it_is_read() -> None:
    """Only the bad shard's sequences change, by position, whatever batch they come in."""
    tokens = np.zeros((4, 9), dtype=np.int64)
    positions, shards = np.array([10, 11, 12, 13]), np.array([0, 5, 5, 1])
    bad = fault("bad_shard", shard=5)
    whole = effects.garble(bad, tokens, positions, shards, VOCAB)
    part = effects.garble(bad, tokens[2:], positions[2:], shards[2:], VOCAB)
    assert not whole[[0, 3]].any()
    assert whole[1].any()
    assert np.array_equal(whole[2], part[0])
    assert whole.max() < VOCAB
    assert not tokens.any()


def test_memory_that_no_machine_has_is_refused() -> None:
    """The allocation really fails."""
    with pytest.raises((RuntimeError, torch.OutOfMemoryError), match="memory"):
        process.exhaust_memory(torch.device("cpu"))


class _Switch:
    """Faults of a store, by hand."""

    failing = False
    dying = False


def test_a_failing_store_fails_and_recovers(tmp_path: Path) -> None:
    """Calls raise within the window and work again after it."""
    switch = _Switch()
    store = Store(storage.FaultyBackend(LocalBackend(tmp_path), switch), "file://test", 5.0)
    switch.failing = True
    with pytest.raises(StoreError, match="Input/output"):
        store.create("a", b"1")
    switch.failing = False
    store.create("a", b"1")
    assert store.read("a") == b"1"
