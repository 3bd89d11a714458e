"""`longwatch watch`: a living run on the whole terminal, and three keys that act on it."""

import select
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live

from orchestrator.cli.find import RunArgument, find_run
from orchestrator.cli.output import out, remark
from orchestrator.control import CheckpointRequest, StopRequest, ask
from orchestrator.errors import OrchestratorError
from orchestrator.journal import Journal
from orchestrator.report.facts import run_status, shown_incidents
from orchestrator.report.log_lines import LogLine, LogReader
from orchestrator.report.recent import recent_steps
from orchestrator.report.screen import Seen, screen
from trainer.contract.paths import RunPaths

_STEPS = 2000  # of the curves: more than a terminal has dots
_LOG_LINES = 50


def watch(
    run: RunArgument = None,
    every_s: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two pictures.")] = 1.0,
) -> None:
    """Watch a run: curves with incidents marked, and the log. Keys: p pause, c checkpoint now, s stop, q quit.

    Quitting leaves the run alone; `s` asks once more before it stops the run with a checkpoint.
    """
    paths = find_run(run)
    console = out()
    if not (console.is_terminal and sys.stdin.isatty()):
        remark("watch needs a terminal; elsewhere use `longwatch status --json` or `longwatch logs --follow`")
        raise typer.Exit(2)
    with _keys() as stdin, Live(console=console, screen=True, auto_refresh=False) as live:
        _Watcher(paths, console, live).run(stdin, every_s)


class _Watcher:
    def __init__(self, paths: RunPaths, console: Console, live: Live) -> None:
        self._paths = paths
        self._console = console
        self._live = live
        self._reader = LogReader(paths, "info")
        self._logs: deque[LogLine] = deque(maxlen=_LOG_LINES)
        self._paused = False
        self._stop_asked = False
        self._said = ""

    def run(self, stdin: int, every_s: float) -> None:
        """Draw and obey until `q`."""
        seen = self._look()
        while True:
            self._draw(seen)
            ready, _, _ = select.select([stdin], [], [], every_s)
            if ready and not self._obey(sys.stdin.read(1)):
                return
            if not self._paused:
                seen = self._look()

    def _look(self) -> Seen:
        self._logs.extend(self._reader.poll())
        with closing(Journal.read_only(self._paths.database)) as journal:
            rows, incidents = recent_steps(journal, _STEPS), shown_incidents(journal)
        return Seen(run_status(self._paths, time.time()), rows, incidents, tuple(self._logs))

    def _draw(self, seen: Seen) -> None:
        shown = Seen(seen.facts, seen.rows, seen.incidents, seen.logs, self._paused, self._said)
        width, height = self._console.size
        self._live.update(Group(*screen(shown, width, height)), refresh=True)

    def _obey(self, key: str) -> bool:
        """Whether to go on."""
        confirmed, self._stop_asked = self._stop_asked and key == "s", False
        match key:
            case "q" | "\x03" | "":
                return False
            case "p":
                self._paused, self._said = not self._paused, ""
            case "c":
                self._ask(CheckpointRequest(), "asked for a checkpoint")
            case "s" if confirmed:
                self._ask(StopRequest(save=True), "asked to save and stop")
            case "s":
                self._stop_asked, self._said = True, "press s again to save and stop the run, any other key not to"
            case _:
                self._said = ""
        return True

    def _ask(self, request: CheckpointRequest | StopRequest, done: str) -> None:
        try:
            ask(self._paths.control_socket, request)
        except OrchestratorError as error:
            self._said = str(error)
        else:
            self._said = done


@contextmanager
def _keys() -> Iterator[int]:
    """Single keys without Enter; the terminal is given back as it was."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog="Example: longwatch watch runs/my-run --every 5")(watch)
