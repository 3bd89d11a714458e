"""`longwatch status`, `incidents` and `checkpoints`: the same facts for a living run and for a finished one.

They read the journal and the store, and never ask or disturb the supervisor.
"""

from contextlib import closing
from dataclasses import asdict
from typing import Any

import typer

from orchestrator.cli.find import JsonOption, RunArgument, find_run
from orchestrator.cli.output import out, say, say_json
from orchestrator.documents import ConfigError, Place, Problem
from orchestrator.journal import Journal
from orchestrator.recovery.catalog import Checkpoint, list_checkpoints
from orchestrator.report.facts import run_status, shown_incidents
from orchestrator.report.incidents import cost_text, incident_lines, total_cost
from orchestrator.report.numbers import short
from orchestrator.report.status import status_lines
from trainer.contract.config import RunConfig
from trainer.contract.paths import RunPaths
from trainer.contract.store import open_store


def status(run: RunArgument = None, json: JsonOption = False) -> None:
    """Show where a run stands: step, loss, learning rate, checkpoints, incidents, what is left of the budget."""
    facts = run_status(find_run(run))
    if json:
        say_json(facts)
        return
    for line in status_lines(facts):
        out().print(line)


def incidents(run: RunArgument = None, json: JsonOption = False) -> None:
    """Show every incident of a run: what was seen, why, what was done about it and what it cost."""
    paths = find_run(run)
    with closing(Journal.read_only(paths.database)) as journal:
        found = shown_incidents(journal)
    if json:
        say_json({"incidents": found})
        return
    for line in incident_lines(found):
        out().print(line)
    say(f"{len(found)} incidents, cost in all: {cost_text(total_cost(found))}")


def checkpoints(run: RunArgument = None, json: JsonOption = False) -> None:
    """Show the checkpoints in a run's store, oldest first, with what is known about each."""
    found = stored_checkpoints(find_run(run))
    if json:
        say_json({"checkpoints": [{**asdict(checkpoint), "good": checkpoint.good} for checkpoint in found]})
        return
    for checkpoint in found:
        say(_line(checkpoint))
    say(f"{len(found)} checkpoints")


def stored_checkpoints(paths: RunPaths) -> list[Checkpoint]:
    """Ask the store of a run.

    Raises:
        StoreError: it cannot be asked.
        ConfigError: the run directory does not say where the store is.
    """
    try:
        config = RunConfig.model_validate_json(paths.run_yaml.read_bytes())
    except (OSError, ValueError) as error:
        message = f"cannot be read ({type(error).__name__}); launch the run again, or bring the file back"
        raise ConfigError([Problem(Place(str(paths.run_yaml)), "", message)]) from error
    with closing(open_store(config.store, paths.root, config.name)) as store:
        return list_checkpoints(store)


def _line(checkpoint: Checkpoint) -> str:
    facts: list[Any] = ["pinned"] if checkpoint.pinned else []
    facts += [] if checkpoint.in_lineage else ["rolled back"]
    notes = f"  {', '.join(facts)}" if facts else ""
    return f"step {checkpoint.step:>9,}  {checkpoint.state:<9}  {short(checkpoint.bytes):>6}B  {checkpoint.id}{notes}"


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(epilog="Example: longwatch status runs/my-run --json")(status)
    app.command(epilog="Example: longwatch incidents runs/my-run --json")(incidents)
    app.command(epilog="Example: longwatch checkpoints runs/my-run --json")(checkpoints)
