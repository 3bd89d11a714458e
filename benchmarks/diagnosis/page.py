"""What was found, as one HTML file for a person to look at: tables, and every run with its incidents marked.

Curves are drawn as the span of losses in each pixel column, so that no spike is lost by thinning out.
"""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.diagnosis.score import NOTHING, Score
from benchmarks.diagnosis.synthetic import Run
from benchmarks.diagnosis.watch import Prediction
from monitors.records import StepRecord

_WIDTH, _HEIGHT = 1100, 180
_COLOURS = {"transient_spike": "#e0a100", "level_shift": "#888888"}
_ALARMING = "#d02020"
_TRUE = "#2060d0"
_STYLE = (
    "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse;margin:1em 0}"
    "td,th{border:1px solid #ccc;padding:2px 8px;text-align:right}th:first-child,td:first-child{text-align:left}"
    "svg{background:#fafafa;display:block}h3{margin:1.2em 0 .2em}p{margin:.2em 0}"
)


def write_page(
    path: Path, tables: Sequence[tuple[str, str, Score]], drawn: Sequence[tuple[Run, Sequence[Prediction]]]
) -> None:
    """Write the page.

    Args:
        path: file to write.
        tables: (corpus, detector, score).
        drawn: runs with what Longwatch found in them.
    """
    parts = [f"<!doctype html><meta charset='utf-8'><title>Diagnosis</title><style>{_STYLE}</style><h1>Diagnosis</h1>"]
    for corpus, detector, score in tables:
        parts += [f"<h2>{html.escape(f'{corpus}: {detector}')}</h2>", _classes(score), _confusion(score)]
    parts.append("<h2>Runs</h2><p>Blue below: what was put in or labelled. Above: what Longwatch found.</p>")
    parts += [_drawing(run, found) for run, found in drawn]
    path.write_text("\n".join(parts) + "\n")


def _classes(score: Score) -> str:
    names = ("n", "precision", "recall", "recall_interval", "f1", "delay_median", "delay_p95")
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
    rows = "".join(
        f"<tr><td>{cls}</td>" + "".join(f"<td>{_shown(numbers[name])}</td>" for name in names) + "</tr>"
        for cls, numbers in ((cls, score.per_class(cls)) for cls in score.classes())
    )
    figures = score.figures()
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items() if name != "classes")
    return f"<table><tr><th>class</th>{head}</tr>{rows}</table><p>{html.escape(said)}</p>"


def _confusion(score: Score) -> str:
    names = [*score.classes(), NOTHING]
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = "".join(
        f"<tr><td>{truth}</td>" + "".join(f"<td>{score.confusion[truth, said] or ''}</td>" for said in names) + "</tr>"
        for truth in names
    )
    return f"<table><tr><th>truth \\ said</th>{head}</tr>{rows}</table>"


def _shown(value: Any) -> str:
    return "" if value is None else html.escape(str(value))


def _drawing(run: Run, found: Sequence[Prediction]) -> str:
    points = [(r.step, r.loss) for r in run.records if isinstance(r, StepRecord) and math.isfinite(r.loss)]
    if not points:
        return ""
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    settled = [loss for _, loss in points[len(points) // 20 :]]
    low, high = min(settled), max(settled)

    def x(step: float) -> float:
        return (step - first) / (last - first) * _WIDTH

    def y(loss: float) -> float:
        return _HEIGHT - 14 - (min(loss, high) - low) / ((high - low) or 1.0) * (_HEIGHT - 30)

    columns: dict[int, tuple[float, float]] = {}
    for step, loss in points:
        column = round(x(step))
        least, most = columns.get(column, (loss, loss))
        columns[column] = (min(least, loss), max(most, loss))
    path = "".join(
        f"M{column} {y(least) + 0.5:.1f}L{column} {y(most) - 0.5:.1f}" for column, (least, most) in columns.items()
    )
    marks = [
        _mark(x(t.onset_step), x(min(t.end_step, last)), _HEIGHT - 8, _TRUE, f"{t.cls} {t.onset_step}")
        for t in run.truths
    ]
    for one in found:
        colour = _COLOURS.get(one.cls.value, _ALARMING)
        end = last if one.end_step is None else one.end_step
        marks.append(_mark(x(one.onset_step), x(end), 2, colour, f"{one.cls} at {one.onset_step}: {one.why}"))
    told = ", ".join(f"{one.cls} at {one.onset_step}" for one in found[:12]) or "nothing"
    return (
        f"<h3>{html.escape(run.name)}</h3><p>{html.escape(told)}</p><svg width='{_WIDTH}' height='{_HEIGHT}'>"
        f"<path d='{path}' stroke='#333' fill='none'/>{''.join(marks)}</svg>"
    )


def _mark(begin: float, end: float, top: float, colour: str, title: str) -> str:
    width = max(3.0, end - begin)
    return (
        f"<rect x='{begin:.1f}' y='{top}' width='{width:.1f}' height='6' fill='{colour}'>"
        f"<title>{html.escape(title)}</title></rect>"
    )
