"""`longwatch replay`: what would have been seen and done in a recorded run."""

from pathlib import Path
from typing import Annotated

import typer

from monitors.trace import TraceError
from orchestrator.cli.find import JsonOption
from orchestrator.cli.output import out, remark, say, say_json
from orchestrator.config import read_policy
from orchestrator.policy.shipped import in_force
from orchestrator.replay import as_json, replay_trace
from orchestrator.report.incidents import incident_lines


def replay(
    trace: Annotated[Path, typer.Argument(help="CSV with columns step,loss and optionally more.")],
    policy: Annotated[Path | None, typer.Option(help="Policy file; default: the shipped one.")] = None,
    json: JsonOption = False,
) -> None:
    """Run a recorded run through the core that runs live, and show what Longwatch would have seen and done.

    Columns: step, loss; optional grad_norm, lr, tokens_per_sec, update_ratio, val_loss. An empty cell is not recorded;
    nan or inf is non-finite.
    """
    rules = in_force(read_policy(policy) if policy is not None else None)
    try:
        incidents, steps = replay_trace(trace, rules)
    except (TraceError, OSError) as error:
        remark(f"{trace}: {error}" if isinstance(error, OSError) else str(error))
        raise typer.Exit(2) from error
    found = as_json(incidents, steps)
    if json:
        say_json(found)
        return
    for line in incident_lines(found["incidents"]):
        out().print(line)
    say(f"{len(incidents)} incidents in {steps} steps")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog="Example: longwatch replay trace.csv --policy policy.yaml --json")(replay)
