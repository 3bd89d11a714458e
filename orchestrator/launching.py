"""From a checked configuration to a supervisor: what is looked at before a run starts or goes on, in which order.

Nothing is changed before everything that can be known has been looked at. A run that exists, here or in its store, is
never started from scratch unless that is said.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from orchestrator.config import ResolvedRun, check_changes, write_resolved
from orchestrator.documents import ConfigError, Problem
from orchestrator.errors import OrchestratorError, RunHeldError
from orchestrator.facts import facts_of
from orchestrator.journal import Journal
from orchestrator.logs import log_to
from orchestrator.policy.engine import Engine
from orchestrator.policy.state import Incident
from orchestrator.preflight import preflight
from orchestrator.process.filesystem import refuse_network_filesystem
from orchestrator.process.lock import is_held, read_holder
from orchestrator.supervisor import Setup, Supervisor, Update
from trainer.contract import fence
from trainer.contract.paths import RunPaths
from trainer.contract.store import Store, StoreError, open_store

OnUpdate = Callable[[Update, Sequence[Incident]], None]
_FIRST_EPOCH = "first-epoch"  # a file of the run directory; only where a run began on a store that was in use


class HaltedError(OrchestratorError):
    """The run was halted: it goes on only when a person says so. `exit_code` is that of the halt (3 or 4)."""

    def __init__(self, run_dir: Path, exit_code: int, because: str) -> None:
        self.run_dir = run_dir
        self.exit_code = exit_code
        super().__init__(
            f"{run_dir} is halted and was left as it is ({because}); look at `longwatch incidents {run_dir}`, "
            f"then go on with `longwatch resume {run_dir} --because TEXT`"
        )


class RunExistsError(OrchestratorError):
    """The store has checkpoints of this run that this run directory knows nothing of."""

    exit_code = 2

    def __init__(self, url: str, run_dir: Path) -> None:
        self.url = url
        self.run_dir = run_dir
        super().__init__(
            f"{url} holds a run that {run_dir} knows nothing of, so nothing was started; put its run directory back, "
            "give this run another name, or start from scratch with --fresh (nothing in the store is deleted)"
        )


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch that has passed every look and has changed nothing yet."""

    run: ResolvedRun
    store: Store
    changed: tuple[str, ...]
    fresh: bool
    resume_because: str | None


def prepare(run: ResolvedRun, *, fresh: bool = False, resume_because: str | None = None) -> Launch:
    """Look at everything that can be known before the start.

    Raises:
        RunHeldError: another supervisor has the run.
        HaltedError: it is halted, and nobody has said that it goes on.
        ConfigError: a key changed that may not, or data, store, disk or port are not as they must be.
        RunExistsError: the store holds a run that this run directory does not know.
    """
    paths = run.paths
    if is_held(paths.lock):
        raise RunHeldError(paths.lock, str(read_holder(paths.lock) or "another process"))
    living = is_held(paths.child_lock)
    if fresh and living:
        raise RunHeldError(
            paths.child_lock, "a trainer that still runs: launch without --fresh to take it over, stop it"
        )
    known = paths.database.exists() and not fresh
    if known and resume_because is None:
        refuse_halted(paths)
    changed = check_changes(run) if known else []
    if not living:  # one that trains has shown that it can
        problems = preflight(run)
        if problems:
            raise ConfigError(problems)
    store = _store(run)
    if not known and not fresh and fence.current_epoch(store) is not None:
        raise RunExistsError(store.url, paths.root)
    return Launch(run, store, tuple(changed), fresh, resume_because)


def refuse_halted(paths: RunPaths) -> None:
    """Do nothing for a run that may go on.

    Raises:
        HaltedError: it was halted by its policy, or its budget is used up.
    """
    with closing(Journal.read_only(paths.database)) as journal:
        status = json.loads(journal.meta("status") or "{}")
        ends = [json.loads(row["json"]) for row in journal.decisions() if row["kind"] == "end_run"]
    if status.get("state") == "halted":
        because = str(ends[-1]["because"]) if ends else "its policy asks for a person"
        raise HaltedError(paths.root, int(ends[-1]["exit_code"]) if ends else 3, because)


def supervise(launch: Launch, on_update: OnUpdate) -> int:
    """Supervise until the run ends; returns the exit code of DESIGN 11."""
    run = launch.run
    if launch.fresh:
        set_aside(run.paths)
    run.paths.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    refuse_network_filesystem(run.paths.root)
    write_resolved(run)
    if launch.fresh:
        _remember_first_epoch(run.paths, fence.current_epoch(launch.store) or 0)
    log_to(run.paths.root / "logs")
    engines: list[Engine] = []

    def make_engine(snapshot: bytes | None) -> Engine:
        facts = facts_of(run.config)
        if snapshot is None:
            engine = Engine(run.policy, facts)
            engine.state.epoch = _first_epoch(run.paths)
        else:
            engine = Engine.restore(run.policy, facts, snapshot)
        engines.append(engine)
        return engine

    setup = Setup(
        paths=run.paths,
        config=run.config,
        store=launch.store,
        config_digest=run.config_digest,
        policy_digest=run.policy_digest,
        code_version=version("longwatch"),
        fresh=launch.fresh,
        resume_because=launch.resume_because,
    )
    return Supervisor(setup, make_engine, lambda update: on_update(update, engines[-1].incidents())).run()


def set_aside(paths: RunPaths) -> Path | None:
    """Rename an existing run directory to NAME.old-N: `--fresh` starts anew, it does not destroy."""
    if not paths.root.exists():
        return None
    number = 1
    while (aside := paths.root.with_name(f"{paths.root.name}.old-{number}")).exists():
        number += 1
    paths.root.rename(aside)
    return aside


def _store(run: ResolvedRun) -> Store:
    try:
        return open_store(run.config.store, run.source.parent, run.config.name)
    except StoreError as error:
        raise ConfigError([Problem(run.document.place(("store",)), "store", str(error))]) from error


def _remember_first_epoch(paths: RunPaths, epoch: int) -> None:
    """Epochs of an abandoned run stay in its store; ours begin after them."""
    (paths.root / _FIRST_EPOCH).write_text(str(epoch))


def _first_epoch(paths: RunPaths) -> int:
    try:
        return int((paths.root / _FIRST_EPOCH).read_text())
    except FileNotFoundError:
        return 0
