"""`longwatch logs`: what the processes of a run wrote, in the order of time."""

import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from orchestrator.cli.find import JsonOption, RunArgument, find_run
from orchestrator.cli.output import out, say_json
from orchestrator.report.log_lines import LEVELS, LogLine, LogReader

_EVERY_S = 0.5
_STYLES = {"warning": "yellow", "error": "red", "critical": "bold red", "debug": "dim"}


def logs(
    run: RunArgument = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes; Ctrl-C ends it.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the newest to begin with.")] = 100,
    level: Annotated[str, typer.Option(help=f"Leave out what is below: {', '.join(LEVELS)}.")] = "info",
    process: Annotated[
        str | None, typer.Option(help="Only one: supervisor, attempt-3, writer, uploader or standby.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show the logs of the supervisor, the trainers and the keepers, merged by time."""
    if level not in LEVELS:
        raise typer.BadParameter(f"{level!r} is none of {', '.join(LEVELS)}", param_hint="--level")
    reader = LogReader(find_run(run), level, process)
    found = reader.poll()
    for line in found[max(0, len(found) - lines) :]:
        _show(line, as_json=json)
    while follow:
        time.sleep(_EVERY_S)
        for line in reader.poll(datetime.now(UTC)):
            _show(line, as_json=json)


def _show(line: LogLine, *, as_json: bool) -> None:
    if as_json:
        say_json(asdict(line))
    else:
        out().print(line.plain(), style=_STYLES.get(line.level), markup=False)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog="Example: longwatch logs runs/my-run --follow --level warning")(logs)
