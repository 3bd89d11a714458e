"""The GPT: pre-norm blocks, SDPA causal attention, rotary positions, tied embeddings.

Rotary positions, not learned ones: they cost no parameters and leave the embedding table to tokens alone. Statistics
are computed inside the graph when the caller asks for them (no hooks), so that `torch.compile` sees two plain variants.
Losses are nats a token.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monitors import probes
from monitors.records import LAYER_GROUPS
from trainer.contract.config import ModelConfig

INIT_STD = 0.02  # GPT-2; residual projections are scaled by 1 / sqrt(2 * layers)
ROTARY_BASE = 10_000.0
VOCAB_MULTIPLE = 64  # matrix units want multiples of 64
NORM_EPS = 1e-5


def padded_vocab(size: int) -> int:
    """`size` rounded up to a multiple of 64; the extra rows are never targets."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Statistics(NamedTuple):
    """What a forward pass measured of itself: per block, and the mean log partition of the output."""

    blocks: probes.BlockStatistics
    log_z: Tensor


class Forward(NamedTuple):
    """`losses` (B,) are what is reported; the objective is their mean plus `penalty` (the z-loss, a scalar)."""

    losses: Tensor
    penalty: Tensor
    statistics: Statistics | None


class Attention(nn.Module):
    """Causal self-attention, with RMS-normed queries and keys if `qk_norm`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.proj = nn.Linear(config.width, config.width, bias=config.bias)
        head = config.width // config.heads
        self.query_norm = nn.RMSNorm(head, eps=NORM_EPS) if config.qk_norm else None
        self.key_norm = nn.RMSNorm(head, eps=NORM_EPS) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *, statistics: bool) -> tuple[Tensor, Tensor | None]:
        """Mix (B, T, width); the second value is the attention-logit maximum, if asked for."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.query_norm is not None and self.key_norm is not None:
            # In fp32: the fused kernel wants the gain's own format, and norms want the digits.
            q, k = self.query_norm(q.float()), self.key_norm(k.float())
        q, k = _rotate(q, cos, sin).to(v.dtype), _rotate(k, cos, sin).to(v.dtype)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        peak = probes.attention_logit_max(q, k, 1 / math.sqrt(q.shape[-1])) if statistics else None
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width)), peak


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (B, H, T, D), halves rotated against each other (Su 2021, NeoX layout)."""
    half = x.shape[-1] // 2
    parts = [-x[..., half : 2 * half], x[..., :half], *([x[..., 2 * half :]] if x.shape[-1] % 2 else [])]
    return x * cos + torch.cat(parts, dim=-1) * sin


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.up = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.down = nn.Linear(4 * config.width, config.width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, statistics: bool
    ) -> tuple[Tensor, probes.BlockStatistics | None]:
        """One block on (B, T, width)."""
        mixed, peak = self.attention(self.attention_norm(x), cos, sin, statistics=statistics)
        x = x + self.dropout(mixed)
        pre = self.up(self.mlp_norm(x))
        active = F.gelu(pre, approximate="tanh")
        x = x + self.dropout(self.down(active))
        return x, None if peak is None else probes.block_statistics(x, pre, active, peak)


class GPT(nn.Module):
    """The model. `vocab_size` should come from `padded_vocab`; inputs may hold up to `sequence_tokens` tokens."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, config: ModelConfig, vocab_size: int, sequence_tokens: int, *, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.sequence_tokens = sequence_tokens
        self.activation_checkpointing = activation_checkpointing
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.head = nn.Linear(config.width, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        cos, sin = _rotary_tables(sequence_tokens, config.width // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        residual = INIT_STD / math.sqrt(2 * self.config.layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = residual if name.endswith((".proj", ".down")) else INIT_STD
                if module is not self.head:  # tied: drawn once, as the embedding
                    nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, targets: Tensor, statistics: bool = False) -> Forward:
        """Mean loss of each sequence: tokens and targets (B, T) -> losses (B,) in fp32.

        Raises:
            ValueError: the sequences are longer than the model was built for.
        """
        hidden, blocks = self._hidden(tokens, statistics)
        logits = self.head(hidden).float().flatten(0, 1)
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape).mean(1)
        weight = self.config.z_loss
        log_z = torch.logsumexp(logits, dim=-1) if weight or statistics else None
        penalty = weight * log_z.square().mean() if weight and log_z is not None else losses.new_zeros(())
        if blocks is None or log_z is None:
            return Forward(losses, penalty, None)
        return Forward(losses, penalty, Statistics(blocks, log_z.detach().mean()))

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits (B, T, vocab) in fp32, for downstream metrics and generation."""
        logits: Tensor = self.head(self._hidden(tokens, statistics=False)[0])
        return logits.float()

    def _hidden(self, tokens: Tensor, statistics: bool) -> tuple[Tensor, probes.BlockStatistics | None]:
        length = tokens.shape[1]
        if length > self.sequence_tokens:
            raise ValueError(
                f"sequences of {length} tokens, model built for {self.sequence_tokens}: raise batch.sequence_tokens"
            )
        x = self.embedding(tokens)
        shrink = self.config.embedding_grad_shrink
        if shrink < 1:  # GLM-130B: same value, gradient times `shrink`
            x = x * shrink + x.detach() * (1 - shrink)
        x = self.dropout(x)
        cos, sin = self.cos[:length], self.sin[:length]
        measured = []
        for block in self.blocks:
            x, stats = self._run(block, x, cos, sin, statistics)
            if stats is not None:
                measured.append(stats)
        return self.final_norm(x), probes.stack_statistics(measured) if measured else None

    def _run(
        self, block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, statistics: bool
    ) -> tuple[Tensor, probes.BlockStatistics | None]:
        out: tuple[Tensor, probes.BlockStatistics | None]
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            out = checkpoint(
                block, x, cos, sin, statistics, use_reentrant=False, preserve_rng_state=self.config.dropout > 0
            )
        else:
            out = block(x, cos, sin, statistics)
        return out


def _rotary_tables(tokens: int, head: int) -> tuple[Tensor, Tensor]:
    """cos and sin (tokens, head); an odd last column is left unrotated."""
    half = head // 2
    frequencies = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float64) / max(1, half))
    angles = torch.outer(torch.arange(tokens, dtype=torch.float64), frequencies)
    angles = torch.cat((angles, angles, angles.new_zeros(tokens, head % 2)), dim=-1)
    return angles.cos().float(), angles.sin().float()


def block_group(block: int, layers: int) -> str:
    """Layer group of a block: thirds of the depth."""
    return ("early", "mid", "late")[block * 3 // layers]


def layer_group(name: str, layers: int) -> str:
    """Layer group of a parameter by its name; the tied output matrix counts as `embed`.

    Raises:
        ValueError: no parameter of this model has that name.
    """
    match name.split("."):
        case ["embedding", *_]:
            return "embed"
        case ["blocks", index, *_]:
            return block_group(int(index), layers)
        case ["final_norm" | "head", *_]:
            return "head"
        case _:
            raise ValueError(f"parameter {name!r} is of no layer group: name it in layer_group")


def layer_groups(model: GPT) -> dict[str, str]:
    """Parameter name -> one of `monitors.records.LAYER_GROUPS`."""
    return {name: layer_group(name, model.config.layers) for name, _ in model.named_parameters()}


def blocks_by_group(layers: int) -> dict[str, list[int]]:
    """Layer group -> its block indices, in the order of `LAYER_GROUPS`, without empty groups."""
    found = {group: [i for i in range(layers) if block_group(i, layers) == group] for group in LAYER_GROUPS}
    return {group: blocks for group, blocks in found.items() if blocks}
