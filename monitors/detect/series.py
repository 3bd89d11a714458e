"""One value's recent history on a log scale: where it is usually, and how far it scatters. Robust, O(1) a value."""

import math
from statistics import median

from pydantic import Field
from pydantic.dataclasses import dataclass

from monitors.window import MAD_TO_SIGMA

_VALUES = 64
_MIN_VALUES = 12
_RENEW_VALUES = 8
_LEAST = 1e-30


@dataclass(slots=True)
class Series:
    """Values on a ratio scale: norms, ratios, RMS. `middle` and `spread` are of their logarithms."""

    values: list[float] = Field(default_factory=list)
    middle: float = 0.0
    spread: float = Field(default=0.0, description="both of `values`, renewed every few of them")
    fresh: int = Field(default=0, description="values for which they still serve")

    def offset(self, value: float) -> float | None:
        """Its logarithm above the middle; None before enough was seen."""
        if len(self.values) < _MIN_VALUES:
            return None
        if self.fresh == 0:
            self.fresh = min(_RENEW_VALUES, len(self.values) // _MIN_VALUES)
            self.middle = median(self.values)
            self.spread = MAD_TO_SIGMA * median([abs(known - self.middle) for known in self.values])
        return math.log(max(value, _LEAST)) - self.middle

    def add(self, value: float) -> None:
        """Take one more in."""
        self.values.append(math.log(max(value, _LEAST)))
        self.fresh = max(0, self.fresh - 1)
        if len(self.values) > _VALUES:
            del self.values[0]
