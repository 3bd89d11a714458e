"""`longwatch status`, `incidents` and `explain`: the same facts for a living run and for a finished one.

They read the journal, and never ask or disturb the supervisor.
"""

import time
from collections.abc import Iterable
from contextlib import closing
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from orchestrator.cli.find import JsonOption, RunArgument, find_run
from orchestrator.cli.output import out, say, say_json
from orchestrator.errors import OrchestratorError
from orchestrator.journal import Journal
from orchestrator.report.explain import explanation_lines, rules_of
from orchestrator.report.facts import run_status, shown_incidents
from orchestrator.report.incidents import cost_text, incident_lines, total_cost
from orchestrator.report.status import status_lines


class NoSuchIncidentError(OrchestratorError):
    """The run has no incident of this number."""

    exit_code = 2

    def __init__(self, number: int, known: Iterable[int]) -> None:
        there = ", ".join(str(one) for one in known) or "none yet"
        super().__init__(f"there is no incident {number}; there are: {there}")


def status(run: RunArgument = None, json: JsonOption = False) -> None:
    """Show where a run stands: step, loss, learning rate, checkpoints, incidents, what is left of the budget."""
    facts = run_status(find_run(run), time.time())
    if json:
        say_json(facts)
        return
    for line in status_lines(facts):
        out().print(line)


class _ListByDefault(TyperGroup):
    """`incidents [RUN]` lists; `incidents show N [RUN]` tells all of one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Name the verb that was left out."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


incidents = typer.Typer(cls=_ListByDefault, help="What happened to a run: list (if no verb is named), show.")


@incidents.command("list", epilog="Example: longwatch incidents runs/my-run --json")
def list_incidents(run: RunArgument = None, json: JsonOption = False) -> None:
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


def explain(
    incident: Annotated[int, typer.Argument(help="Its number, as `longwatch incidents` shows it.")],
    run: RunArgument = None,
    json: JsonOption = False,
) -> None:
    """Show why an incident was answered as it was: evidence, rules considered, guards, what was done and what came."""
    paths = find_run(run)
    with closing(Journal.read_only(paths.database)) as journal:
        known = {int(one["id"]): one for one in journal.incidents()}
    found = known.get(incident)
    if found is None:
        raise NoSuchIncidentError(incident, known)
    if json:
        say_json(found)
        return
    for line in explanation_lines(found, rules_of(paths)):
        out().print(line)


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(epilog="Example: longwatch status runs/my-run --json")(status)
    app.command(epilog="Example: longwatch explain 3 runs/my-run")(explain)
    incidents.command("show", epilog="Example: longwatch incidents show 3 runs/my-run")(explain)
    app.add_typer(incidents, name="incidents", epilog="Example: longwatch incidents runs/my-run --json")
