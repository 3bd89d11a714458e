"""`longwatch report`, on runs that hardly are any and on one of a million updates."""

import json
import math
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.cli.app import run as longwatch
from orchestrator.journal import Journal
from orchestrator.logbook.model import Logbook
from tests.orchestrator.clirun import write_journal
from trainer.contract.paths import RunPaths

_UPDATES = 1_000_000
_SPIKE = 654_321
_PAGE_BYTES = 4 << 20
_MEMORY_BYTES = 400 << 20  # the journal of the test is larger, and would be several times that as objects


def test_a_run_without_an_update_has_a_logbook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is not recorded is not said, and nothing fails for want of it."""
    paths = RunPaths(tmp_path / "run")
    write_journal(paths)
    for form in ("html", "md", "json"):
        assert longwatch(["report", str(paths.root), "--format", form]) == 0
        assert capsys.readouterr().out == f"{paths.root}/report.{form}\n"
    book = Logbook.model_validate_json((paths.root / "report.json").read_text())
    assert book.panels == []
    assert book.verdict.goodput is None
    assert [one.cls for one in book.incidents] == ["crash"]  # the suspicion is none
    assert book.incidents[0].cause == "killed"
    assert "No update was recorded" in (paths.root / "report.html").read_text()


def test_where_it_goes_can_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a place that can't be written is an error with a remedy."""
    paths = RunPaths(tmp_path / "run")
    write_journal(paths)
    there = tmp_path / "told.html"
    assert longwatch(["report", str(paths.root), "--out", str(there)]) == 0
    assert there.read_text().startswith("<!doctype html>")
    assert longwatch(["report", str(paths.root), "--out", str(tmp_path / "no" / "such.html")]) == 1
    assert "--out" in capsys.readouterr().err


def test_a_halted_run_says_what_it_needs(tmp_path: Path) -> None:
    """In the first line of the page, before any curve."""
    paths = RunPaths(tmp_path / "run")
    write_journal(paths, state="halted")
    assert longwatch(["report", str(paths.root), "--format", "md"]) == 0
    text = (paths.root / "report.md").read_text()
    assert "1 thing for a person" in text.splitlines()[2]
    assert "- the run is halted" in text


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_million_updates(tmp_path: Path) -> None:
    """The page stays small and the process too; the one spike among a million is in it."""
    paths = RunPaths(tmp_path / "run")
    write_journal(paths, step=_UPDATES)
    _fill(paths)
    assert paths.database.stat().st_size > _MEMORY_BYTES
    writer = subprocess.Popen([sys.executable, "-m", "orchestrator.logbook", str(paths.root)])
    _, status, usage = os.wait4(writer.pid, 0)
    writer.returncode = os.waitstatus_to_exitcode(status)
    assert writer.returncode == 0
    assert usage.ru_maxrss * 1024 < _MEMORY_BYTES
    assert (paths.root / "report.html").stat().st_size < _PAGE_BYTES
    book = Logbook.model_validate_json((paths.root / "report.json").read_text())
    assert book.totals.updates == _UPDATES
    (curve,) = book.panels[0].series[0].curves
    assert (_SPIKE, 42.0) in zip(curve.steps, curve.values, strict=True)
    assert len(curve.steps) < 2500
    assert book.totals.spikes_loss == 1


def _fill(paths: RunPaths) -> None:
    """Updates as a trainer records them, without the trainer."""
    with closing(Journal.open(paths.database)):
        pass
    with closing(sqlite3.connect(paths.database)) as database:
        database.execute(
            "INSERT INTO attempts VALUES (1, 1, 'b', 1, 0.0, NULL, 0, NULL, 0, NULL, NULL, NULL, NULL, NULL)"
        )
        rows = (
            (1, step, None, None, None, None, None, None, float(step), _record(step)) for step in range(1, _UPDATES + 1)
        )
        database.executemany("INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        database.commit()


def _record(step: int) -> str:
    loss = 42.0 if step == _SPIKE else 2.0 + 0.1 * math.sin(step)
    groups = dict.fromkeys(("embed", "early", "mid", "late", "head"), 1e-3 + 1e-4 * math.cos(step))
    times = {"data": 0.01, "compute": 0.9, "other": 0.02}
    data = {"begin": step * 8 - 8, "end": step * 8}
    return json.dumps(
        {"loss": loss, "grad_norm": 0.5, "lr": 3e-4, "lr_planned": 3e-4, "tokens": 256, "step_time_s": times,
         "update_ratio": groups, "data": data, "shards": {"0": [8, 16.0]}, "worst": [step * 8 - 3, loss + 1.0],
         "clipped": False, "skipped": False}
    )  # fmt: skip
