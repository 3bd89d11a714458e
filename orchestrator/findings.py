"""One line of an examination, by `longwatch doctor` or `longwatch drill`: what was looked at, what was seen."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table; `remedy` only where it did not pass."""

    name: str
    verdict: Verdict
    seen: str
    remedy: str = ""


def graded(name: str, seen: str, *, good: bool, remedy: str, otherwise: Verdict = "warn") -> Finding:
    """A finding that passed, or one with its remedy."""
    return Finding(name, "pass", seen) if good else Finding(name, otherwise, seen, remedy)
