"""`longwatch drill`: before a long run, see everything go wrong and right on this machine."""

from contextlib import closing
from typing import Annotated

import typer

from orchestrator.cli.check import RunFile, SetOption
from orchestrator.cli.examined import tell
from orchestrator.cli.output import remark
from orchestrator.config import resolve
from orchestrator.drill.checks import gather, judge
from orchestrator.drill.run import carry_out, drill_of, remove
from orchestrator.journal import Journal
from trainer.contract.store import open_store

_DAY_S = 86_400.0


def drill(
    run_file: RunFile,
    sets: SetOption = None,
    failures_per_day: Annotated[float, typer.Option(min=1e-3, help="For the expected goodput.")] = 1.0,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the drill's run directory and checkpoints.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Train 160 steps of this very run apart from it: killed, with a damaged checkpoint, with a planted divergence.

    Exit codes: 0 all passed or warned, 1 something failed, 2 usage or configuration.
    """
    run = resolve(run_file, sets or ())
    if run.config.launch.command is not None:
        remark("a trainer of one's own has no planted faults; leave launch.command out to drill with Longwatch's own")
        raise typer.Exit(2)
    ours = drill_of(run)
    try:
        codes = carry_out(ours, remark)
        with (
            closing(Journal.read_only(ours.paths.database)) as journal,
            closing(open_store(ours.config.store, ours.source.parent, ours.config.name)) as store,
        ):
            findings = judge(gather(journal, store, codes, _DAY_S / failures_per_day))
    finally:
        if keep:
            remark(f"kept: {ours.paths.root}, and {ours.config.name} in {ours.config.store.url}")
        else:
            remove(ours)
    raise typer.Exit(tell(findings, as_json=json))


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog="Example: longwatch drill run.yaml --failures-per-day 2")(drill)
