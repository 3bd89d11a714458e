"""Scaling rules and the noise scale."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.scaling import NoiseScale, linear_lr, square_root_lr


@given(lr=st.floats(1e-6, 1), batch=st.integers(1, 10**6), factor=st.integers(1, 1000))
def test_rules_scale_with_the_batch_and_its_root(lr: float, batch: int, factor: int) -> None:
    """k times the batch is k times the rate under the linear rule, sqrt(k) times under the other, and back."""
    assert linear_lr(lr, batch, batch * factor) == pytest.approx(lr * factor)
    assert square_root_lr(lr, batch, batch * factor) == pytest.approx(lr * math.sqrt(factor))
    assert square_root_lr(square_root_lr(lr, batch, batch * factor), batch * factor, batch) == pytest.approx(lr)


def test_noise_scale_of_a_known_gradient_distribution() -> None:
    """Gradients G + noise of known covariance: the estimate meets trace(S) / |G|^2 within a few percent."""
    generator = torch.Generator().manual_seed(0)
    true, sigma, dimensions = torch.full((50,), 0.3), 1.5, 50
    estimate = NoiseScale(decay=0.999)
    for _ in range(4000):
        samples = true + sigma * torch.randn(32, dimensions, generator=generator)
        estimate.update(samples[:4].mean(0).norm().item(), samples.mean(0).norm().item(), 4, 32)
    assert estimate.value == pytest.approx(sigma**2 * dimensions / true.norm().item() ** 2, rel=0.1)


def test_noise_scale_is_unknown_before_data_and_ignores_non_finite_norms() -> None:
    """Unknown is None, never 0; a NaN step leaves the estimate as it was."""
    estimate = NoiseScale()
    assert estimate.value is None
    estimate.update(2.0, 1.5, 4, 16)
    value = estimate.value
    assert value is not None
    estimate.update(math.nan, 1.5, 4, 16)
    estimate.update(2.0, math.inf, 4, 16)
    assert estimate.value == value


def test_noise_scale_refuses_a_single_micro_batch() -> None:
    """Equal batch sizes would divide by zero: an error that says what to do."""
    with pytest.raises(ValueError, match="accumulate"):
        NoiseScale().update(1.0, 1.0, 8, 8)
