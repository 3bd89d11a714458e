"""Health signals measured with torch, inside the step: norms, update ratios, block statistics.

Owns the arithmetic of every device-side signal. Never copies to the host and never branches on a tensor's value: each
function returns small device tensors, which the step packs into one copy. Torch lives in this module alone of
`monitors`, so only the trainer imports it. Norms are L2, fractions are shares of 1.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A unit is dead when |GELU(x)| never passes this over the batch. GELU(-3) is -0.004: its gradient is gone there too.
DEAD_BELOW = 0.01
# Beyond this GELU is a hard gate (0 or identity to 1e-14); healthy pre-activations stay at a few units.
SATURATED_ABOVE = 8.0
# Attention logits are recomputed beside SDPA, which hides them: on so many tokens, so many query rows at a time.
LOGIT_TOKENS = 4096
LOGIT_ROWS = 1024
# Elements sampled of each tensor for ratios: 1.4 ms instead of 600 ms for 124M parameters on two cores (measured).
SLICE_ELEMENTS = 4096


class BlockStatistics(NamedTuple):
    """One block (scalars, and (units,) for the units), or all blocks stacked along dimension 0."""

    mean_square: Tensor
    max_abs: Tensor
    logit_max: Tensor
    unit_peak: Tensor
    unit_saturated: Tensor


@torch.no_grad()
def attention_logit_max(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Largest causal attention logit, scaled as softmax sees it, over the first sequences of (B, H, T, D)."""
    tokens = query.shape[-2]
    sequences = max(1, LOGIT_TOKENS // tokens)
    q, k = query[:sequences].float(), key[:sequences].float()
    rows = torch.arange(tokens, device=query.device)
    peaks = []
    for begin in range(0, tokens, LOGIT_ROWS):
        end = min(begin + LOGIT_ROWS, tokens)
        logits = q[..., begin:end, :] @ k[..., :end, :].transpose(-2, -1) * scale
        future = rows[:end] > rows[begin:end, None]
        peaks.append(logits.masked_fill(future, -math.inf).amax())
    return torch.stack(peaks).amax()


@torch.no_grad()
def block_statistics(output: Tensor, pre: Tensor, activation: Tensor, logit_max: Tensor) -> BlockStatistics:
    """Statistics of one block: its output (B, T, width), its MLP units before and after GELU (B, T, units)."""
    wide = output.float()
    return BlockStatistics(
        mean_square=wide.square().mean(),
        max_abs=wide.abs().amax(),
        logit_max=logit_max.float(),
        unit_peak=activation.abs().amax(dim=(0, 1)).float(),
        unit_saturated=(pre.abs() > SATURATED_ABOVE).float().mean(dim=(0, 1)),
    )


def stack_statistics(blocks: Sequence[BlockStatistics]) -> BlockStatistics:
    """Statistics of all blocks, stacked along dimension 0."""
    return BlockStatistics(*(torch.stack(list(field)) for field in zip(*blocks, strict=True)))


def merge_statistics(parts: Sequence[BlockStatistics]) -> BlockStatistics:
    """Statistics of a whole batch from those of equal micro-batches: means average, maxima stay maxima."""
    whole = stack_statistics(parts)
    return BlockStatistics(
        mean_square=whole.mean_square.mean(0),
        max_abs=whole.max_abs.amax(0),
        logit_max=whole.logit_max.amax(0),
        unit_peak=whole.unit_peak.amax(0),
        unit_saturated=whole.unit_saturated.mean(0),
    )


class GroupStatistics(NamedTuple):
    """Per layer group, each (groups,)."""

    rms: Tensor
    max_abs: Tensor
    dead: Tensor
    saturated: Tensor
    logit_max: Tensor


def group_statistics(stats: BlockStatistics, groups: Sequence[Sequence[int]]) -> GroupStatistics:
    """Fold stacked block statistics into groups of block indices.

    A unit whose peak is NaN is neither dead nor alive; rms and max say NaN then. A unit is saturated when it sits
    beyond `SATURATED_ABOVE` on more than half of the tokens.
    """
    dead = (stats.unit_peak < DEAD_BELOW).float().mean(-1)
    saturated = (stats.unit_saturated > 0.5).float().mean(-1)

    def fold(values: Tensor, how: str) -> Tensor:
        parts = [torch.stack([values[i] for i in group]) for group in groups]
        return torch.stack([part.amax() if how == "max" else part.mean() for part in parts])

    return GroupStatistics(
        rms=fold(stats.mean_square, "mean").sqrt(),
        max_abs=fold(stats.max_abs, "max"),
        dead=fold(dead, "mean"),
        saturated=fold(saturated, "mean"),
        logit_max=fold(stats.logit_max, "max"),
    )


def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of each tensor as one (n,) tensor, in few kernels."""
    return torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors))])


def group_norms(tensors: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> Tensor:
    """L2 norm over each group of tensors, given by indices: (groups,)."""
    norms = tensor_norms(tensors)
    return torch.stack([torch.stack([norms[i] for i in group]).norm() for group in groups])


class SampledSlices:
    """The same strided elements of every tensor, again and again: a cheap stand-in for whole tensors.

    Each sampled element is weighted by how many it stands for, so group norms are estimates of the whole, and exact
    where tensors are no larger than a slice. Strides are odd: an even one would visit few columns of a
    power-of-two-wide matrix.
    """

    def __init__(
        self, tensors: Sequence[Tensor], groups: Sequence[Sequence[int]], elements: int = SLICE_ELEMENTS
    ) -> None:
        self._order = [i for group in groups for i in group]
        self._strides = [_odd_stride(tensors[i].numel(), elements) for i in self._order]
        counts = [-(-tensors[i].numel() // stride) for i, stride in zip(self._order, self._strides, strict=True)]
        device = tensors[0].device
        self._weights = torch.cat(
            [
                torch.full((count,), tensors[i].numel() / count, device=device)
                for i, count in zip(self._order, counts, strict=True)
            ]
        )
        sizes = iter(counts)
        self._group_sizes = [sum(next(sizes) for _ in group) for group in groups]

    def take(self, tensors: Sequence[Tensor]) -> Tensor:
        """A copy of the sampled elements of `tensors` (shaped like the ones given at first), group by group."""
        slices = [
            tensors[i].detach().reshape(-1)[::stride] for i, stride in zip(self._order, self._strides, strict=True)
        ]
        return torch.cat(slices).float()

    def norms(self, sample: Tensor) -> Tensor:
        """Estimated L2 norm per group: (groups,)."""
        return self._sums(sample.square() * self._weights).sqrt()

    def means(self, sample: Tensor) -> Tensor:
        """Estimated mean per group: (groups,)."""
        return self._sums(sample * self._weights) / self._sums(self._weights)

    def ratio(self, before: Tensor, after: Tensor) -> Tensor:
        """|after - before| / |before| per group: (groups,); 0 where both are 0."""
        size = self.norms(before)
        return self.norms(after - before) / size.clamp_min(torch.finfo(torch.float32).tiny)

    def _sums(self, values: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in torch.split(values, self._group_sizes)])


def _odd_stride(numel: int, elements: int) -> int:
    stride = max(1, math.ceil(numel / elements))
    return stride if stride % 2 else stride + 1


def second_moment_ratio(
    slices: SampledSlices, grads: Sequence[Tensor], second: Sequence[Tensor], steps: Tensor, beta2: float, eps: float
) -> Tensor:
    """RMS of g^2 / v per group: sqrt(mean(g^2 / max(v_hat, eps^2))), (groups,).

    Far above 1 means the second moment lags behind the gradient, which is when Adam overshoots (Wortsman 2023,
    arXiv:2304.13013, section 3.4). `second` is v after the update, `steps` its count.
    """
    gradient = slices.take(grads)
    corrected = slices.take(second) / (1 - beta2 ** steps.float().clamp_min(1))
    return slices.means(gradient.square() / corrected.clamp_min(eps * eps)).sqrt()
