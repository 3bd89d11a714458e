"""Numbers for people. None stays unknown, never 0; what is not finite is said."""

import math

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(number: float) -> str:
    """`12.3k`, `4.5M`: three digits and a decimal unit."""
    for size, unit in _UNITS:
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def loss_text(loss: float | str | None) -> str:
    """A loss with four decimals; empty if there is none, and `nan` or `inf` as they are."""
    if loss is None:
        return ""
    value = float(loss)
    return f"{value:.4f}" if math.isfinite(value) else str(value)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `16 d 4 h`: two units at most."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86_400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
