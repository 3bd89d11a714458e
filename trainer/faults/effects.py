"""What injected faults do to tensors and batches: weights, gradients, moments, the loss path, the tokens.

Each is a real fault of the arithmetic, not a made-up number in a record. Randomness is drawn from generators of its
own, so that a fault leaves the run's own random numbers where they were.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.contract.config import FaultConfig
from trainer.model import GPT, Block

_EXPONENT_TOP = {4: (torch.int32, 30), 2: (torch.int16, 14)}  # by bytes: a float32 of 0.02 becomes 7e36, so a bf16
_DRIFT_SEED = 0x5EED
_DRIFT_NATS = 24.0  # excess loss per variance of relative noise, measured on a tiny GPT in balance with AdamW at 3e-3


@torch.no_grad()
def zero_layer(model: GPT, fault: FaultConfig) -> None:
    """All matrices of one block become 0: its units are dead."""
    for parameter in _block(model, fault).parameters():
        if parameter.ndim >= 2:
            parameter.zero_()


@torch.no_grad()
def saturate_layer(model: GPT, fault: FaultConfig) -> None:
    """The MLP's input weights of one block grow by `factor`: its units become hard gates."""
    _block(model, fault).up.weight.mul_(fault.factor)


@torch.no_grad()
def scale_qk(model: GPT, fault: FaultConfig) -> None:
    """Query and key weights of every block grow by `factor`: attention freezes to one token (persistent at x16)."""
    for block in model.blocks:
        assert isinstance(block, Block)
        weight = block.attention.qkv.weight
        weight[: 2 * weight.shape[0] // 3].mul_(fault.factor)


@torch.no_grad()
def drift(model: GPT, fault: FaultConfig, step: int, count: int) -> None:
    """Every matrix takes a random step, larger each time, against which the optimizer loses: the loss creeps up.

    The excess that noise causes grows with its variance, so the variance grows linearly: about `factor` nats a step.
    """
    age = step - fault.steps[0] + 1 if fault.steps is not None else count
    share = math.sqrt(fault.factor * age / _DRIFT_NATS)
    generator = torch.Generator().manual_seed(_DRIFT_SEED + step)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(noise * parameter.square().mean().sqrt(), alpha=share)
            parameter.div_(math.sqrt(1 + share**2))  # its size stays: what is learned fades, nothing explodes


@torch.no_grad()
def flip_weight_bit(model: GPT, fault: FaultConfig) -> None:
    """The top exponent bit of one weight of a block, as a memory cell that fails would."""
    _flip(_block(model, fault).up.weight)


@torch.no_grad()
def flip_gradient_bit(model: GPT, fault: FaultConfig) -> None:
    """The same bit of one gradient, once it is whole."""
    gradient = _block(model, fault).up.weight.grad
    assert gradient is not None, "gradients are there after backward"
    _flip(gradient)


@torch.no_grad()
def poison_gradient(model: GPT, fault: FaultConfig) -> None:
    """One gradient of a block becomes NaN."""
    gradient = _block(model, fault).up.weight.grad
    assert gradient is not None, "gradients are there after backward"
    gradient.view(-1)[0] = torch.nan


@torch.no_grad()
def reverse_gradients(model: GPT, fault: FaultConfig) -> None:
    """All gradients point uphill, `factor` times as long: clipping shortens such an update, it does not turn it.

    With a negative factor they keep their direction and only grow.
    """
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(-fault.factor)


def poison_losses(losses: Tensor) -> Tensor:
    """Every loss becomes NaN, in the graph: so do all gradients."""
    return losses * torch.nan


@torch.no_grad()
def drop_moments(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer forgets: moments and step counts as before the first update."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


class TargetLeak:
    """While `odds` is above 1 the logit of every target is raised by log(odds), behind the model's back.

    The training loss falls at once, the validation loss does not follow.
    """

    def __init__(self, model: GPT) -> None:
        self.odds = 1.0
        self._targets: Tensor | None = None
        model.register_forward_pre_hook(self._remember, with_kwargs=False)
        model.head.register_forward_hook(self._raise)

    def _remember(self, module: nn.Module, args: tuple[object, ...]) -> None:
        targets = args[1] if len(args) > 1 else None
        self._targets = targets if isinstance(targets, Tensor) and module.training else None

    def _raise(self, module: nn.Module, args: tuple[object, ...], logits: Tensor) -> Tensor:
        if self.odds <= 1.0 or self._targets is None:
            return logits
        bonus = torch.full_like(logits[..., :1], float(np.log(self.odds)))
        return logits.scatter_add(-1, self._targets.unsqueeze(-1), bonus)


def garble(
    fault: FaultConfig, tokens: NDArray[np.int64], positions: NDArray[np.int64], shards: NDArray[np.int64], vocab: int
) -> NDArray[np.int64]:
    """Replace the sequences that lie in the fault's shard or raw range by uniform random tokens.

    The garbage depends on the raw position alone: read again it is the same, as bad bytes on a disk are.
    """
    hit = np.ones(len(positions), dtype=bool)
    if fault.shard is not None:
        hit &= shards == fault.shard
    if fault.data is not None:
        hit &= (positions >= fault.data[0]) & (positions < fault.data[1])
    garbled = tokens.copy()
    for row in np.flatnonzero(hit):
        rng = np.random.default_rng(int(positions[row]))
        garbled[row] = rng.integers(0, vocab, tokens.shape[1])
    return garbled


class ActivationFlip:
    """While `armed`, the same bit of the first unit of a block's MLP flips in every forward pass of training."""

    def __init__(self, model: GPT, fault: FaultConfig) -> None:
        self.armed = False
        self.fault = fault
        self._model = model
        _block(model, fault).up.register_forward_hook(self._strike)

    def _strike(self, module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
        if not self.armed or not self._model.training:
            return output
        struck = output.clone()
        with torch.no_grad():
            _flip(struck)
        return struck


def _flip(tensor: Tensor) -> None:
    integer, bit = _EXPONENT_TOP[tensor.element_size()]
    bits = tensor.view(-1)[:1].view(integer)
    bits.bitwise_xor_(torch.tensor(1 << bit, dtype=integer, device=tensor.device))


def _block(model: GPT, fault: FaultConfig) -> Block:
    block = model.blocks[fault.layer]
    assert isinstance(block, Block)
    return block
