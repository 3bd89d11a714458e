"""Batch size and learning rate: two scaling rules, and the noise scale that says where both end."""

import math
from dataclasses import dataclass


def linear_lr(lr: float, batch: float, new_batch: float) -> float:
    """Goyal 2017: the rate grows with the batch. For SGD, below the critical batch size."""
    return lr * new_batch / batch


def square_root_lr(lr: float, batch: float, new_batch: float) -> float:
    """The rate grows with the batch's square root: the better rule for Adam, below the critical batch size."""
    return lr * math.sqrt(new_batch / batch)


@dataclass(slots=True)
class NoiseScale:
    """Gradient noise scale S / |G|^2 (McCandlish 2018, arXiv:1812.06162, appendix A.1), in units of the batch given.

    It estimates the critical batch size. Both parts are noisy and are smoothed separately before the division: the
    mean of ratios is biased.
    """

    decay: float = 0.95
    gradient: float = 0.0
    noise: float = 0.0
    weight: float = 0.0

    def update(self, small_norm: float, big_norm: float, small_batch: float, big_batch: float) -> None:
        """Add one step: gradient norms over a small and over the whole batch. Non-finite norms are passed over.

        Raises:
            ValueError: the batches do not differ, as with a single micro-batch.
        """
        if not 0 < small_batch < big_batch:
            raise ValueError(
                f"the noise scale needs two batch sizes, got {small_batch} and {big_batch}: accumulate micro-batches"
            )
        small, big = small_norm**2, big_norm**2
        if not (math.isfinite(small) and math.isfinite(big)):
            return
        gradient = (big_batch * big - small_batch * small) / (big_batch - small_batch)
        noise = (small - big) / (1 / small_batch - 1 / big_batch)
        self.gradient = self.decay * self.gradient + (1 - self.decay) * gradient
        self.noise = self.decay * self.noise + (1 - self.decay) * noise
        self.weight = self.decay * self.weight + (1 - self.decay)

    @property
    def value(self) -> float | None:
        """The noise scale; None before the first update, or while the noise drowns the gradient."""
        return self.noise / self.gradient if self.weight > 0 and self.gradient > 0 else None
