"""`longwatch report`: the logbook of a run, as a page that needs nothing else, as Markdown or as JSON."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.find import RunArgument, find_run
from orchestrator.cli.output import say
from orchestrator.errors import OrchestratorError
from orchestrator.logbook.gather import gather
from orchestrator.logbook.render import Format, write


class ReportNotWrittenError(OrchestratorError):
    """The file can't be written."""

    def __init__(self, path: Path, why: OSError) -> None:
        super().__init__(f"{path} can't be written: {why.strerror or why}; name another place with --out")


def report(
    run: RunArgument = None,
    form: Annotated[Format, typer.Option("--format", help="A page, Markdown, or the facts of both.")] = "html",
    out: Annotated[
        Path | None, typer.Option(help="Where it goes; default: report.FORMAT in the run directory.")
    ] = None,
) -> None:
    """Write the logbook of a run: curves, incidents with their evidence and cost, data, checkpoints, goodput."""
    paths = find_run(run)
    path = out or paths.root / f"report.{form}"
    try:
        write(gather(paths), form, path)
    except OSError as error:
        raise ReportNotWrittenError(path, error) from error
    say(str(path))


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog="Example: longwatch report runs/my-run --out my-run.html")(report)
