"""Where the time of simulated runs went, as one HTML file: a bar for each profile, and the figures."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.report.curves import page, table
from tests.simulation.goodput import BUCKETS

_WIDTH, _HEIGHT, _GAP = 1000, 34, 10
_COLOURS = ("#2e8b57", "#d02020", "#e0a100", "#7060c0", "#c06020", "#2060d0", "#555555", "#999999")


def write_page(path: Path, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Write it; `figures` are those of the result file, by profile."""
    parts = [
        "<p>Shares of all the time, as means over the runs of a profile. Above: all of it. Below: what is lost of it,"
    ]
    parts += [" drawn to the largest loss.</p>", _legend()]
    most = max((1.0 - figure["shares"]["training"] for figure in figures.values()), default=1.0)
    for name, figure in figures.items():
        shares = figure["shares"]
        lost = {bucket: share / most for bucket, share in shares.items() if bucket != "training"}
        parts += [f"<h3>{html.escape(name)}</h3>", _bars((shares, lost))]
    columns = ("runs", "goodput_mean", "goodput_p0.1", "goodput_min", "daly_process_faults", "attempts_mean")
    rows = ((name, *(figure[column] for column in columns), *(figure["shares"][bucket] for bucket in BUCKETS))
            for name, figure in figures.items())  # fmt: skip
    parts.append(table(("profile", *(text.replace("_", " ") for text in (*columns, *BUCKETS))), rows))
    path.write_text(page("Simulated runs", parts))


def _legend() -> str:
    pairs = zip(BUCKETS, _COLOURS, strict=True)
    return "<p>" + " ".join(f"<b style='color:{colour}'>&#9632; {name}</b>" for name, colour in pairs) + "</p>"


def _bars(rows: tuple[Mapping[str, float], ...]) -> str:
    parts = [f"<svg width='{_WIDTH}' height='{len(rows) * (_HEIGHT + _GAP)}'>"]
    for number, shares in enumerate(rows):
        x = 0.0
        for bucket, colour in zip(BUCKETS, _COLOURS, strict=True):
            width = max(0.0, shares.get(bucket, 0.0)) * _WIDTH
            title = f"<title>{bucket} {shares.get(bucket, 0.0):.4f}</title>"
            box = f"x='{x:.2f}' y='{number * (_HEIGHT + _GAP)}' width='{width:.2f}' height='{_HEIGHT}'"
            parts.append(f"<rect {box} fill='{colour}'>{title}</rect>")
            x += width
    return "".join([*parts, "</svg>"])
