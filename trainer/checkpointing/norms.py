"""L2 norms of tensors from their bytes, summed in float64: finite exactly if every element is. Torch-free.

The same sum is taken when a checkpoint is written and when it is loaded, in whatever pieces the bytes come.
"""

import math

import numpy as np
import numpy.typing as npt

#: Elements are this many bytes; bfloat16, which numpy does not have, is the upper half of a float32.
_FLOATS = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


class SquareSum:
    """Sums squares of the elements of one tensor; pieces must end between elements."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._sum = 0.0

    def add(self, piece: memoryview) -> None:
        """Add the elements of some bytes."""
        if len(piece) and self._dtype in _FLOATS:
            with np.errstate(over="ignore", invalid="ignore"):
                values = _as_float64(piece, self._dtype)
                self._sum += float(np.dot(values, values))

    def norm(self) -> float | None:
        """The norm so far; None for a dtype that has none here: integers, booleans, eight-bit floats."""
        return math.sqrt(self._sum) if self._dtype in _FLOATS else None


def norm_of_bytes(data: memoryview, dtype: str, piece_bytes: int = 1 << 20) -> float | None:
    """The norm of a whole tensor."""
    total = SquareSum(dtype)
    for begin in range(0, len(data), piece_bytes):
        total.add(data[begin : begin + piece_bytes])
    return total.norm()


def _as_float64(piece: memoryview, dtype: str) -> npt.NDArray[np.float64]:
    raw = np.frombuffer(piece, dtype=_FLOATS[dtype])
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return raw.astype(np.float64)
