"""AdamW: who decays, what an update is, and its state before the first one."""

import pytest
import torch
from torch import Tensor

from tests.trainer.tiny import tiny_model
from trainer.contract.config import OptimizerConfig
from trainer.optim import build_optimizer, decay_groups, reset_state, set_lr


def test_matrices_decay_and_vectors_do_not() -> None:
    """Tensors of two and more dimensions decay; biases and norm gains do not; nothing is left out or twice."""
    model = tiny_model(bias=True, qk_norm=True)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(p): 0.1 if p.ndim >= 2 else 0.0 for p in model.parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)


def test_a_group_without_members_is_left_out() -> None:
    """A model of matrices alone has one group."""
    assert len(decay_groups(torch.nn.Linear(4, 4, bias=False), 0.1)) == 1


def reference_update(
    p: Tensor, m: Tensor, v: Tensor, g: Tensor, step: int, lr: float, wd: float
) -> tuple[Tensor, Tensor, Tensor]:
    """TRAINING's formula: p -= lr * (m_hat / (sqrt(v_hat) + eps) + wd * p)."""
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.95**step)
    return p - lr * (m_hat / (v_hat.sqrt() + 1e-8) + wd * p), m, v


@pytest.mark.parametrize("bias", [True, False])
def test_updates_follow_the_formula(bias: bool) -> None:
    """Five updates at changing rates equal a hand-written AdamW in double precision."""
    torch.manual_seed(3)
    model = torch.nn.Linear(7, 5, bias=bias)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1))
    expected = [
        (p.detach().double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()) for p in model.parameters()
    ]
    for step, lr in enumerate((0.0, 1e-3, 5e-2, 1e-2, 3e-4), start=1):
        set_lr(optimizer, lr)
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn_like(p)
            wd = 0.1 if p.ndim >= 2 else 0.0
            expected[i] = reference_update(*expected[i], p.grad.double(), step, lr, wd)
        optimizer.step()
    for p, (value, first, second) in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.double(), value, atol=1e-6)
        assert torch.allclose(optimizer.state[p]["exp_avg"].double(), first, atol=1e-6)
        assert torch.allclose(optimizer.state[p]["exp_avg_sq"].double(), second, atol=1e-6)
        assert optimizer.state[p]["step"].item() == 5


def test_state_exists_before_the_first_update_and_is_what_torch_would_make() -> None:
    """Keys, shapes and dtypes equal those that a fused AdamW makes lazily; reset brings the zeros back."""
    model, lazy_model = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimizerConfig())
    lazy = torch.optim.AdamW(lazy_model.parameters(), fused=True)
    for p in [*model.parameters(), *lazy_model.parameters()]:
        p.grad = torch.ones_like(p)
    lazy.step()
    for ours, theirs in zip(model.parameters(), lazy_model.parameters(), strict=True):
        found, wanted = optimizer.state[ours], lazy.state[theirs]
        assert {k: (t.shape, t.dtype) for k, t in found.items()} == {k: (t.shape, t.dtype) for k, t in wanted.items()}
        assert not any(t.any() for t in found.values())
    optimizer.step()
    assert all(t.any() for p in model.parameters() for t in optimizer.state[p].values())
    reset_state(optimizer)
    assert not any(t.any() for p in model.parameters() for t in optimizer.state[p].values())
