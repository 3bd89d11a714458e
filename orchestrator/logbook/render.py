"""The three forms of a logbook. The page needs nothing from outside, and its policy forbids it to ask for anything."""

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from orchestrator.logbook.model import Logbook
from orchestrator.report.numbers import short

Format = Literal["html", "md", "json"]
FORMATS: tuple[Format, ...] = ("html", "md", "json")

_TONES = {"running": "good", "finished": "good", "halted": "bad", "failed": "bad", "recovering": "warn"}
_SPANS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def rendered(book: Logbook, form: Format) -> str:
    """One form of the same facts."""
    match form:
        case "html":
            return _page(book)
        case "md":
            return _environment(escaped=False).from_string(_asset("page.md.j2")).render(book=book)
        case "json":
            return book.model_dump_json() + "\n"


def write(book: Logbook, form: Format, path: Path) -> None:
    """Put a form where it belongs, whole or not at all, whoever else writes it at the same time."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(rendered(book, form))
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _page(book: Logbook) -> str:
    style = f"{_asset('uPlot.min.css')}\n{_asset('page.css')}"
    uplot, script = _asset("uPlot.iife.min.js"), _asset("page.js")
    policy = (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"script-src {_hash(uplot)} {_hash(script)}; style-src {_hash(style)}"
    )
    drawn = book.model_dump_json(include={"panels", "trend", "totals", "verdict", "incidents"})
    facts = drawn.replace("<", "\\u003c")  # nothing in it can end the element that holds it
    trusted = {"style": style, "uplot": uplot, "script": script, "facts": facts, "policy": policy}
    own = {name: Markup(text) for name, text in trusted.items()}  # noqa: S704  ours, or JSON without a tag in it
    return _environment(escaped=True).from_string(_asset("page.html.j2")).render(book=book, **own)


@cache
def _asset(name: str) -> str:
    return (files("orchestrator.logbook") / "assets" / name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


@cache
def _environment(*, escaped: bool) -> Environment:
    made = Environment(autoescape=escaped, undefined=StrictUndefined)  # noqa: S701  Markdown has cells, not elements
    shown: dict[str, Callable[..., Any]] = {
        "count": lambda number: f"{number:,}",
        "short": short,
        "share": lambda part: f"{part:.1%}" if part >= 0.001 or part == 0.0 else f"{part:.2g}",
        "span": span_text,
        "when": lambda at_s: datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%S"),
        "tone": lambda state: _TONES.get(state, "info"),
        "pretty": lambda value: json.dumps(value, indent=1),
    }
    made.globals.update(shown)
    made.filters["cell"] = _cell
    return made


def span_text(seconds: float) -> str:
    """`3.2 h`: a length of time in its own unit."""
    size, unit = next(((size, unit) for size, unit in _SPANS if seconds >= size), _SPANS[-1])
    return f"{seconds / size:.1f} {unit}"


def _cell(text: str) -> str:
    """Text that can't end a cell of a Markdown table, nor become HTML where Markdown is shown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
