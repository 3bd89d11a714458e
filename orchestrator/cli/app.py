"""`longwatch`: the verbs, and the process boundary at which every error becomes a message and an exit code.

Exit codes: 0 finished, 1 failed, 2 usage or configuration, 3 halted by policy, 4 budget used up, 5 stopped by the
operator with a checkpoint, 75 preempted with a checkpoint, 130/143 ended by a signal without one.
"""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from orchestrator.cli import check, checkpoints, control, data, drill, launch, ledger, look, replay, report, write
from orchestrator.cli.output import remark, say
from orchestrator.documents import ConfigError
from orchestrator.errors import OrchestratorError
from trainer.contract.fence import FenceError
from trainer.contract.store import StoreError

app = typer.Typer(
    name="longwatch",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a traceback with local variables could show a secret
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Keeps a long pretraining run alive and honest: detects what goes wrong, rolls back, skips the data that did "
    "it, lowers the learning rate for a while, and writes down what it did and what it cost.",
    epilog="Start: longwatch init, then longwatch check run.yaml, then longwatch launch run.yaml",
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"longwatch {installed_version('longwatch')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the verb."""


for group in (write, check, drill, launch, look, checkpoints, ledger, report, control, replay, data):
    group.register(app)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    try:
        app(args=list(arguments), prog_name="longwatch")
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
