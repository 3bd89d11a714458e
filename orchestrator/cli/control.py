"""`longwatch stop` and `checkpoint`: asks to the running supervisor over its private socket."""

from typing import Annotated

import typer

from orchestrator.cli.find import RunArgument, find_run
from orchestrator.cli.output import say
from orchestrator.control import CheckpointRequest, StopRequest, ask


def stop(
    run: RunArgument = None,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Save a checkpoint first.")] = True,
) -> None:
    """Stop a run: it saves a checkpoint, leaves, and `longwatch launch` goes on from there. Its launch exits 5."""
    paths = find_run(run)
    answer = ask(paths.control_socket, StopRequest(save=save))
    say(f"asked the supervisor (process {answer.pid}) of {paths.root} to {'save and ' if save else ''}stop")


def checkpoint(run: RunArgument = None) -> None:
    """Save a checkpoint of a running run at its next step; `longwatch checkpoints` shows it once it is there."""
    paths = find_run(run)
    answer = ask(paths.control_socket, CheckpointRequest())
    say(f"asked the supervisor (process {answer.pid}) of {paths.root} for a checkpoint")


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(epilog="Example: longwatch stop runs/my-run")(stop)
    app.command(epilog="Example: longwatch checkpoint runs/my-run")(checkpoint)
