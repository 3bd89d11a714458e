"""`longwatch replay` of every kind of log, and two policies on the same one."""

import json
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.app import run
from orchestrator.config import resolve, write_resolved
from orchestrator.replay import read_recording
from tests.monitors.curves import step_record
from tests.orchestrator.clirun import write_journal, write_run
from trainer.contract.paths import RunPaths

_STEPS, _ONSET = 600, 400


def _losses(seed: int = 1) -> list[float]:
    """A fall with a spike that stays."""
    noise = random.Random(seed)
    return [
        2.0 + 3.0 / (1 + step / 40) + noise.gauss(0, 0.01) + (3.0 if step >= _ONSET else 0.0)
        for step in range(1, _STEPS + 1)
    ]


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["replay", *arguments, "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def _wandb_csv(folder: Path) -> Path:
    path = folder / "wandb.csv"
    head = '"Step","run-7 - train/loss","run-7 - train/loss__MIN","run-7 - train/loss__MAX","run-7 - train/grad_norm"'
    rows = (f'"{step}","{loss}","{loss}","{loss}",""' for step, loss in enumerate(_losses(), start=1))
    path.write_text("\n".join([head, *rows]))
    return path


def _json_lines(folder: Path) -> Path:
    path = folder / "history.jsonl"
    rows: list[dict[str, Any]] = [
        {"_step": step, "train": {"loss": loss, "grad_norm": None}, "_runtime": 1.5}
        for step, loss in enumerate(_losses(), start=1)
    ]
    rows[-1]["train"]["loss"] = "NaN"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def _tensorboard(folder: Path) -> Path:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    path = folder / "tb"
    writer = EventFileWriter(str(path))
    for step, loss in enumerate(_losses(), start=1):
        values = [Summary.Value(tag="Train/Loss", simple_value=loss), Summary.Value(tag="lr", simple_value=1e-3)]
        writer.add_event(Event(step=step, wall_time=float(step), summary=Summary(value=values)))
    writer.close()
    return path


@pytest.mark.parametrize("make", [_wandb_csv, _json_lines, _tensorboard])
def test_logs_of_other_programs(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns are guessed; the same spike is seen, and what counts as confirmed says so."""
    found = _json(capsys, str(make(tmp_path)))
    spike = next(one for one in found["incidents"] if one["class"] == "unrecovered_spike")
    assert spike["onset_step"] == _ONSET
    assert "roll_back" in spike["decision"]
    assert "so it counts as confirmed" in spike["why"]
    assert found["rollbacks"] == 1
    assert found["steps_lost"] == spike["detected_step"] - (_ONSET - 100)
    assert found["steps"] == _STEPS


def test_a_run_of_our_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its directory is enough: every attempt, and what was run again after a resume is no step back."""
    made = resolve(write_run(tmp_path, steps=_STEPS))
    write_resolved(made)
    write_journal(made.paths)
    losses = _losses()
    _write_attempt(made.paths, 1, 0, losses[:300])
    _write_attempt(made.paths, 2, 250, losses[250:])
    found = _json(capsys, str(made.paths.root))
    assert [one["class"] for one in found["incidents"]] == ["unrecovered_spike"]
    assert found["attempts"] == 2
    assert found["steps"] == _STEPS
    assert run(["replay", str(made.paths.root)]) == 0
    assert "resumed 1 times; 1 rollbacks" in capsys.readouterr().out


def _write_attempt(paths: RunPaths, attempt: int, begin: int, losses: list[float]) -> None:
    started = {
        "kind": "started", "seq": 1, "attempt": attempt, "at_s": 0.0, "step": begin, "position": 0, "tokens": 0,
        "loaded": None, "precision": "fp32", "device": "cpu", "parameters": 1, "vocab_size": 64, "batch_samples": 8,
        "sample_tokens": 33, "total_steps": _STEPS, "total_samples": 10_000, "shards": ["a"], "peak_lr": 1e-3,
        "warmup_steps": 10,
    }  # fmt: skip
    steps = (
        step_record(begin + number, loss, attempt=attempt, seq=number + 1).model_dump_json()
        for number, loss in enumerate(losses, start=1)
    )
    paths.records(attempt).write_text("\n".join([json.dumps(started), *steps]) + "\n")


def test_a_log_whose_steps_go_back_was_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows after it are another attempt; what was seen twice is no jump."""
    losses = _losses()[: _ONSET - 1]
    rows = [*enumerate(losses[:300], start=1), *enumerate(losses[200:], start=201)]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(json.dumps({"iteration": step, "lm loss": loss}) for step, loss in rows))
    found = _json(capsys, str(path))
    assert (found["attempts"], found["incidents"]) == (2, [])


def test_two_policies_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What each would have done and what it would have cost, and where they differ."""
    (tmp_path / "b.yaml").write_text("version: 1\nrules: [{on: unrecovered_spike, do: [record]}]\n")
    trace, second = str(_wandb_csv(tmp_path)), str(_json_lines(tmp_path))
    arguments = ["replay", trace, second, "--against", str(tmp_path / "b.yaml")]
    assert run(arguments) == 0
    said = capsys.readouterr().out
    assert (
        f"wandb: unrecovered_spike at step {_ONSET}: capture, roll_back, skip_data, lower_lr, reseed, notify / record"
        in said
    )
    both = _json(capsys, *arguments[1:])
    assert [one["rollbacks"] for one in both["runs"]] == [1, 1]
    assert [(one["rollbacks"], one["steps_lost"]) for one in both["against"]] == [(0, 0), (0, 0)]


@pytest.mark.parametrize(
    ("head", "option", "said"),
    [
        ("a - loss,b - loss,step", (), "it could be any of a - loss, b - loss; name it with --column loss=NAME"),
        ("value,step,x", (), "this column is missing"),
        ("loss,step,x", ("--column", "lr=rate"), "there is no column 'rate'"),
        ("loss,step,x", ("--column", "rate=x"), "FIELD is one of step, loss"),
    ],
)
def test_what_cannot_be_guessed_is_asked_for(
    head: str, option: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the columns that there are."""
    path = tmp_path / "t.csv"
    path.write_text(f"{head}\n1,1,1\n")
    assert run(["replay", str(path), *option]) == 2
    assert said in capsys.readouterr().err


def test_a_column_that_is_named_comes_first(tmp_path: Path) -> None:
    """Also where guessing would have found another."""
    path = tmp_path / "t.csv"
    path.write_text("step,loss,smooth\n1,5.0,4.0\n2,5.0,4.5\n")
    assert read_recording(path, {"loss": "smooth"}).points == [(1, 4.0), (2, 4.5)]


class _Page(HTMLParser):
    """Tags and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember it."""
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(tmp_path: Path) -> None:
    """A curve with its mark and the decisions; a name that is markup stays text."""
    trace = _wandb_csv(tmp_path).rename(tmp_path / "<script>.csv")
    assert run(["replay", str(trace), "--html", str(tmp_path / "page.html")]) == 0
    page = _Page((tmp_path / "page.html").read_text())
    assert {"svg", "path", "rect", "table"} <= {*page.tags}
    assert "script" not in page.tags
    assert page.links == []
