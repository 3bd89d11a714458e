"""What the command line writes: facts and JSON to stdout, everything else to stderr.

Colours only on a terminal and never with NO_COLOR; JSON never shares stdout with anything.
"""

import json
import math
import sys
from typing import IO, Any

from rich.console import Console
from rich.table import Table

_WIDE = 200


class _Console(Console):
    """Says that a reader is gone by the usual error; rich would end the process, a supervisor among them."""

    def on_broken_pipe(self) -> None:
        """Let the error through."""
        raise BrokenPipeError


def out(file: IO[str] | None = None) -> Console:
    """The console for results; made anew, because stdout may have been redirected since."""
    return _Console(file=file or sys.stdout, highlight=False, soft_wrap=True)


def err() -> Console:
    """The console for errors and remarks."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def say(text: str, style: str | None = None) -> None:
    """One result line."""
    out().print(text, style=style, markup=False)


def show(table: Table) -> None:
    """A table as wide as it is: a pipe has no width, and a name that is cut short is no name."""
    console = out()
    if not console.is_terminal:
        console.width = max(console.width, _WIDE)
    console.print(table)


def remark(text: str, style: str | None = None) -> None:
    """One line that is not a result."""
    err().print(text, style=style, markup=False)


def say_json(value: Any) -> None:
    """One JSON document on stdout. Numbers that are not finite become text, as everywhere in Longwatch."""
    sys.stdout.write(json.dumps(_finite(value), allow_nan=False) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value
