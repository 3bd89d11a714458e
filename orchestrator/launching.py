"""From a checked configuration to a supervisor: what is looked at before a run starts or goes on, in which order.

Nothing is changed before everything that can be known has been looked at. A run that exists, here or in its store, is
never started from scratch unless that is said.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from orchestrator import moving
from orchestrator.config import ResolvedRun, check_changes, read_policy, write_resolved
from orchestrator.documents import ConfigError, Problem
from orchestrator.errors import JournalMissingError, OrchestratorError, RunHeldError
from orchestrator.facts import facts_of
from orchestrator.files import replace_file
from orchestrator.journal import Batch, Journal
from orchestrator.logs import log_to
from orchestrator.policy.decisions import EndRun
from orchestrator.policy.engine import Engine
from orchestrator.policy.model import Policy
from orchestrator.policy.shipped import in_force
from orchestrator.policy.state import Incident, RunStatus
from orchestrator.preflight import Data, preflight
from orchestrator.process.filesystem import refuse_network_filesystem
from orchestrator.process.keepers import end_keepers
from orchestrator.process.lock import RunLock, is_held, read_holder
from orchestrator.shipping import MOVED
from orchestrator.supervisor import Setup, Supervisor, Update
from orchestrator.takeover import open_engine
from trainer.contract import arena, fence
from trainer.contract.config import RunConfig
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
    data: Data | None = None


def prepare(
    run: ResolvedRun,
    *,
    fresh: bool = False,
    resume_because: str | None = None,
    take_over: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Launch:
    """Look at everything that can be known before the start.

    Args:
        run: the configuration.
        fresh: start from scratch; the old run is set aside.
        resume_because: why a halted run goes on.
        take_over: go on with what the store holds, whoever held the run; a run directory that is here is set aside.
        tell: what people should know while they wait.

    Raises:
        RunHeldError: another supervisor has the run.
        RunElsewhereError: another machine has it, and shows signs of life.
        ShippedJournalError: the store holds a run whose journal can't be used.
        HaltedError: it is halted, and nobody has said that it goes on.
        ConfigError: a key changed that may not, or data, store, disk or port are not as they must be.
        RunExistsError: the store holds a run that this run directory does not know.
    """
    paths = run.paths
    _ensure_free(paths)
    living = is_held(paths.child_lock)
    if fresh and living:
        raise RunHeldError(
            paths.child_lock, "a trainer that still runs: launch without --fresh to take it over, stop it"
        )
    if take_over and living:
        raise RunHeldError(paths.child_lock, "a trainer that still runs: launch without --take-over to go on with it")
    with ExitStack() as stack:
        store = stack.enter_context(closing(_store(run)))
        if not fresh and not living:
            _move_here(run, store, take_over, tell)
        looked = _look(run, store, living=living, fresh=fresh, resume_because=resume_because)
        stack.pop_all()  # it is the launch's from now on
        return looked


def _look(run: ResolvedRun, store: Store, *, living: bool, fresh: bool, resume_because: str | None) -> Launch:
    """The same, once it is known where the run directory is; raises as `prepare`."""
    paths = run.paths
    past = None if fresh else _past(paths)
    if past is not None and resume_because is None:
        past.refuse_halted(paths)
    changed = check_changes(run) if past is not None else []
    if past is not None:
        past.check(run, store)
    data = None
    if living:  # one that trains has shown that it can
        _refuse_other_data(run, changed)
    else:
        found = preflight(run, goes_on=past is not None)
        data = found.data
        if found.problems:
            raise ConfigError(list(found.problems))
    if past is None and not fresh and (fence.current_epoch(store) is not None or fence.commits_present(store)):
        _ensure_free(paths)  # one that was launched at the same time has just begun
        raise RunExistsError(store.url, paths.root)
    return Launch(run, store, tuple(changed), fresh, resume_because, data)


def _move_here(run: ResolvedRun, store: Store, take_over: bool, tell: Callable[[str], None]) -> None:
    """Build the run directory from the store, if the run is there and not here.

    One that was built and has claimed nothing yet is built again: the other machine may have gone on since.
    """
    paths = run.paths
    unclaimed = bool(_meta(paths, MOVED))
    if not take_over and paths.database.exists() and not unclaimed:
        return
    try:
        found = moving.find(store)
        if found is None:
            return
        _ensure_free(paths)  # launched twice at once, the other has just begun
        if not take_over:
            moving.ensure_nobody_lives(store, found, tell)
            _ensure_free(paths)
        if unclaimed or not _meta(paths, "status"):
            paths.database.unlink(missing_ok=True)
        else:
            tell(f"{paths.root} was set aside as {set_aside(paths)}")
        paths.create()
        with RunLock(paths.lock):
            moving.build(store, found, paths)
    except StoreError:
        return  # the look before the start will say what is wrong with it
    tell(f"{paths.root} was built from the journal in {store.url}; {found.holder} held the run last")


def _meta(paths: RunPaths, key: str) -> str | None:
    try:
        with closing(Journal.read_only(paths.database)) as journal:
            return journal.meta(key)
    except JournalMissingError:
        return None


def _ensure_free(paths: RunPaths) -> None:
    if is_held(paths.lock):
        raise RunHeldError(paths.lock, str(read_holder(paths.lock) or "another process"))


def changes_since(run: ResolvedRun) -> list[str] | None:
    """The keys that are not what they were at the last launch; None if the run was never begun.

    Raises:
        ConfigError: one of them may not change, or the store has lost the run.
    """
    past = _past(run.paths)
    if past is None:
        return None
    changed = check_changes(run)
    with closing(_store(run)) as store:
        past.check(run, store)
    return changed


@dataclass(frozen=True, slots=True)
class _Past:
    """What the journal says of a run that exists."""

    status: RunStatus | None
    end: EndRun | None

    def refuse_halted(self, paths: RunPaths) -> None:
        """Raise HaltedError for a run that was halted by its policy, or whose budget is used up."""
        if self.status is not None and self.status.state == "halted":
            because = self.end.because if self.end else "its policy asks for a person"
            raise HaltedError(paths.root, self.end.exit_code if self.end else 3, because)

    def check(self, run: ResolvedRun, store: Store) -> None:
        """Raise ConfigError where the configuration or the store does not fit what was done already."""
        status = self.status
        if status is None:
            return
        if run.config.steps < status.step:
            what = f"{status.step} steps are done already; raise it, or give the run another name"
            raise ConfigError([run.document.problem(("steps",), what)])
        try:
            missing = status.last_stored_step is not None and not fence.commits_present(store)
        except StoreError:
            return  # the look before the start will say what is wrong with it
        if missing:
            what = (
                f"{store.url} holds no checkpoint of this run, although step {status.last_stored_step} was committed; "
                "bring it back (is it mounted?), or start from scratch with --fresh"
            )
            raise ConfigError([run.document.problem(("store", "url"), what)])


def _past(paths: RunPaths) -> _Past | None:
    """None for a run that was never begun: a journal that was only just created is none."""
    try:
        with closing(Journal.read_only(paths.database)) as journal:
            status = journal.meta("status")
            ends = [row["json"] for row in journal.decisions() if row["kind"] == "end_run"]
    except JournalMissingError:
        return None
    return _Past(
        RunStatus.model_validate_json(status) if status else None,
        EndRun.model_validate_json(ends[-1]) if ends else None,
    )


def _refuse_other_data(run: ResolvedRun, changed: list[str]) -> None:
    """A trainer that lives reads what it began with; only the next one would notice."""
    problems = [
        run.document.problem(
            tuple(key.split(".")),
            "a trainer still runs, and other data only begins with a new attempt; stop the run first, or put it back",
        )
        for key in changed
        if key in ("data.train", "data.format")
    ]
    if problems:
        raise ConfigError(problems)


def supervise(launch: Launch, on_update: OnUpdate) -> int:
    """Supervise until the run ends; returns the exit code of DESIGN 11."""
    run = launch.run
    _ensure_free(run.paths)  # launched twice within the seconds of the look before the start
    if launch.fresh:
        set_aside(run.paths)
    run.paths.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    refuse_network_filesystem(run.paths.root)
    fold_under_old_rules(run)
    write_resolved(run)
    if launch.data is not None:
        replace_file(run.paths.data_book, json.dumps(launch.data.book).encode())
    if launch.fresh:
        _remember_first_epoch(run.paths, fence.current_epoch(launch.store) or 0)
    log_to(run.paths.root / "logs")
    engines: list[Engine] = []

    def make_engine(snapshot: bytes | None) -> Engine:
        engines.append(_engine(run.policy, run.config, run.paths, snapshot))
        return engines[-1]

    setup = Setup(
        paths=run.paths,
        config=run.config,
        store=launch.store,
        config_digest=run.config_digest,
        policy_digest=run.policy_digest,
        code_version=version("longwatch"),
        fresh=launch.fresh,
        resume_because=launch.resume_because,
        order=launch.data.order if launch.data is not None else None,
    )
    with closing(launch.store):
        return Supervisor(setup, make_engine, lambda update: on_update(update, engines[-1].incidents())).run()


def _engine(policy: Policy, config: RunConfig, paths: RunPaths, snapshot: bytes | None) -> Engine:
    if snapshot is not None:
        return Engine.restore(policy, facts_of(config), snapshot)
    engine = Engine(policy, facts_of(config))
    engine.state.epoch = _first_epoch(paths)
    return engine


def fold_under_old_rules(run: ResolvedRun) -> None:
    """Before configuration or policy change: fold the journal's tail by those under which it was written.

    After the death of a supervisor the newest snapshot is older than the newest events, and what was decided on them
    was decided by the old rules; other ones would come to a state that never was.
    """
    paths = run.paths
    try:
        config_json, policy_text = paths.run_yaml.read_bytes(), paths.policy_yaml.read_text()
    except FileNotFoundError:
        return
    if not paths.database.exists() or (config_json, policy_text) == (run.config_json, run.policy_text):
        return
    policy, config = in_force(read_policy(paths.policy_yaml)), RunConfig.model_validate_json(config_json)
    with RunLock(paths.lock), closing(Journal.open(paths.database)) as journal:
        core, _ = open_engine(journal, lambda snapshot: _engine(policy, config, paths, snapshot))
        journal.commit(Batch(snapshot=core.snapshot()))


def set_aside(paths: RunPaths) -> Path | None:
    """Rename an existing run directory to NAME.old-N: `--fresh` starts anew, it does not destroy.

    Keepers whose supervisor died know the directory by its name: they would serve the new run beside its own ones.
    """
    if not paths.root.exists():
        return None
    end_keepers(paths)
    arena.remove(paths.arena)
    number = 1
    while (aside := paths.root.with_name(f"{paths.root.name}.old-{number}")).exists():
        number += 1
    paths.root.rename(aside)
    return aside


def _store(run: ResolvedRun) -> Store:
    try:
        return open_store(run.config.store, run.source.parent, run.config.name, apart=True)
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
