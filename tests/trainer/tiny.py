"""A GPT small enough to test arithmetic on, and one update of it."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from trainer.contract.config import ModelConfig, OptimizerConfig
from trainer.model import GPT
from trainer.optim import build_optimizer
from trainer.precision import Precision, resolve
from trainer.step import TrainStep

VOCAB = 64
TOKENS = 16
CPU = torch.device("cpu")
FP32 = resolve("fp32", CPU)


def tiny_model(*, seed: int = 0, checkpointing: bool = False, **overrides: Any) -> GPT:
    """Three blocks of width 16, the same weights for the same seed."""
    torch.manual_seed(seed)
    config = ModelConfig(**({"layers": 3, "heads": 2, "width": 16} | overrides))
    return GPT(config, VOCAB, TOKENS, activation_checkpointing=checkpointing)


def tiny_tokens(sequences: int = 4, *, seed: int = 1) -> Tensor:
    """Random tokens (sequences, TOKENS + 1)."""
    return torch.randint(0, VOCAB, (sequences, TOKENS + 1), generator=torch.Generator().manual_seed(seed))


def tiny_step(
    model: GPT, *, precision: Precision = FP32, optimizer: OptimizerConfig | None = None, **overrides: Any
) -> TrainStep:
    """A step over `model` with the scaler that its precision wants."""
    config = optimizer or OptimizerConfig()
    built = build_optimizer(model, config)
    options: dict[str, Any] = {"precision": precision, "clip_norm": config.clip_norm, "scaler": precision.scaler()}
    return TrainStep(model, built, **(options | overrides))


def frozen_state(model: GPT, optimizer: AdamW) -> dict[str, Tensor]:
    """Copies of all weights, moments and step counts, by name."""
    state = {f"model.{name}": p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        state |= {f"optim.{name}.{key}": value.clone() for key, value in optimizer.state[parameter].items()}
    return state


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names whose bits differ."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}
