"""Curves of millions of points as some hundreds, with every extreme. Streams: it holds one bucket at a time."""

import math
from collections import deque

Point = tuple[int, float, float]
"""(step, seconds, value)"""
_DIGITS = 6


class Thinner:
    """Keeps the lowest and the highest point of each bucket, and the ends of the curve."""

    def __init__(self) -> None:
        self._kept: list[Point] = []
        self._bucket = -1
        self._low: Point | None = None
        self._high: Point | None = None
        self._last: Point | None = None

    def add(self, bucket: int, point: Point) -> None:
        """The next point; buckets only rise. One that is not finite is no point of a curve."""
        if not math.isfinite(point[2]):
            return
        if self._last is None:
            self._kept.append(point)
        if bucket != self._bucket or self._low is None or self._high is None:
            self._flush()
            self._bucket, self._low, self._high = bucket, point, point
        elif point[2] < self._low[2]:
            self._low = point
        elif point[2] > self._high[2]:
            self._high = point
        self._last = point

    def points(self) -> list[Point]:
        """What is kept, in order; nothing can be added after it."""
        self._flush()
        if self._last is not None and self._kept[-1][0] != self._last[0]:
            self._kept.append(self._last)
        return self._kept

    def _flush(self) -> None:
        if self._low is None or self._high is None:
            return
        for point in sorted({self._low, self._high}):
            if self._kept[-1][0] != point[0]:
                self._kept.append(point)


def rounded(value: float) -> float:
    """To the digits that a chart can show: half the bytes of a page are numbers."""
    return float(f"{value:.{_DIGITS}g}")


class SpikeScore:
    """Counts values far above the mean of the window before them, as the published spike score does.

    Sums over the window are made anew once per window, so that one enormous value leaves no rounding error behind.
    """

    def __init__(self, window: int = 1000, sigmas: float = 7.0, least: int = 50) -> None:
        self._values: deque[float] = deque(maxlen=window)
        self._sigmas = sigmas
        self._least = least
        self._sum = 0.0
        self._squares = 0.0
        self._since = 0

    def is_spike(self, value: float) -> bool:
        """Whether it stands out; what is not finite does, and is kept out of the window."""
        if not math.isfinite(value):
            return True
        found = len(self._values) >= self._least and self._is_far(value)
        if len(self._values) == self._values.maxlen:
            oldest = self._values[0]
            self._sum -= oldest
            self._squares -= oldest * oldest
        self._values.append(value)
        self._sum += value
        self._squares += value * value
        self._since += 1
        if self._since >= len(self._values):
            self._since = 0
            self._sum = math.fsum(self._values)
            self._squares = math.fsum(one * one for one in self._values)
        return found

    def _is_far(self, value: float) -> bool:
        mean = self._sum / len(self._values)
        variance = max(0.0, self._squares / len(self._values) - mean * mean)
        return value - mean > self._sigmas * math.sqrt(variance) > 0.0
