"""The probe batch: a few sequences, the same for ever, whose loss tells whether a loaded state is the saved one.

Its tokens are drawn from a seed of their own, so it depends on no data that could change under it, and the model runs
in eval mode, so it depends on no dice. A loss that differs after a load means wrong bytes or a wrong device.
"""

import numpy as np
import torch

from trainer.evaluate import in_eval_mode, sequence_losses
from trainer.model import GPT
from trainer.precision import Precision

_SEED = 20_240_520
_SEQUENCES = 2


class ProbeBatch:
    """Random tokens below `vocab_size`, (2, sequence_tokens + 1)."""

    def __init__(self, vocab_size: int, sequence_tokens: int) -> None:
        rng = np.random.default_rng(_SEED)
        self._tokens = torch.from_numpy(rng.integers(0, vocab_size, (_SEQUENCES, sequence_tokens + 1)))

    def loss(self, model: GPT, precision: Precision) -> float:
        """Mean loss of the model on it."""
        with in_eval_mode(model):
            return float(sequence_losses(model, self._tokens, precision).mean().item())
