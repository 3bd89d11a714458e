"""A tiny model with everything that is hard to save, and one save from beginning to end."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.stores import claimed
from trainer.checkpoint import Author, Health, Parent, Snapshotter, model_tensors, named_parameters, optimizer_tensors
from trainer.contract import arena
from trainer.contract.arena import ArenaReader, Slot
from trainer.contract.manifest import Sealed, commit_id
from trainer.contract.store import Store
from trainer.keeping.persist import describe, persist
from trainer.keeping.tier import LocalTier
from trainer.keeping.upload import upload

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


@dataclass
class Saving:
    """One attempt's way from tensors to the store, step by step. Objects are so small that a tiny model has several."""

    store: Store
    root: Path
    epoch: int = 1
    object_bytes: int = 300
    loaded: Parent | None = None
    tier: LocalTier = field(init=False)
    snapshotter: Snapshotter = field(init=False)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.tier = LocalTier(self.root / "checkpoints")
        author = Author("run-1", self.epoch, self.epoch, "c", self.loaded)
        self.snapshotter = Snapshotter(self.root / "arena", author, self.object_bytes)

    def snapshot(self, tensors: dict[str, Tensor], step: int = STEP, extra: dict[str, object] | None = None) -> str:
        """Copy the tensors; returns the name of the commit to be."""
        taken = self.snapshotter.snapshot(
            tensors, extra or {}, step=step, position=2 * step, tokens=16 * step, health=Health(loss=2.0)
        )
        return taken.commit

    def pending(self) -> list[Slot]:
        """Slots that are not on disk yet, oldest first."""
        with ArenaReader(self.root / "arena") as reader:
            return sorted((slot for slot in reader.slots() if slot.is_pending), key=lambda slot: slot.number)

    def persist(self) -> Sealed:
        """Put the oldest pending snapshot on the local disk and release its slot, whatever came of it."""
        with ArenaReader(self.root / "arena") as reader:
            slot = self.pending()[0]
            try:
                return persist(reader, slot, describe(reader, slot), self.tier, lambda: None)
            finally:
                reader.release(slot)

    def upload(self, commit: str) -> Sealed:
        """Send one commit to the store."""
        sealed = upload(self.tier, self.store, commit, lambda: None, lambda: None)
        self.tier.mark_uploaded(commit)
        return sealed

    def save(self, tensors: dict[str, Tensor], step: int = STEP, extra: dict[str, object] | None = None) -> Sealed:
        """One save from beginning to end."""
        commit = self.snapshot(tensors, step, extra)
        self.persist()
        return self.upload(commit)

    def close(self) -> None:
        """Let go of the arena and remove it."""
        self.snapshotter.close()
        arena.remove(self.root / "arena")

    def __enter__(self) -> "Saving":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def save(
    store: Store, root: Path, tensors: dict[str, Tensor], step: int = STEP, extra: dict[str, object] | None = None,
    epoch: int = 1,
) -> Sealed:  # fmt: skip
    """One save of an attempt that does nothing else."""
    with Saving(claimed(store, epoch), root, epoch) as saving:
        return saving.save(tensors, step, extra)
