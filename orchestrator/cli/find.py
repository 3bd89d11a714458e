"""Which run is meant: a run directory, a run.yaml, a name, or the newest run below the working directory."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.config import resolve
from orchestrator.errors import OrchestratorError
from trainer.contract.paths import RunPaths

_DEPTH = 4  # runs/NAME below a project, one more for where projects are kept together; deeper looking takes too long
_NEVER_INSIDE = {"node_modules", "__pycache__", "store", "logs", "records"}

RunArgument = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="Run directory, run.yaml or name; default: the newest run below here."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


class NoSuchRunError(OrchestratorError):
    """No run is there; `wanted` is what was asked for."""

    exit_code = 2

    def __init__(self, wanted: str | None) -> None:
        self.wanted = wanted
        what = f"no run {wanted!r} was found here" if wanted else "there is no run below this directory"
        super().__init__(f"{what}; start one with `longwatch launch run.yaml`, or name its directory")


def find_run(wanted: str | None) -> RunPaths:
    """The run that is meant.

    Raises:
        NoSuchRunError: there is none.
        ConfigError: a run.yaml was named that cannot be used.
    """
    if wanted is None:
        return _newest(None)
    path = Path(wanted)
    if path.is_file():
        paths = resolve(path).paths
        if paths.database.exists():
            return paths
        raise NoSuchRunError(wanted)
    if RunPaths(path).database.exists():
        return RunPaths(path.resolve())
    return _newest(wanted)


def _newest(name: str | None) -> RunPaths:
    found = [run for run in _runs(Path.cwd()) if name in (None, run.root.name)]
    if not found:
        raise NoSuchRunError(name)
    return max(found, key=_touched)


def _touched(run: RunPaths) -> int:
    """Nanoseconds of the last write; in WAL mode that is often beside the database."""
    beside = run.database.with_name(run.database.name + "-wal")
    return max(path.stat().st_mtime_ns for path in (run.database, beside) if path.exists())


def _runs(top: Path) -> Iterator[RunPaths]:
    for directory, subdirectories, files in os.walk(top):
        depth = len(Path(directory).relative_to(top).parts)
        if "run.db" in files:
            yield RunPaths(Path(directory))
            subdirectories.clear()
        elif depth >= _DEPTH:
            subdirectories.clear()
        else:
            subdirectories[:] = [d for d in subdirectories if d not in _NEVER_INSIDE and not d.startswith(".")]
