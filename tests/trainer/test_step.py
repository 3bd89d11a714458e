"""One update: accumulation, clipping, refusal of non-finite updates, and no wait for the device."""

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from monitors.records import LAYER_GROUPS
from tests.trainer.tiny import CPU, FP32, changed, frozen_state, tiny_model, tiny_step, tiny_tokens
from trainer.contract.config import OptimizerConfig, PreventionConfig
from trainer.model import GPT, layer_groups
from trainer.precision import resolve


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_equal_one_big_batch(micro: int) -> None:
    """The same losses, norm and weights to rounding, also where the last micro-batch is smaller."""
    results, models = [], []
    for sequences in (None, micro):
        model = tiny_model()
        step = tiny_step(model, micro_sequences=sequences)
        results.append([step(tiny_tokens(8, seed=seed), 1e-3).read() for seed in range(3)])
        models.append(model)
    for whole, split in zip(*results, strict=True):
        assert split.loss == pytest.approx(whole.loss, rel=1e-5)
        assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
        assert split.losses == pytest.approx(whole.losses, rel=1e-5)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)


def test_the_loss_is_the_mean_over_the_sequences_in_order() -> None:
    """Per-sequence losses are those of the model on each sequence, without the z-loss."""
    tokens = tiny_tokens(5)
    model = tiny_model(z_loss=0.5)
    expected = [model(row[None, :-1], row[None, 1:]).losses.item() for row in tokens]
    result = tiny_step(model, micro_sequences=2)(tokens, 1e-3).read()
    assert result.losses == pytest.approx(expected, rel=1e-5)
    assert result.loss == pytest.approx(sum(expected) / 5, rel=1e-6)


def test_clipping_reports_the_norm_before_and_keeps_the_direction() -> None:
    """The reported norm is that of the raw gradient; the gradient applied has the clip norm and the same direction."""
    raw_model, clipped_model = tiny_model(), tiny_model()
    raw = tiny_step(raw_model, clip_norm=1e9)(tiny_tokens(), 1e-3).read()
    clipped = tiny_step(clipped_model, clip_norm=0.01)(tiny_tokens(), 1e-3).read()
    before = torch.cat([p.grad.flatten() for p in raw_model.parameters() if p.grad is not None])
    after = torch.cat([p.grad.flatten() for p in clipped_model.parameters() if p.grad is not None])
    assert clipped.grad_norm == raw.grad_norm == pytest.approx(before.norm().item(), rel=1e-5)
    assert (raw.clipped, clipped.clipped) == (False, True)
    assert after.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert torch.allclose(before / before.norm(), after / after.norm(), atol=1e-6)


def nan_loss(losses: Tensor) -> Tensor:
    """A loss that is not a number."""
    return losses * math.nan


def infinite_gradient(model: GPT) -> None:
    """One infinite element in one gradient."""
    assert model.embedding.weight.grad is not None
    model.embedding.weight.grad[0, 0] = math.inf


def nan_gain_gradient(model: GPT) -> None:
    """One NaN in the gradient of a norm gain, which lies in the group without decay."""
    assert model.final_norm.weight.grad is not None
    model.final_norm.weight.grad[3] = math.nan


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "fault",
    [{"transform_losses": nan_loss}, {"after_backward": infinite_gradient}, {"after_backward": nan_gain_gradient}],
)
def test_a_non_finite_update_changes_nothing(precision: Literal["fp32", "bf16", "fp16"], fault: dict[str, Any]) -> None:
    """Weights, moments and step counts stay bit-identical, the record says skipped, and the next update is sound."""
    model = tiny_model()
    step = tiny_step(model, precision=resolve(precision, CPU))
    step(tiny_tokens(seed=1), 1e-2)
    before = frozen_state(model, step.optimizer)
    for name, seam in fault.items():
        setattr(step, name, seam)
    result = step(tiny_tokens(seed=2), 1e-2, details=True).read()
    assert result.skipped
    assert not math.isfinite(result.grad_norm)
    assert changed(before, frozen_state(model, step.optimizer)) == set()
    assert set(result.update_ratio.values()) == {0.0}
    for name in fault:
        setattr(step, name, None)
    result = step(tiny_tokens(seed=3), 1e-2).read()
    assert not result.skipped
    assert changed(before, frozen_state(model, step.optimizer)) == before.keys()


def test_a_skipped_update_leaves_no_trace_in_later_ones() -> None:
    """A run with a poisoned batch in between ends bit-identical to a run without it."""
    ends = []
    for poisoned in (False, True):
        model = tiny_model()
        step = tiny_step(model)
        step(tiny_tokens(seed=1), 1e-2)
        if poisoned:
            step.transform_losses = nan_loss
            assert step(tiny_tokens(seed=9), 1e-2).read().skipped
            step.transform_losses = None
        step(tiny_tokens(seed=2), 1e-2)
        ends.append(frozen_state(model, step.optimizer))
    assert changed(*ends) == set()


_QUICK = {"window_steps": 8, "min_steps": 2, "max_skips": 2}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_update_out_of_the_band_changes_nothing(precision: Literal["fp32", "bf16", "fp16"]) -> None:
    """Weights, moments and step counts stay bit-identical, the record says why, and the next update is sound."""
    model, prevention = tiny_model(), PreventionConfig.model_validate({"skip_update": _QUICK})
    step = tiny_step(model, precision=resolve(precision, CPU), prevention=prevention)
    for seed in range(3):
        assert not step(tiny_tokens(seed=seed), 1e-3).read().skipped
    before = frozen_state(model, step.optimizer)
    step.after_backward = _tenfold
    result = step(tiny_tokens(seed=4), 1e-3).read()
    step.after_backward = None
    assert result.skipped
    assert result.finite
    assert changed(before, frozen_state(model, step.optimizer)) == set()
    assert result.prevention is not None
    assert (result.prevention.skipped, result.prevention.clip_factor) == ("norm", None)
    assert result.prevention.norm_limit is not None
    assert result.grad_norm / 10 < result.prevention.norm_limit < result.grad_norm
    assert not step(tiny_tokens(seed=5), 1e-3).read().skipped
    assert changed(before, frozen_state(model, step.optimizer)) == before.keys()


def _tenfold(model: GPT) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(10)


@pytest.mark.parametrize(("clip_norm", "by"), [(1e9, "adaptive_clip"), (1e-3, "clip_norm")])
def test_the_lower_of_both_limits_clips(clip_norm: float, by: str) -> None:
    """Adaptive clipping goes below `clip_norm`, never above; the record has the factor by which the gradient shrank."""
    prevention = PreventionConfig.model_validate({"adaptive_clip": {"warm_up_steps": 2}})
    step = tiny_step(tiny_model(), clip_norm=clip_norm, prevention=prevention)
    for seed in range(4):
        step(tiny_tokens(seed=seed), 1e-3)
    step.after_backward = _tenfold
    result = step(tiny_tokens(seed=4), 1e-3).read()
    found = torch.cat([p.grad.flatten() for p in step.model.parameters() if p.grad is not None]).norm().item()
    assert result.clipped
    assert result.prevention is not None
    assert result.prevention.clipped_by == by
    assert result.prevention.clip_factor == pytest.approx(found / result.grad_norm, rel=2e-3)
    assert found == pytest.approx(1e-3, rel=2e-3) if by == "clip_norm" else found < result.grad_norm / 5


def test_fp16_overflow_lowers_the_scale_and_its_state_can_be_kept() -> None:
    """A skipped fp16 step halves the loss scale; a scaler restored from its state goes on with it."""
    precision = resolve("fp16", CPU)
    step = tiny_step(tiny_model(), precision=precision)
    first = step(tiny_tokens(), 1e-3).read()
    step.after_backward = infinite_gradient
    second = step(tiny_tokens(), 1e-3).read()
    step.after_backward = None
    third = step(tiny_tokens(), 1e-3).read()
    assert first.scale is not None
    assert (second.scale, third.scale) == (first.scale, first.scale / 2)
    restored = precision.scaler()
    assert step.scaler is not None
    assert restored is not None
    restored.load_state_dict(step.scaler.state_dict())
    assert restored.get_scale() == third.scale


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_agree_with_fp32(precision: Literal["bf16", "fp16"]) -> None:
    """Loss, unscaled norm and small-batch norm are those of fp32 within the format's rounding; weights stay fp32."""
    reference = tiny_step(tiny_model(), micro_sequences=2)(tiny_tokens(), 1e-3, details=True).read()
    model = tiny_model()
    step = tiny_step(model, precision=resolve(precision, CPU), micro_sequences=2)
    result = step(tiny_tokens(), 1e-3, details=True).read()
    assert result.loss == pytest.approx(reference.loss, rel=1e-2)
    assert result.grad_norm == pytest.approx(reference.grad_norm, rel=3e-2)
    assert reference.details is not None
    assert result.details is not None
    assert result.details.small_norm == pytest.approx(reference.details.small_norm, rel=3e-2)
    assert result.details.grad_norms == pytest.approx(reference.details.grad_norms, rel=5e-2)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_update_ratio_equals_the_naive_one() -> None:
    """|dw| / |w| per layer group; these tensors are smaller than a slice, so exactly."""
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = tiny_step(model)(tiny_tokens(), 1e-2).read()
    for group in LAYER_GROUPS:
        names = [name for name, of in layer_groups(model).items() if of == group]
        old = torch.cat([before[name].flatten() for name in names])
        new = torch.cat([dict(model.named_parameters())[name].detach().flatten() for name in names])
        assert result.update_ratio[group] == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-4)


@settings(max_examples=10, deadline=None)
@given(lr=st.floats(1e-6, 1e-2))
def test_the_rate_given_is_the_rate_applied(lr: float) -> None:
    """A first Adam update moves every element by about its rate; at rate 0 nothing moves."""
    model = tiny_model(layers=1)
    gain = model.final_norm.weight.detach().clone()
    tiny_step(model, optimizer=OptimizerConfig(clip_norm=1e9))(tiny_tokens(), lr)
    assert (model.final_norm.weight - gain).abs().max().item() == pytest.approx(lr, rel=0.1, abs=2e-7)
    still = tiny_model()
    result = tiny_step(still)(tiny_tokens(), 0.0).read()
    assert set(result.update_ratio.values()) == {0.0}


def test_details_come_when_asked_for() -> None:
    """Group norms compose to the whole norm; every figure is there for its groups; without details there are none."""
    step = tiny_step(tiny_model(), micro_sequences=1)
    plain = step(tiny_tokens(), 1e-3, ratios=False).read()
    assert plain.details is None
    assert plain.update_ratio == {}
    result = step(tiny_tokens(), 1e-3, details=True).read()
    found = result.details
    assert found is not None
    assert math.hypot(*found.grad_norms.values()) == pytest.approx(result.grad_norm, rel=1e-5)
    assert tuple(found.grad_norms) == tuple(found.second_moment_ratio) == LAYER_GROUPS
    assert tuple(found.attention_logit_max) == tuple(found.activations) == ("early", "mid", "late")
    assert found.log_z == pytest.approx(math.log(64), rel=0.05)
    assert found.small_norm is not None
    assert found.small_norm > result.grad_norm  # fewer sequences, more noise


def test_details_do_not_change_the_update() -> None:
    """The same weights with and without the dearer signals, to the bit."""
    ends = []
    for details in (False, True):
        model = tiny_model()
        step = tiny_step(model, micro_sequences=2)
        step(tiny_tokens(), 1e-2, details=details, ratios=details)
        ends.append(frozen_state(model, step.optimizer))
    assert changed(*ends) == set()


class _Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations by which the host asks a tensor for its value."""

    ASKS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operation, then do it."""
        self.seen += 1
        if func.overloadpacket.__name__ in self.ASKS:
            self.asked.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_counter_of_waits_counts() -> None:
    """The instrument of the next test sees `.item()` and a branch on a tensor."""
    with _Waits() as waits:
        torch.ones(()).item()
        assert torch.ones(())
    assert len(waits.asked) == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rungs", [{}, {"skip_update": _QUICK, "adaptive_clip": {"warm_up_steps": 2}}])
def test_a_step_never_asks_the_device(
    precision: Literal["fp32", "bf16", "fp16"], checkpointing: bool, rungs: dict[str, Any]
) -> None:
    """No value reaches the host during a step, with every signal on; `read` is the only place that waits."""
    model = tiny_model(qk_norm=True, z_loss=1e-4, checkpointing=checkpointing)
    prevention = PreventionConfig.model_validate(rungs)
    step = tiny_step(model, precision=resolve(precision, CPU), micro_sequences=2, prevention=prevention)
    tokens = tiny_tokens()
    with _Waits() as waits:
        pending = [step(tokens, 1e-3, details=True) for _ in range(3)]  # the rungs are armed by the third
    assert waits.seen > 100
    assert waits.asked == []
    assert all(math.isfinite(one.read().loss) for one in pending)


def test_seams_are_called_once_per_micro_batch_and_once_per_update() -> None:
    """Losses are transformed before their mean, and the model is shown with whole gradients."""
    calls: list[str] = []

    def transform(losses: Tensor) -> Tensor:
        calls.append("losses")
        return losses + 1.0

    def after(model: GPT) -> None:
        assert all(p.grad is not None for p in model.parameters())
        calls.append("backward")

    plain = tiny_step(tiny_model())(tiny_tokens(), 1e-3).read()
    step = tiny_step(tiny_model(), micro_sequences=2, transform_losses=transform, after_backward=after)
    result = step(tiny_tokens(), 1e-3).read()
    assert calls == ["losses", "losses", "backward"]
    assert result.loss == pytest.approx(plain.loss + 1.0, rel=1e-5)


def test_a_fixed_batch_is_learned() -> None:
    """Thirty updates on one batch bring its loss far down: the parts train together."""
    step = tiny_step(tiny_model(width=32), precision=FP32)
    first = step(tiny_tokens(), 1e-2).read().loss
    for _ in range(30):
        last = step(tiny_tokens(), 1e-2).read().loss
    assert last < 0.5 * first
