"""The rules of others, each written from its published definition, folded one recorded step at a time.

A rule answers each step with True when it fires. What firing means differs: Megatron's rule re-runs the step, OLMo's
skips it, llm-foundry's ends the run. Non-finite values are treated as each definition treats them.
"""

import math
import statistics
from collections import deque
from typing import Protocol


class Rule(Protocol):
    """One published detector."""

    name: str
    stops: bool  # firing ends the run

    def observe(self, loss: float, grad_norm: float | None) -> bool:
        """Take one step in; True when the rule fires on it."""
        ...


class KillLossSpike:
    """llm-foundry 0.22: five losses in a row at twice the mean of the window, or half a window above the cap."""

    name, stops = "llm-foundry KillLossSpike", True

    def __init__(self, total_rows: int) -> None:
        self._length = max(100, round(0.05 * total_rows))
        self._window: deque[float] = deque(maxlen=self._length)
        self._streak = self._row = 0
        self._cap: float | None = None

    def observe(self, loss: float, grad_norm: float | None) -> bool:
        """Outliers enter the window, as in the original."""
        window, self._row = self._window, self._row + 1
        fired = False
        if len(window) == self._length:
            if self._cap is None:
                self._cap = min(max(window), 10.0)
            self._streak = self._streak + 1 if loss >= 2 * statistics.fmean(window) else 0
            high = self._row >= 2 * self._length and sum(v > self._cap for v in window) >= self._length / 2
            fired = self._streak > 4 or high
        window.append(loss)
        return fired


class SkipStep:
    """OLMo-core 3.0: loss or gradient norm over 6 standard deviations above the mean of the last 128 steps."""

    name, stops = "OLMo-core skip step", False

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=128)
        self._norms: deque[float] = deque(maxlen=128)

    def observe(self, loss: float, grad_norm: float | None) -> bool:
        """Inactive until 64 values are there; the comparison is written so that NaN fires."""
        fired = _beyond(self._losses, loss)
        self._losses.append(loss)
        if grad_norm is not None:
            fired = _beyond(self._norms, grad_norm) or fired
            self._norms.append(grad_norm)
        return fired


class SpikyLoss:
    """Megatron-Core up to 0.11: the loss changes by a fifth from one step to the next."""

    name, stops = "Megatron spiky loss (0.2)", False

    def __init__(self) -> None:
        self._previous: float | None = None

    def observe(self, loss: float, grad_norm: float | None) -> bool:
        """Infinite fires, NaN does not."""
        previous, self._previous = self._previous, loss
        if previous is None or math.isnan(loss) or math.isnan(previous) or previous == 0:
            return False
        return math.isinf(loss) or abs(loss - previous) / previous >= 0.2


class UnexpectedlyLarge:
    """Megatron-Core from 0.12 on: ten times the largest of the first hundred losses."""

    name, stops = "Megatron large loss (10x)", False

    def __init__(self) -> None:
        self._rows, self._largest = 0, 0.0

    def observe(self, loss: float, grad_norm: float | None) -> bool:
        """Non-finite values are passed over."""
        if not math.isfinite(loss):
            return False
        self._rows += 1
        if self._rows <= 100:
            self._largest = max(self._largest, abs(loss))
            return False
        return abs(loss) >= 10 * self._largest


class ZClip:
    """ZClip 1.0: z-score of the gradient norm against moving averages, over 2.5; on the loss where no norm is known."""

    name, stops = "ZClip z-score (2.5)", False
    _memory, _limit, _start = 0.97, 2.5, 25

    def __init__(self) -> None:
        self._first: list[float] = []
        self._mean = self._variance = 0.0

    def observe(self, loss: float, grad_norm: float | None) -> bool:
        """The averages take the clipped value in."""
        value = loss if grad_norm is None else grad_norm
        if not math.isfinite(value):
            return False
        if len(self._first) < self._start:
            self._first.append(value)
            if len(self._first) == self._start:
                self._mean, self._variance = statistics.fmean(self._first), statistics.pvariance(self._first)
            return False
        deviation = math.sqrt(self._variance)
        z = (value - self._mean) / (deviation + 1e-6)
        taken = self._mean + self._limit * deviation / (z / self._limit) if z > self._limit else value
        self._mean = self._memory * self._mean + (1 - self._memory) * taken
        self._variance = self._memory * self._variance + (1 - self._memory) * (taken - self._mean) ** 2
        return z > self._limit


class ThreeSigma:
    """What one writes first: over 3 standard deviations above the mean of the last 128 losses."""

    name, stops = "plain 3 sigma", False

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=128)

    def observe(self, loss: float, grad_norm: float | None) -> bool:
        """Active from 64 values on."""
        fired = _beyond(self._losses, loss, sigmas=3.0)
        self._losses.append(loss)
        return fired


def published(total_rows: int) -> list[Rule]:
    """One of each, new, for a run of so many recorded steps."""
    return [KillLossSpike(total_rows), SkipStep(), SpikyLoss(), UnexpectedlyLarge(), ZClip(), ThreeSigma()]


def _beyond(values: deque[float], value: float, sigmas: float = 6.0) -> bool:
    if len(values) < 64:
        return False
    mean = statistics.fmean(values)
    variance = sum((one - mean) ** 2 for one in values) / (len(values) - 1)  # NaN in the window stays NaN
    return not value - mean <= sigmas * math.sqrt(variance)
