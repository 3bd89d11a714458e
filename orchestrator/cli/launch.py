"""`longwatch launch` and `resume`: a run starts, goes on, or is taken up again, and is watched until it ends."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Annotated, cast

import typer

from monitors.exporter import ExporterError
from orchestrator.cli.check import RunFile, SetOption
from orchestrator.cli.find import NoSuchRunError, RunArgument, find_run
from orchestrator.cli.output import out, remark
from orchestrator.config import ResolvedRun, resolve, resolve_again
from orchestrator.launching import Launch, prepare, supervise
from orchestrator.logbook.keep import Keeper
from orchestrator.policy.decisions import EndRun
from orchestrator.policy.state import Incident
from orchestrator.report.background import BackgroundFile
from orchestrator.report.lines import line
from orchestrator.report.live import Display, display_for
from orchestrator.supervisor import Update

_OUTPUT_ENDS_S = 2.0
_LOGBOOK_ENDS_S = 10.0
_NOT_IN_A_HURRY = frozenset({0, 1, 3, 4})  # the run came to its own end: nobody waits with a kill


def launch(
    run_file: RunFile,
    sets: SetOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start from scratch; the old run is set aside.")] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Go on with what the store holds, without a look for who holds the run.")
    ] = False,
) -> None:
    """Start a run, or go on with it: the same command does both. SIGTERM saves and exits 75, Ctrl-C saves and exits 5.

    Exit codes: 0 finished, 1 failed, 2 usage or configuration, 3 halted by policy, 4 budget used up, 5 stopped by the
    operator, 75 preempted: run me again.
    """
    if fresh and take_over:
        remark("--fresh starts from scratch, --take-over goes on: say one of them")
        raise typer.Exit(2)
    _watch(prepare(_resolved(run_file, sets or []), fresh=fresh, take_over=take_over, tell=remark))


def resume(
    because: Annotated[str, typer.Option(help="Why it may go on; it is written into the journal.")],
    run: RunArgument = None,
) -> None:
    """Take up a run that its policy has halted, and watch it until it ends."""
    found: ResolvedRun = resolve_again(find_run(run))
    if not because.strip():
        remark("--because must say why the run may go on; it is written into the journal")
        raise typer.Exit(2)
    _watch(prepare(found, resume_because=because.strip()))


def _resolved(named: Path, sets: list[str]) -> ResolvedRun:
    """Of a file, or of the file that a run directory was launched from, with its overrides if there are no others."""
    if not named.is_dir():
        return resolve(named, sets)
    if (named / "run.db").exists():
        again = resolve_again(find_run(str(named)))
        return resolve(again.source, sets) if sets else again
    if (named / "run.yaml").exists():
        return resolve(named / "run.yaml", sets)
    raise NoSuchRunError(str(named))


def _watch(ready: Launch) -> None:
    output = BackgroundFile(sys.stdout) if _has_descriptor(sys.stdout) else None
    console = out(cast("IO[str] | None", output))
    if ready.changed:
        console.print(line("changed", keys=",".join(ready.changed)), markup=False)
    for change in ready.data.changes if ready.data is not None else ():
        console.print(line("data", change=change), markup=False)
    console.print(line("run", dir=str(ready.run.paths.root), store=ready.store.url), markup=False)
    display = display_for(console)
    minutes = ready.run.config.launch.logbook_minutes
    keeper = None if minutes is None else Keeper(ready.run.paths, 60.0 * minutes)
    watcher = _Watcher(display, keeper)
    for signum in (signal.SIGTERM, signal.SIGINT):  # in force before and after the supervisor takes signals in
        signal.signal(signum, watcher.interrupted)
    try:
        code = supervise(ready, watcher.update)
        if keeper is not None:
            keeper.finish(_LOGBOOK_ENDS_S if code in _NOT_IN_A_HURRY else 0.0)
    except ExporterError as error:
        remark(str(error))
        code = 2
    finally:
        display.close()
        ready.store.close()
        if output is not None:
            output.finish(_OUTPUT_ENDS_S)
    raise typer.Exit(code)


def _has_descriptor(file: IO[str]) -> bool:
    try:
        return file.fileno() >= 0
    except OSError:
        return False


class _Watcher:
    """Hands the supervisor's updates to a display and a logbook, and says once where the metrics are."""

    def __init__(self, display: Display, keeper: Keeper | None) -> None:
        self._display = display
        self._keeper = keeper
        self._told = False
        self._ended = False

    def update(self, update: Update, incidents: Sequence[Incident]) -> None:
        """What happened since the last time, and how the run stands."""
        if update.metrics_url and not self._told:
            self._told = True
            self._display.say(line("metrics", url=update.metrics_url))
        for folded in update.folded:
            self._ended = self._ended or any(isinstance(decision, EndRun) for decision in folded.decisions)
            self._display.folded(folded.event, folded.decisions)
        self._display.refresh(update.status, incidents)
        if self._keeper is not None:
            self._keeper.seen((update.status.state, update.status.incidents, update.status.open_incidents))

    def interrupted(self, signum: int, frame: object) -> None:
        """Once the end is decided and journaled, its exit code stands, however often somebody asks again."""
        if not self._ended:
            raise SystemExit(128 + signum)


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(epilog="Example: longwatch launch run.yaml --set steps=1000")(launch)
    app.command(epilog='Example: longwatch resume runs/my-run --because "the node was replaced"')(resume)
