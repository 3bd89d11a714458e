"""Checkpoints of a training state: the names that the trainer uses. The parts are in `trainer.checkpointing`."""

from trainer.checkpointing.errors import (
    CheckpointError,
    NonFiniteStateError,
    SnapshotRefusedError,
    StateMismatchError,
)
from trainer.checkpointing.load import Loaded, load_checkpoint
from trainer.checkpointing.snapshot import Author, Snapshotter
from trainer.checkpointing.tensors import (
    model_tensors,
    named_parameters,
    optimizer_tensors,
    restore_model,
    restore_optimizer,
)
from trainer.contract.manifest import Health, Parent

__all__ = [
    "Author",
    "CheckpointError",
    "Health",
    "Loaded",
    "NonFiniteStateError",
    "Parent",
    "SnapshotRefusedError",
    "Snapshotter",
    "StateMismatchError",
    "load_checkpoint",
    "model_tensors",
    "named_parameters",
    "optimizer_tensors",
    "restore_model",
    "restore_optimizer",
]
