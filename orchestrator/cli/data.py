"""`longwatch data`: token shards from text, and what was read when. The work is the trainer's own."""

import subprocess
import sys
from typing import Annotated

import typer

from orchestrator.cli.find import JsonOption, RunArgument, find_run

data = typer.Typer(no_args_is_help=True, help="Prepare training data; say what of it was read when.")


@data.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="Example: longwatch data prepare corpus/ --out data/train --validation-fraction 0.01",
)
def prepare(context: typer.Context) -> None:
    """Turn text or jsonl into token shards with a manifest. `longwatch data prepare --help` has its options."""
    command = [sys.executable, "-m", "trainer.data.prepare", *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


@data.command(epilog="Example: longwatch data where runs/my-run --shard shard-007.bin --sample 12")
def where(
    run: RunArgument = None,
    shard: Annotated[str | None, typer.Option(help="Number or name of a shard: name, or source/name.")] = None,
    sample: Annotated[int | None, typer.Option(min=0, help="A sample of the shard, or else of the source.")] = None,
    source: Annotated[str | None, typer.Option(help="The source that they are of, if there are several.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="What this step read or will read.")] = None,
    position: Annotated[int | None, typer.Option(min=0, help="What is read at this raw position.")] = None,
    json: JsonOption = False,
) -> None:
    """Say at which steps a shard or a sample was or will be read, or what a step or a position reads."""
    given = {"shard": shard, "sample": sample, "source": source, "step": step, "position": position}
    options = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "trainer.data.where", "--run-dir", str(find_run(run).root), *options]
    raise typer.Exit(subprocess.run([*command, *(["--json"] if json else [])], check=False).returncode)


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(data, name="data")
