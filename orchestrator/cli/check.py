"""`longwatch check` and `doctor`: what is wrong, before it costs a night."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.examined import tell
from orchestrator.cli.find import JsonOption
from orchestrator.cli.output import remark, say
from orchestrator.config import ResolvedRun, resolve
from orchestrator.doctor.disk import examine_disk
from orchestrator.doctor.gpu import examine_gpus
from orchestrator.doctor.machine import examine_machine
from orchestrator.doctor.store import examine_store
from orchestrator.findings import Finding
from orchestrator.launching import changes_since
from orchestrator.preflight import port_problems, preflight
from orchestrator.process.lock import is_held
from trainer.contract.sizes import nearest_existing, state_bytes

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run's configuration.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as in --set steps=100.")
]


def check(run_file: RunFile, sets: SetOption = None) -> None:
    """Check configuration, policy, data, store, disk and port, and name every mistake with its remedy."""
    run = resolve(run_file, sets or ())
    changed = changes_since(run)
    port = not is_held(run.paths.lock)  # who supervises has it by right
    found = preflight(run, port=port, goes_on=changed is not None)
    for problem in found.problems:
        remark(str(problem))
    if found.problems:
        raise typer.Exit(2)
    if changed:
        say(f"the run goes on with other values for: {', '.join(changed)}")
    for change in found.data.changes if found.data is not None else ():
        say(change)
    say(f"{run_file}: ok; the run's files go to {run.paths.root}, its checkpoints to {run.config.store.url}")


def doctor(
    run_file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="Look at this run's disk, store and port as well.")
    ] = None,
    sets: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Say what this machine offers a long run, what is missing, and what to do about it. Takes some seconds.

    Exit codes: 0 nothing failed, 1 something did, 2 usage or configuration.
    """
    run = resolve(run_file, sets or ()) if run_file is not None else None
    findings = [*examine_machine(), *examine_gpus()]
    if run is None:
        findings += examine_disk(Path.cwd())
    else:
        findings += examine_disk(nearest_existing(run.paths.root), state_bytes(run.config))
        findings += [*examine_store(run), *_port(run)]
    raise typer.Exit(tell(findings, as_json=json))


def _port(run: ResolvedRun) -> list[Finding]:
    if is_held(run.paths.lock):
        return [Finding("metrics port", "pass", "in use by the run itself")]
    metrics = run.config.metrics
    if problems := port_problems(metrics, run.document):
        return [Finding("metrics port", "fail", str(one)) for one in problems]
    seen = "none wanted" if metrics.port is None else f"{metrics.host}:{metrics.port}"
    return [Finding("metrics port", "pass", seen)]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(epilog="Example: longwatch check run.yaml --set steps=1000")(check)
    app.command(epilog="Example: longwatch doctor run.yaml")(doctor)
