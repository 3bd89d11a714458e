"""`longwatch data`: token shards from text. The work is the trainer's own; this hands the words over."""

import subprocess
import sys

import typer

data = typer.Typer(no_args_is_help=True, help="Prepare training data.")


@data.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="Example: longwatch data prepare corpus/ --out data/train --validation-fraction 0.01",
)
def prepare(context: typer.Context) -> None:
    """Turn text or jsonl into token shards with a manifest. `longwatch data prepare --help` has its options."""
    command = [sys.executable, "-m", "trainer.data.prepare", *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(data, name="data")
