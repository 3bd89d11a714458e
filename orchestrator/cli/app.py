"""`longwatch`: the verbs, and the process boundary at which every error becomes a message and an exit code.

Only the module of the verb that is asked for is loaded, so that a supervisor does not carry what draws curves, and
`status` does not wait for what launches.

Exit codes: 0 finished, 1 failed, 2 usage or configuration, 3 halted by policy, 4 budget used up, 5 stopped by the
operator with a checkpoint, 75 preempted with a checkpoint, 130/143 ended by a signal without one.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from orchestrator.cli.output import remark, say
from orchestrator.documents import ConfigError
from orchestrator.errors import OrchestratorError
from trainer.contract.fence import FenceError
from trainer.contract.store import StoreError

#: Modules of this package and their verbs, in the order of the help.
MODULES: dict[str, tuple[str, ...]] = {
    "write": ("init", "schema"),
    "check": ("check", "doctor"),
    "drill": ("drill",),
    "launch": ("launch", "resume"),
    "look": ("status", "explain", "incidents"),
    "watch": ("watch",),
    "logs": ("logs",),
    "checkpoints": ("checkpoints",),
    "ledger": ("ledger",),
    "report": ("report",),
    "control": ("stop", "checkpoint"),
    "replay": ("replay",),
    "data": ("data",),
}


def app_for(verb: str | None) -> typer.Typer:
    """The application with the module of one verb, or with all: for help, completion, and what is no verb."""
    app = typer.Typer(
        name="longwatch",
        no_args_is_help=True,
        pretty_exceptions_enable=False,  # a traceback with local variables could show a secret
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Keeps a long pretraining run alive and honest: detects what goes wrong, rolls back, skips the data that "
        "did it, lowers the learning rate for a while, and writes down what it did and what it cost.",
        epilog="Start: longwatch init, then longwatch check run.yaml, then longwatch launch run.yaml",
    )
    app.callback()(_options)
    wanted = [name for name, verbs in MODULES.items() if verb in verbs] or list(MODULES)
    for name in wanted:
        import_module(f"orchestrator.cli.{name}").register(app)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as installed_version  # slow to import, and wanted here only

        say(f"longwatch {installed_version('longwatch')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the verb."""


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    try:
        app_for(arguments[0] if arguments else None)(args=list(arguments), prog_name="longwatch")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except ConfigError as error:
        for problem in error.problems:
            remark(str(problem))
        return error.exit_code
    except OrchestratorError as error:
        remark(str(error))
        return error.exit_code
    except (StoreError, FenceError) as error:
        remark(str(error))
        return 1
    except BrokenPipeError:  # the reader has seen enough: longwatch incidents | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    return 0


def main() -> int:
    """The console script."""
    return run(sys.argv[1:])
