"""The full training state: collected into tensors and JSON, and put back.

Everything that the next update depends on is here: weights, buffers, moments and step counts in their own dtypes,
scaler, every RNG, the cursor, the windows of the guards. Tensors are named and copied by `trainer.checkpoint`; the rest
is JSON, never pickled.
"""

import base64
import hashlib
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from trainer.checkpoint import (
    model_tensors,
    named_parameters,
    optimizer_tensors,
    restore_model,
    restore_optimizer,
)

JSON = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TrainingState:
    """A state by name. Tensors are the live ones, not copies; `extra` is JSON."""

    tensors: dict[str, Tensor]
    extra: JSON


@dataclass(frozen=True, slots=True)
class Progress:
    """How far training has come. `position` is the raw cursor: the first sample not yet consumed.

    `skipped_updates` of the `step` updates were not applied; the optimizer has not counted them.
    """

    step: int = 0
    tokens: int = 0
    position: int = 0
    skipped_updates: int = 0


def collect(
    model: nn.Module, optimizer: Optimizer, scaler: GradScaler | None, progress: Progress, branch: int, facts: JSON,
    guards: Mapping[str, Tensor] = MappingProxyType({}),
) -> TrainingState:  # fmt: skip
    """The state at a step boundary. `facts` (overlays, flags) are kept for comparison, never loaded back.

    `guards` are the windows of the prevention ladder, by name; they take them back themselves.
    """
    extra: JSON = {
        **asdict(progress),
        "branch": branch,
        "rng": collect_rng(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "facts": facts,
    }
    tensors = model_tensors(model) | optimizer_tensors(optimizer, named_parameters(model))
    return TrainingState(tensors | dict(guards), extra)


def restore(
    model: nn.Module, optimizer: Optimizer, scaler: GradScaler | None, tensors: dict[str, Tensor], extra: JSON
) -> Progress:
    """Put a state into a model and optimizer of the same shape; RNG is `restore_rng`'s business.

    Raises:
        trainer.checkpoint.StateMismatchError: it is of another shape.
    """
    restore_model(model, tensors)
    restore_optimizer(optimizer, named_parameters(model), tensors)
    if scaler is not None and extra["scaler"] is not None:
        scaler.load_state_dict(extra["scaler"])
    return Progress(extra["step"], extra["tokens"], extra["position"], extra["skipped_updates"])


def seed_everything(seed: int) -> None:
    """Start every generator that training may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def collect_rng() -> JSON:
    """All generator states as JSON."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _to_text(torch.get_rng_state()),
        "cuda": [_to_text(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def restore_rng(extra: JSON, seed: int, branch: int) -> None:
    """Exactly the states of the checkpoint, or, on a branch that it did not belong to, fresh ones.

    After a training rollback the branch number is folded in, so that the same dice are not thrown again; after a
    crash within a branch they are.
    """
    if branch != extra["branch"]:
        folded = hashlib.sha256(f"{seed}/{branch}/{extra['step']}".encode()).digest()
        seed_everything(int.from_bytes(folded[:8], "little") >> 1)
        return
    rng = extra["rng"]
    version, words, gauss = rng["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = rng["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_text(rng["torch"]))
    if torch.cuda.is_available() and len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_from_text(text) for text in rng["cuda"]])


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
