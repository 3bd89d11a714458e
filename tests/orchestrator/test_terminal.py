"""What a terminal shows of a run: `watch`, `logs`, `status`, in 80x24 and smaller, with and without colour."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.cli.app import run
from orchestrator.report.log_lines import LogLine, LogReader
from orchestrator.report.recent import RecentStep
from orchestrator.report.screen import Seen, screen
from orchestrator.report.status import next_step, status_lines
from tests.orchestrator.clirun import write_journal
from tests.orchestrator.walks import loss_at
from trainer.contract.paths import RunPaths

_FACTS: dict[str, Any] = {
    "run_dir": "/runs/a", "state": "running", "step": 12_345, "total_steps": 100_000, "attempt": 3, "loss": 2.3456,
    "lr": 3e-4, "tokens": 10**9, "tokens_per_s": 123_456.0, "validation": [12_000, 2.4], "last_good_step": 12_000,
    "last_commit_step": 12_200, "rollbacks_left": 5, "restarts_left": 9, "open_incidents": 1, "incidents": 2,
    "lr_factor": 1.0, "quarantined_shards": [], "seconds_left": 11_100.0, "goodput": 0.987, "trend": None,
    "seconds_spent": {"training": 9870.0, "lost": 100.0, "starting": 30.0}, "last_incident": None,
}  # fmt: skip
_INCIDENT: dict[str, Any] = {
    "id": 2, "class": "unrecovered_spike", "onset_step": 11_000, "state": "open",
    "why": "the loss is 1.20 nats above its course, which is 14 of its standard deviations, for 30 steps",
    "decision": ["roll_back", "skip_data"], "outcome": "",
}  # fmt: skip
_ROWS = [RecentStep(step, loss_at(step), 1.0, float(step), 1) for step in range(10_345, 12_345)]
_LOGS = [
    LogLine(f"2026-01-01T00:00:{n:02d}.000000Z", "supervisor", "info", "attempt_spawned", {"n": n}) for n in range(30)
]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 25), (120, 50), (60, 18), (40, 10), (20, 4), (300, 90)])
@pytest.mark.parametrize("logs", [0, 30])
def test_the_screen_fits(width: int, height: int, logs: int) -> None:
    """No line is longer than the terminal, none is more than it has, and the first and the last are always there."""
    lines = screen(Seen(_FACTS, _ROWS, [_INCIDENT], _LOGS[:logs]), width, height)
    assert len(lines) <= height
    assert max(line.cell_len for line in lines) <= width
    assert lines[0].plain.startswith("running")
    assert lines[-1].plain.startswith("p pause")


def test_a_common_terminal_shows_everything() -> None:
    """In 80x24: state, pace, budget, the open incident, both curves with their scales, log lines, keys."""
    text = "\n".join(line.plain for line in screen(Seen(_FACTS, _ROWS, [_INCIDENT], _LOGS), 80, 24))
    for expected in (
        "step 12,345 of 100,000 (12.3%), 3 h 05 min left", "goodput 98.7%", "loss 2.3456", "123k tokens/s",
        "5 rollbacks, 9 restarts", "#2 unrecovered_spike at step 11,000", "gradient norm", "12,344",
        "attempt_spawned n=29", "c checkpoint now",
    ):  # fmt: skip
        assert expected in text
    assert "┬" in text  # where the incident began


def test_no_colour_is_no_loss() -> None:
    """Without colour the same text, and not one escape."""
    lines = screen(Seen(_FACTS, _ROWS, [_INCIDENT], _LOGS), 80, 24)
    console = Console(no_color=True, width=80, force_terminal=False, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for line in lines:
        console.print(line)
    console.file.close()
    assert "\x1b" not in console.export_text()


def test_a_run_that_has_just_begun() -> None:
    """Nothing to draw, nothing known: still a screen."""
    facts = {"run_dir": "r", "state": "starting", "step": 0, "total_steps": 0}
    assert "nothing to draw yet" in "\n".join(line.plain for line in screen(Seen(facts, [], [], []), 80, 24))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"state": "halted"}, "longwatch resume"),
        ({"state": "stopped"}, "longwatch launch"),
        ({"state": "recovering", "last_incident": {"state": "diagnosing"}}, "replay"),
        ({"state": "recovering"}, "good checkpoint"),
        ({"lr_factor": 0.5}, "50%"),
        ({}, ""),
    ],
)
def test_what_comes_next(changes: dict[str, Any], expected: str) -> None:
    """Somebody who looks at a run in trouble is told what it waits for."""
    told = next_step(_FACTS | changes)
    assert expected in told
    assert bool(told) == bool(expected)


def test_status_is_one_screen() -> None:
    """24 lines of 80, with goodput, time left and what was done last."""
    lines = status_lines(_FACTS | {"last_incident": _INCIDENT, "trend": {"change": -0.01, "steps": 999}})
    text = "\n".join(line.plain for line in lines)
    assert len(lines) <= 23
    for expected in (
        "98.7%",
        "3 h 05 min left",
        "down 0.01 over the last 999 steps",
        "#2 unrecovered_spike",
        "roll_back",
    ):
        assert expected in text


# -- logs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(name="paths")
def _paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run")
    write_journal(paths)
    logs = paths.root / "logs"
    _log(logs / "supervisor.jsonl", "2026-01-01T00:00:02Z", "attempt_spawned", attempt=1)
    _log(logs / "attempt-1.jsonl", "2026-01-01T00:00:01Z", "attempt_begins", level="info", because="first launch")
    _log(logs / "attempt-1.jsonl", "2026-01-01T00:00:03Z", "odd", level="warning", exception="Traceback\nValueError: x")
    (logs / "attempt-1.out").write_text("a line that was printed\nhalf a li")
    os.utime(logs / "attempt-1.out", (1767225604.0, 1767225604.0))  # 2026-01-01T00:00:04Z
    return paths


def _log(path: Path, at: str, event: str, level: str = "info", **fields: object) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"event": event, "level": level, "timestamp": at, **fields}) + "\n")


def test_logs_are_one_stream_by_time(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    """Structured and printed lines of all processes; what is not complete yet is left for later."""
    assert run(["logs", str(paths.root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[11:19] for line in lines if line.startswith("2026")] == [
        "00:00:01",
        "00:00:02",
        "00:00:03",
        "00:00:04",
    ]
    assert lines[0].endswith('attempt-1   info     attempt_begins because="first launch"')
    assert "ValueError: x" in "\n".join(lines)
    assert lines[-1].endswith("a line that was printed")


def test_logs_by_level_process_and_number(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    """For grep and for programs."""
    assert run(["logs", str(paths.root), "--level", "warning", "--json"]) == 0
    assert [json.loads(line)["text"].splitlines()[0] for line in capsys.readouterr().out.splitlines()] == ["odd"]
    assert run(["logs", str(paths.root), "--process", "supervisor"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert run(["logs", str(paths.root), "-n", "1"]) == 0
    assert "was printed" in capsys.readouterr().out
    assert run(["logs", str(paths.root), "--level", "loud"]) == 2


def test_what_comes_later_is_read_once(paths: RunPaths) -> None:
    """New lines, the rest of a line, and new files."""
    reader = LogReader(paths)
    assert len(reader.poll()) == 4
    assert reader.poll() == []
    with (paths.root / "logs" / "attempt-1.out").open("a") as file:
        file.write("ne\n")
    _log(paths.root / "logs" / "attempt-2.jsonl", "2026-01-01T00:01:00Z", "attempt_begins")
    now = datetime(2026, 1, 1, 0, 2, tzinfo=UTC)
    assert [(line.source, line.text, line.at[14:19]) for line in reader.poll(now)] == [
        ("attempt-2", "attempt_begins", "01:00"), ("attempt-1", "half a line", "02:00"),
    ]  # fmt: skip


# -- on a real terminal ----------------------------------------------------------------------------------------------


class _Terminal:
    """`longwatch` on a pseudo terminal of 80x24."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", *arguments], stdin=slave, stdout=slave, stderr=slave,
            env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str) -> None:
        """Until the screen has shown it."""
        deadline_s = time.monotonic() + 60
        while text not in self.seen:
            assert time.monotonic() < deadline_s, f"{text!r} was not shown: {self.seen[-2000:]!r}"
            ready, _, _ = select.select([self.master], [], [], 1.0)
            if ready:
                self.seen += os.read(self.master, 1 << 16).decode(errors="replace")

    def press(self, key: str) -> None:
        """One key."""
        self.seen = ""
        os.write(self.master, key.encode())

    def close(self) -> int:
        """Its exit code."""
        try:
            return self.process.wait(30)
        finally:
            os.close(self.master)


def test_watch_obeys_its_keys(paths: RunPaths) -> None:
    """Nobody supervises this run: what a key asks for is refused in words, and `q` leaves."""
    terminal = _Terminal("watch", str(paths.root), "--every", "0.2")
    terminal.wait_for("p pause")
    terminal.press("p")
    terminal.wait_for("(paused)")
    terminal.press("c")
    terminal.wait_for("no supervisor")
    terminal.press("s")
    terminal.wait_for("press s again")
    terminal.press("x")
    terminal.wait_for("(paused)")
    terminal.press("q")
    assert terminal.close() == 0


def test_watch_without_a_terminal_says_what_to_use(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    """It would only fill a file with escapes."""
    assert run(["watch", str(paths.root)]) == 2
    assert "longwatch logs --follow" in capsys.readouterr().err


def test_logs_follow_until_interrupted(paths: RunPaths) -> None:
    """What is written later comes, and Ctrl-C is no error message."""
    terminal = _Terminal("logs", str(paths.root), "--follow")
    terminal.wait_for("was printed")
    _log(paths.root / "logs" / "supervisor.jsonl", "2026-01-01T00:05:00Z", "something_new")
    terminal.wait_for("something_new")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.close() == 130
