"""Durations as people write them: `30s`, `5m`, `6h`, `2d`; kept in seconds."""

import re
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def duration_s(value: object) -> float:
    """Seconds of a duration.

    Raises:
        ValueError: it is not written as one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("a duration is a number with a unit: 30s, 5m, 6h, 2d")
    return float(match[1]) * _UNITS_S[match[2]]


def duration_text(seconds: float) -> str:
    """What `duration_s` reads back as the same, to the millisecond."""
    return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"


DurationS = Annotated[float, BeforeValidator(duration_s, json_schema_input_type=str)]
#: The same for what is written out and read again, as the resolved run.yaml is.
StoredDurationS = Annotated[DurationS, PlainSerializer(duration_text, return_type=str)]
