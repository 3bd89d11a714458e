"""Evaluation: repeatable, without traces in training, with a hook."""

import math

import pytest
import torch

from tests.trainer.tiny import FP32, tiny_model, tiny_tokens
from trainer.errors import SetupError
from trainer.evaluate import evaluate, load_hook
from trainer.model import GPT


def count_parameters(model: GPT) -> dict[str, float]:
    """A downstream metric, named in the tests below as users name theirs."""
    assert not model.training
    return {"parameters": sum(p.numel() for p in model.parameters())}


def test_the_same_samples_give_the_same_loss_and_leave_no_trace() -> None:
    """Two evaluations agree to the bit, dropout is off, and no dice were thrown."""
    model = tiny_model(dropout=0.5)
    batches = [tiny_tokens(seed=seed).numpy() for seed in range(3)]
    torch.manual_seed(0)
    dice = torch.get_rng_state()
    first, second = (evaluate(model, iter(batches), FP32) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.loss == second.loss
    assert first.perplexity == pytest.approx(math.exp(first.loss))
    assert torch.equal(torch.get_rng_state(), dice)
    assert model.training


def test_uneven_batches_count_by_sequences() -> None:
    """The loss is the mean over sequences, however they are cut into batches."""
    model = tiny_model()
    tokens = tiny_tokens(6).numpy()
    whole = evaluate(model, [tokens], FP32)
    parts = evaluate(model, [tokens[:4], tokens[4:]], FP32)
    assert whole is not None
    assert parts is not None
    assert whole.loss == pytest.approx(parts.loss, rel=1e-6)


def test_an_interrupted_evaluation_is_no_evaluation() -> None:
    """A wish to leave is seen between two batches."""
    assert evaluate(tiny_model(), [tiny_tokens().numpy()], FP32, interrupted=lambda: True) is None


def test_the_hook_gets_the_model() -> None:
    """What it returns comes back by name."""
    hook = load_hook(f"{__name__}:count_parameters")
    found = evaluate(tiny_model(), [tiny_tokens().numpy()], FP32, hook=hook)
    assert found is not None
    assert found.metrics["parameters"] > 0


@pytest.mark.parametrize("name", ["no_such_module:f", "math:no_such_function", "math:pi", "math"])
def test_a_hook_that_is_none_is_named(name: str) -> None:
    """The error says which hook and what would do."""
    with pytest.raises(SetupError, match=r"evaluate\.hook .*function"):
        load_hook(name)
