"""Loss curves with what was found in them, as one HTML file that needs nothing else.

Curves are drawn as the span of losses in each pixel column, so that no spike is lost by thinning out.
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.replay import Replayed

_WIDTH, _HEIGHT = 1100, 180
_ALARMING = "#d02020"
COLOURS = {"transient_spike": "#e0a100", "level_shift": "#888888"}
_STYLE = (
    "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse;margin:1em 0}"
    "td,th{border:1px solid #ccc;padding:2px 8px;text-align:right}th:first-child,td:first-child{text-align:left}"
    "svg{background:#fafafa;display:block}h3{margin:1.2em 0 .2em}p{margin:.2em 0}"
)


@dataclass(frozen=True, slots=True)
class Mark:
    """A bar above the curve, or below it; `end_step` None goes on to the end."""

    begin_step: int
    end_step: int | None
    title: str
    colour: str = _ALARMING
    below: bool = False


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document around parts that are HTML already."""
    head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    return "\n".join([f"{head}<h1>{html.escape(title)}</h1>", *parts]) + "\n"


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table of texts and numbers; None is an empty cell."""
    lines = [f"<tr>{''.join(f'<th>{_shown(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{_shown(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def drawing(name: str, points: Iterable[tuple[int, float]], marks: Sequence[Mark], told: str) -> str:
    """One curve with its marks; `told` in words above it. Losses above those of the settled part are cut off."""
    finite = [(step, loss) for step, loss in points if math.isfinite(loss)]
    if not finite:
        return ""
    first, last = min(step for step, _ in finite), max(step for step, _ in finite)
    last = max(last, first + 1)
    settled = [loss for _, loss in finite[len(finite) // 20 :]]
    low, high = min(settled), max(settled)

    def x(step: float) -> float:
        return (step - first) / (last - first) * _WIDTH

    def y(loss: float) -> float:
        return _HEIGHT - 14 - (min(loss, high) - low) / ((high - low) or 1.0) * (_HEIGHT - 30)

    columns: dict[int, tuple[float, float]] = {}
    for step, loss in finite:
        column = round(x(step))
        least, most = columns.get(column, (loss, loss))
        columns[column] = (min(least, loss), max(most, loss))
    path = "".join(
        f"M{column} {y(least) + 0.5:.1f}L{column} {y(most) - 0.5:.1f}" for column, (least, most) in columns.items()
    )
    bars = "".join(
        _bar(mark, x(mark.begin_step), x(last if mark.end_step is None else mark.end_step)) for mark in marks
    )
    return (
        f"<h3>{html.escape(name)}</h3><p>{html.escape(told)}</p><svg width='{_WIDTH}' height='{_HEIGHT}'>"
        f"<path d='{path}' stroke='#333' fill='none'/>{bars}</svg>"
    )


def _bar(mark: Mark, begin: float, end: float) -> str:
    width, top = max(3.0, min(end, _WIDTH) - begin), _HEIGHT - 8 if mark.below else 2
    return (
        f"<rect x='{begin:.1f}' y='{top}' width='{width:.1f}' height='6' fill='{mark.colour}'>"
        f"<title>{html.escape(mark.title)}</title></rect>"
    )


def _shown(value: object) -> str:
    return "" if value is None else html.escape(str(value))


def write_page(path: Path, replayed: Sequence[Replayed]) -> None:
    """What a replay found: every curve with its incidents, and the decisions."""
    parts = []
    for one in replayed:
        marks = [
            Mark(i.onset_step, i.end_step, f"{i.cls} at {i.onset_step}: {i.why}", COLOURS.get(i.cls, _ALARMING))
            for i in one.incidents
        ]
        told = (
            f"{len(one.incidents)} incidents in {one.recording.steps} steps, {one.rollbacks} rollbacks, "
            f"{one.halts} halts, {one.steps_lost} steps lost"
        )
        parts.append(drawing(one.recording.name, one.recording.points, marks, told))
        head = ("class", "onset", "detected", "end", "would", "why")
        rows = (
            (i.cls, i.onset_step, i.detected_step, i.end_step, ", ".join(i.decision) or "nothing", i.why)
            for i in one.incidents
        )
        parts.append(table(head, rows) if one.incidents else "")
    path.write_text(page("Replay", parts))
