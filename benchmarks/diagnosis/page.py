"""What was found, as one HTML file for a person to look at: tables, and every run with its incidents marked."""

import html
from collections.abc import Sequence
from pathlib import Path

from benchmarks.diagnosis.score import NOTHING, Score
from benchmarks.diagnosis.synthetic import Run
from benchmarks.diagnosis.watch import Prediction
from monitors.records import StepRecord
from orchestrator.report.curves import COLOURS, Mark, drawing, page, table

_ALARMING = "#d02020"
_TRUE = "#2060d0"


def write_page(
    path: Path, tables: Sequence[tuple[str, str, Score]], drawn: Sequence[tuple[Run, Sequence[Prediction]]]
) -> None:
    """Write the page.

    Args:
        path: file to write.
        tables: (corpus, detector, score).
        drawn: runs with what Longwatch found in them.
    """
    parts: list[str] = []
    for corpus, detector, score in tables:
        parts += [f"<h2>{html.escape(f'{corpus}: {detector}')}</h2>", _classes(score), _confusion(score)]
    parts.append("<h2>Runs</h2><p>Blue below: what was put in or labelled. Above: what Longwatch found.</p>")
    parts += [_drawing(run, found) for run, found in drawn]
    path.write_text(page("Diagnosis", parts))


def _classes(score: Score) -> str:
    names = ("n", "precision", "recall", "recall_interval", "f1", "delay_median", "delay_p95")
    rows = ((cls, *(score.per_class(cls)[name] for name in names)) for cls in score.classes())
    shown = table(("class", *(name.replace("_", " ") for name in names)), rows)
    figures = score.figures()
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items() if name != "classes")
    return f"{shown}<p>{html.escape(said)}</p>"


def _confusion(score: Score) -> str:
    names = [*score.classes(), NOTHING]
    rows = ((truth, *(score.confusion[truth, said] or None for said in names)) for truth in names)
    return table(("truth \\ said", *names), rows)


def _drawing(run: Run, found: Sequence[Prediction]) -> str:
    points = ((one.step, one.loss) for one in run.records if isinstance(one, StepRecord))
    marks = [
        Mark(t.onset_step, min(t.end_step, run.steps), f"{t.cls} {t.onset_step}", _TRUE, below=True) for t in run.truths
    ]
    for one in found:
        title = f"{one.cls} at {one.onset_step}: {one.why}"
        marks.append(Mark(one.onset_step, one.end_step, title, COLOURS.get(one.cls.value, _ALARMING)))
    told = ", ".join(f"{one.cls} at {one.onset_step}" for one in found[:12]) or "nothing"
    return drawing(run.name, points, marks, told)
