"""`longwatch check` and `doctor`: what is wrong, before it costs a night."""

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.output import remark, say
from orchestrator.config import resolve
from orchestrator.errors import NetworkFilesystemError
from orchestrator.launching import changes_since
from orchestrator.preflight import preflight
from orchestrator.process.filesystem import refuse_network_filesystem
from orchestrator.process.lock import is_held

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


def doctor() -> None:
    """Say what this machine offers, and what is missing."""
    healthy = True
    for what, found, good in _findings(Path.cwd()):
        healthy &= good
        say(f"{'ok' if good else 'missing':<8} {what:<12} {found}")
    raise typer.Exit(0 if healthy else 1)


def _findings(here: Path) -> list[tuple[str, str, bool]]:
    return [
        ("python", sys.version.split()[0], sys.version_info >= (3, 11)),
        ("torch", *_installed("torch")),
        ("cores", str(len(os.sched_getaffinity(0))), True),
        ("gpu", shutil.which("nvidia-smi") or "no nvidia-smi: training runs on the CPU", True),
        ("disk", f"{shutil.disk_usage(here).free / 1e9:.1f} GB free at {here}", os.access(here, os.W_OK)),
        ("filesystem", *_filesystem(here)),
        ("memory", _shared_memory(), True),
    ]


def _installed(package: str) -> tuple[str, bool]:
    try:
        return version(package), True
    except PackageNotFoundError:
        return "not installed; `make setup` installs it", False


def _shared_memory() -> str:
    where = Path("/dev/shm")  # noqa: S108  (only looked at)
    if not where.is_dir():
        return "no shared memory: saves take as long as the run directory's disk"
    return f"{shutil.disk_usage(where).free / 1e9:.1f} GB shared; a save wants two copies of the state there"


def _filesystem(here: Path) -> tuple[str, bool]:
    try:
        refuse_network_filesystem(here)
    except NetworkFilesystemError as error:
        return str(error), False
    return "local, so a run directory may lie here", True


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(epilog="Example: longwatch check run.yaml --set steps=1000")(check)
    app.command(epilog="Example: longwatch doctor")(doctor)
