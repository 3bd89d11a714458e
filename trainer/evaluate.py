"""Evaluation on the same held-out samples each time, and the user's hook for downstream metrics.

The model is in eval mode meanwhile and no generator is touched, so a run with evaluations equals one without.
Losses are nats a token; perplexity is exp(loss).
"""

import importlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.errors import SetupError
from trainer.model import GPT
from trainer.precision import Precision

Hook = Callable[[GPT], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation as its record wants it."""

    loss: float
    perplexity: float
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


def load_hook(name: str | None) -> Hook | None:
    """The callable that `evaluate.hook` names.

    Raises:
        SetupError: there is no such module or function.
    """
    if name is None:
        return None
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SetupError(f"evaluate.hook {name!r} cannot be imported ({error})", "name it 'module:function'") from error
    if not callable(function):
        raise SetupError(f"evaluate.hook {name!r} is not callable", "name a function that takes the model")
    hook: Hook = function
    return hook


def evaluate(
    model: GPT, batches: Iterable[NDArray[np.int64]], precision: Precision, *,
    hook: Hook | None = None, interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation | None:  # fmt: skip
    """Mean loss over all sequences; None if it was interrupted between two batches."""
    begun_s = time.monotonic()
    total, sequences = 0.0, 0
    with in_eval_mode(model), torch.no_grad():
        for batch in batches:
            if interrupted():
                return None
            total += sequence_losses(model, torch.from_numpy(batch), precision).double().sum().item()
            sequences += len(batch)
        metrics = {name: float(value) for name, value in hook(model).items()} if hook is not None else {}
    loss = total / sequences if sequences else math.nan
    return Evaluation(loss, _perplexity(loss), time.monotonic() - begun_s, metrics)


def sequence_losses(model: GPT, tokens: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Loss of each sequence of (B, T+1) tokens, without gradients."""
    tokens = tokens.to(next(model.parameters()).device)
    with torch.no_grad(), precision.autocast():
        losses: torch.Tensor = model(tokens[:, :-1], tokens[:, 1:]).losses
    return losses


@contextmanager
def in_eval_mode(model: GPT) -> Iterator[None]:
    """The model without dropout while the block runs."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < math.log(1e300) else math.inf if loss == loss else math.nan
