"""A tiny model with everything that is hard to save, and one save from beginning to end."""

from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.checkpoint import (
    CheckpointWriter,
    Committed,
    Health,
    SaveFailed,
    model_tensors,
    named_parameters,
    optimizer_tensors,
)
from trainer.contract.manifest import commit_id
from trainer.contract.store import Store

STEP = 3
COMMIT = commit_id(STEP, 1, 1)


class TinyModel(nn.Module):
    """Tied weights, a persistent buffer and one that is not saved; weights in bfloat16 or float32."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, dtype=dtype)
        self.norm = nn.LayerNorm(6, dtype=dtype)
        self.head = nn.Linear(6, 11, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.tensor(5))
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.norm(self.embed(tokens)))
        return logits


def trained(dtype: torch.dtype = torch.float32, steps: int = STEP) -> tuple[TinyModel, torch.optim.AdamW]:
    """A model after some updates, with float32 moments whatever the weights are, as mixed-precision setups have."""
    torch.manual_seed(1)
    model = TinyModel(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, steps)
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key].float()
    return model, optimizer


def train(model: TinyModel, optimizer: torch.optim.AdamW, steps: int) -> list[float]:
    """Some updates on fixed data; returns the losses."""
    losses = []
    for step in range(steps):
        tokens = torch.arange(8).add(step).remainder(11)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).float(), tokens.roll(-1))
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def full_state(model: TinyModel, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """All tensors of both."""
    return model_tensors(model) | optimizer_tensors(optimizer, named_parameters(model))


def writer_of(store: Store, tmp_path: Path, epoch: int = 1, object_bytes: int = 300) -> CheckpointWriter:
    """A writer whose objects are so small that a tiny model has several."""
    return CheckpointWriter(
        store, run_id="run-1", epoch=epoch, attempt=1, config_digest="c", scratch_dir=tmp_path / "scratch",
        object_bytes=object_bytes,
    )  # fmt: skip


def save(
    writer: CheckpointWriter, tensors: dict[str, Tensor], step: int = STEP, extra: dict[str, object] | None = None
) -> Committed | SaveFailed:
    """One save from beginning to end."""
    writer.snapshot(tensors, extra or {}, step=step, position=6, tokens=48, health=Health(loss=2.0))
    assert writer.flush(30)
    (result,) = writer.poll()
    return result
