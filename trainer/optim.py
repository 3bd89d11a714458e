"""AdamW with decoupled decay on matrices only, and its state made ahead of the first update.

The fused kernel is used on every device: it takes `found_inf` as a device tensor, so that a non-finite update is
left out (weights, moments and step counts untouched) without asking the host.
"""

import torch
from torch import nn
from torch.optim import AdamW

from trainer.contract.config import OptimizerConfig


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: decay on tensors of two and more dimensions, none on biases and norm gains."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over `model`, with zero moments and step counts in place: checkpoint 0 is a full state too."""
    optimizer = AdamW(
        decay_groups(model, config.weight_decay), lr=config.peak_lr, betas=config.betas, eps=config.eps, fused=True
    )
    reset_state(optimizer)
    return optimizer


def reset_state(optimizer: AdamW) -> None:
    """Zero moments and step counts, as before the first update (step on the parameter's device, as fused wants)."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def set_lr(optimizer: AdamW, lr: float) -> None:
    """The learning rate of the next update, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
