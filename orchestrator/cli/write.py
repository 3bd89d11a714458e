"""`longwatch init` and `longwatch schema`: what a person starts from."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from orchestrator.cli.output import remark, say
from orchestrator.policy.model import policy_schema
from trainer.contract.config import RunConfig

_SCAFFOLD = files("orchestrator.scaffold")
_FILES = ("run.yaml", "policy.yaml")
SCHEMA_DIRECTORY = ".longwatch"  # the modelines of the templates point here


def schema_of(what: Literal["run", "policy"]) -> dict[str, Any]:
    """The JSON Schema of run.yaml or policy.yaml."""
    return RunConfig.model_json_schema() if what == "run" else policy_schema()


def init(directory: Annotated[Path, typer.Argument(help="Where to write; made if it is not there.")] = Path()) -> None:
    """Write a commented run.yaml and policy.yaml, and the schemas by which editors check them."""
    taken = [directory / name for name in _FILES if (directory / name).exists()]
    if taken:
        remark(f"{', '.join(map(str, taken))}: exists already and is left alone; remove it, or name another directory")
        raise typer.Exit(2)
    schemas = directory / SCHEMA_DIRECTORY
    try:
        schemas.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            (directory / name).write_text(_SCAFFOLD.joinpath(name).read_text(encoding="utf-8"), encoding="utf-8")
        for what in ("run", "policy"):
            text = json.dumps(schema_of("run" if what == "run" else "policy"), indent=1)
            (schemas / f"{what}.schema.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        remark(f"{error.filename}: cannot be written ({error.strerror}); choose another directory")
        raise typer.Exit(2) from error
    say(f"wrote {directory / 'run.yaml'} and {directory / 'policy.yaml'}; next:")
    say("  longwatch data prepare SOURCE... --out data/train --validation-fraction 0.01")
    say("  longwatch check run.yaml")
    say("  longwatch launch run.yaml")


def schema(what: Annotated[Literal["run", "policy"], typer.Argument(help="Which file.")]) -> None:
    """Print the JSON Schema of run.yaml or policy.yaml, with a description of every key."""
    say(json.dumps(schema_of(what), indent=1))


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(epilog="Example: longwatch init my-project")(init)
    app.command(epilog="Example: longwatch schema run > run.schema.json")(schema)
