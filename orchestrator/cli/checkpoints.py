"""`longwatch checkpoints`: what lies in a run's store, and what a person may do with it.

Listing, verifying, pinning and exporting work beside a running run. Pruning does not: there retention is at work.
"""

import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from orchestrator.cli.find import JsonOption, RunArgument, find_run
from orchestrator.cli.output import remark, say, say_json, show
from orchestrator.documents import ConfigError, Place, Problem
from orchestrator.errors import OrchestratorError, RunHeldError
from orchestrator.facts import spacings
from orchestrator.journal import Batch, Folded, Journal
from orchestrator.policy.decisions import StartAttempt
from orchestrator.policy.events import CheckpointsPruned
from orchestrator.process.lock import RunLock, is_held
from orchestrator.recovery.catalog import Checkpoint, Verification, list_checkpoints, with_local
from orchestrator.recovery.catalog import verify as read_whole
from orchestrator.recovery.export import Dtype, export_weights
from orchestrator.recovery.prune import prune as delete
from orchestrator.recovery.prune import sweep
from orchestrator.recovery.retention import plan_retention
from orchestrator.report.checkpoints import checkpoint_table, plan_table
from orchestrator.report.facts import commit_times, stored_status
from orchestrator.report.numbers import short
from trainer.contract import fence, verdicts
from trainer.contract.backends import LocalBackend
from trainer.contract.config import RunConfig
from trainer.contract.durations import duration_s
from trainer.contract.paths import KEEPER_ROLES, RunPaths
from trainer.contract.store import Store, open_store

_DISK_TIMEOUT_S = 60.0
_STEP = re.compile(r"\d+")


class _ListByDefault(TyperGroup):
    """`longwatch checkpoints RUN` is `longwatch checkpoints list RUN`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the verb in where none is given."""
        if not args or (args[0] not in self.commands and args[0] not in ("-h", "--help")):
            args = ["list", *args]
        return super().parse_args(ctx, args)


checkpoints = typer.Typer(
    cls=_ListByDefault,
    help="What lies in a run's store: list, verify, pin, prune, export.",
    epilog="Example: longwatch checkpoints runs/my-run",
)

StepArgument = Annotated[str, typer.Argument(metavar="STEP", help="A step, or a checkpoint's whole name.")]


class NoSuchCheckpointError(OrchestratorError):
    """The store has no such checkpoint, or more than one."""

    exit_code = 2


class BadDurationError(OrchestratorError):
    """An option is no duration."""

    exit_code = 2


class StoreEmptyError(OrchestratorError):
    """The run has committed checkpoints, and its store has none."""

    exit_code = 1

    def __init__(self, url: str, step: int) -> None:
        super().__init__(
            f"{url} holds no checkpoint of this run, although step {step} was committed; bring it back (is it mounted?)"
        )


@checkpoints.command("list", epilog="Example: longwatch checkpoints list runs/my-run --json")
def list_(run: RunArgument = None, json: JsonOption = False) -> None:
    """Show a run's checkpoints, oldest first: those in its store, and those that wait on this disk to get there."""
    paths = find_run(run)
    local = Store(LocalBackend(paths.local_tier), f"file://{paths.local_tier}", _DISK_TIMEOUT_S)
    with _store(paths) as store:
        times_s = _times(paths)
        found = with_local(list_checkpoints(store, times_s), store, local, times_s)
    if json:
        say_json({"checkpoints": [_as_json(checkpoint) for checkpoint in found]})
        return
    if found:
        show(checkpoint_table(found, time.time()))
    say(f"{len(found)} checkpoints, {short(sum(checkpoint.bytes for checkpoint in found))}B")


@checkpoints.command(epilog="Example: longwatch checkpoints verify 12000 runs/my-run")
def verify(
    step: Annotated[
        str | None, typer.Argument(metavar="[STEP]", help="A step, or a checkpoint's whole name; not with --all.")
    ] = None,
    run: RunArgument = None,
    everything: Annotated[bool, typer.Option("--all", help="Every checkpoint of the store.")] = False,
    condemn: Annotated[bool, typer.Option("--condemn", help="Mark what is damaged as bad, for good.")] = False,
    json: JsonOption = False,
) -> None:
    """Read every byte of a checkpoint and compare. What is sound is marked as verified; exit 1 if anything is not."""
    if everything and run is None:
        step, run = None, step
    if everything == (step is not None):
        remark("name one checkpoint by its step, or all of them with --all")
        raise typer.Exit(2)
    with _store(find_run(run)) as store:
        found = list_checkpoints(store)
        chosen = found if step is None else [_named(found, step)]
        verifications = [one for one in (_verified(store, checkpoint, condemn) for checkpoint in chosen) if one]
    if json:
        say_json({"verified": [{**asdict(one), "ok": one.ok} for one in verifications]})
    else:
        for one in verifications:
            say(f"{'ok' if one.ok else 'damaged':<8} {one.commit}  {short(one.bytes)}B")
            for problem in one.problems:
                say(f"         {problem}")
    sound = all(one.ok for one in verifications)
    if not sound and not condemn:
        remark("what is damaged still counts as before; --condemn marks it as bad, and nothing goes back to it")
    raise typer.Exit(0 if sound else 1)


@checkpoints.command(epilog="Example: longwatch checkpoints pin 12000 --because 'end of phase 1'")
def pin(
    step: StepArgument,
    because: Annotated[str, typer.Option(help="Why it is kept; it is written beside the pin.")],
    run: RunArgument = None,
) -> None:
    """Keep a checkpoint from every kind of pruning until it is unpinned."""
    with _store(find_run(run)) as store:
        chosen = _named(list_checkpoints(store), step)
        new = verdicts.pin(store, chosen.id, because)
        if chosen.id not in fence.commits_present(store):
            verdicts.unpin(store, chosen.id)
            raise NoSuchCheckpointError(f"{chosen.id} was pruned in this very moment; pin another one")
    say(f"{chosen.id} is pinned" if new else f"{chosen.id} was pinned already; its first reason stands")


@checkpoints.command(epilog="Example: longwatch checkpoints unpin 12000 runs/my-run")
def unpin(step: StepArgument, run: RunArgument = None) -> None:
    """Give a pinned checkpoint back to retention."""
    with _store(find_run(run)) as store:
        chosen = _named(list_checkpoints(store), step)
        verdicts.unpin(store, chosen.id)
    say(f"{chosen.id} is no longer pinned" if chosen.pinned else f"{chosen.id} was not pinned")


@checkpoints.command(epilog="Example: longwatch checkpoints export 12000 --out weights/ --dtype bf16")
def export(
    step: StepArgument,
    where: Annotated[str, typer.Option("--out", help="A file, or a directory (DIR/) in which it gets a name.")],
    run: RunArgument = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the floating tensors.")] = "as-is",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json: JsonOption = False,
) -> None:
    """Write the weights of a checkpoint as one safetensors file, checked while they are read."""
    paths = find_run(run)
    config = _config(paths)
    with _store(paths) as store:
        chosen = _named(list_checkpoints(store), step)
        path = Path(where)
        if where.endswith("/") or path.is_dir():
            path /= f"{config.name}-step-{chosen.step}.safetensors"
        about = {"model": config.model.model_dump_json(), "sequence_tokens": str(config.batch.sequence_tokens)}
        done = export_weights(store, chosen.id, path, dtype=dtype, force=force, about=about)
    if json:
        say_json({**asdict(done), "path": str(done.path)})
    else:
        say(f"{done.path}: {done.tensors} tensors of step {done.step}, {short(done.bytes)}B")


@checkpoints.command(epilog="Example: longwatch checkpoints prune runs/my-run --keep-good 2 --max-age 30d --dry-run")
def prune(
    run: RunArgument = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be deleted, and why not.")] = False,
    keep_good: Annotated[int | None, typer.Option(min=2, help="How many of the newest good ones stay.")] = None,
    max_age: Annotated[str | None, typer.Option(metavar="30d", help="Keep older ones for no distance or age.")] = None,
    rolled_back: Annotated[bool, typer.Option("--rolled-back", help="Also those of abandoned branches.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: JsonOption = False,
) -> None:
    """Delete what no rule keeps, of a run that is not running; a running one prunes by itself.

    Whatever the options: the last good ones, step 0, pins, condemned ones, the newest and what may still become good
    stay.
    """
    if json and not (yes or dry_run):
        remark("a program is not asked: with --json say --yes, or look first with --dry-run")
        raise typer.Exit(2)
    paths = find_run(run)
    max_age_s = None if max_age is None else _duration(max_age)
    with _store(paths) as store, _at_rest(paths, store, reading=dry_run):
        found = list_checkpoints(store, _times(paths))
        settings = _config(paths).checkpoint
        plan = plan_retention(
            found,
            keep_good=settings.keep_good if keep_good is None else keep_good,
            restoring=_awaited(paths),
            drop_abandoned=rolled_back,
            keep_for=spacings(settings),
            now_s=time.time(),
            max_age_s=max_age_s,
        )
        if json:
            say_json({"keep": plan.keep, "delete": plan.delete, "dry_run": dry_run})
        else:
            show(plan_table(found, plan, time.time()))
        if dry_run or not plan.delete:
            return
        if not yes:
            typer.confirm(f"delete {len(plan.delete)} checkpoints for good?", abort=True, err=True)
        freed = _delete(paths, store, plan.delete)
        if not json:
            say(f"deleted {len(plan.delete)} checkpoints, {short(freed)}B")


# -- pieces -----------------------------------------------------------------------------------------------------------


def _config(paths: RunPaths) -> RunConfig:
    try:
        return RunConfig.model_validate_json(paths.run_yaml.read_bytes())
    except (OSError, ValueError) as error:
        message = f"cannot be read ({type(error).__name__}); launch the run again, or bring the file back"
        raise ConfigError([Problem(Place(str(paths.run_yaml)), "", message)]) from error


@contextmanager
def _store(paths: RunPaths) -> Iterator[Store]:
    config = _config(paths)
    with closing(open_store(config.store, paths.root, config.name)) as store:
        with closing(Journal.read_only(paths.database)) as journal:
            stored = stored_status(journal, paths).get("last_stored_step")
        if stored is not None and not fence.commits_present(store):
            raise StoreEmptyError(store.url, stored)
        yield store


def _times(paths: RunPaths) -> dict[str, float]:
    with closing(Journal.read_only(paths.database)) as journal:
        return commit_times(journal)


def _named(found: list[Checkpoint], wanted: str) -> Checkpoint:
    """The one that is meant; of several of one step, that of the lineage."""
    if not _STEP.fullmatch(wanted):
        chosen = [one for one in found if one.id == wanted]
    else:
        same = [one for one in found if one.step == int(wanted)]
        chosen = [one for one in same if one.in_lineage] or same
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        names = ", ".join(one.id for one in chosen)
        raise NoSuchCheckpointError(f"there are several checkpoints of step {wanted}; name one of {names}")
    raise NoSuchCheckpointError(
        f"there is no checkpoint {wanted!r} in the store; `longwatch checkpoints` shows what there is"
    )


def _verified(store: Store, checkpoint: Checkpoint, condemn: bool) -> Verification | None:
    """What reading it showed, written down; None if retention has deleted it in the meantime."""
    found = read_whole(store, checkpoint.id)
    if checkpoint.id not in fence.commits_present(store):
        remark(f"{checkpoint.id} was deleted while it was read")
        return None
    if found.ok:
        verdicts.write_verdict(store, checkpoint.id, "verified", f"{found.bytes} bytes read and compared")
    elif condemn:
        verdicts.write_verdict(store, checkpoint.id, "bad", "; ".join(found.problems))
    return found


@contextmanager
def _at_rest(paths: RunPaths, store: Store, *, reading: bool) -> Iterator[None]:
    """Nobody writes the run now, nor begins to; who only reads need not care.

    Raises:
        RunHeldError: a supervisor or a trainer has it.
        FenceLostError: another machine went on with it.
    """
    if reading:
        yield
        return
    with RunLock(paths.lock):
        for lock in (paths.child_lock, *(paths.keeper_lock(role) for role in KEEPER_ROLES)):
            if is_held(lock):
                raise RunHeldError(
                    lock, "a trainer, or one that saves for it, which still runs: launch to take it over"
                )
        known = _last_start(paths)
        newest = fence.current_epoch(store)
        if newest is not None and newest > (known.plan.epoch if known else -1):
            raise fence.FenceLostError(known.plan.epoch if known else -1, newest)
        yield


def _last_start(paths: RunPaths) -> StartAttempt | None:
    query = "SELECT json FROM decisions WHERE kind = 'start_attempt' ORDER BY id DESC LIMIT 1"
    with closing(Journal.read_only(paths.database)) as journal:
        return next((StartAttempt.model_validate_json(row["json"]) for row in journal.select(query)), None)


def _awaited(paths: RunPaths) -> tuple[str, ...]:
    """What the newest attempt was to load, if it never came to that: the next one will."""
    start = _last_start(paths)
    if start is None:
        return ()
    with closing(Journal.read_only(paths.database)) as journal:
        row = journal.last_attempt()
    loaded = row is not None and row["attempt"] == start.plan.attempt and row["started_step"] is not None
    return () if loaded else start.plan.candidates


def _delete(paths: RunPaths, store: Store, doomed: tuple[str, ...]) -> int:
    """Journal it, so that nothing is ever rolled back to what is gone; then delete. Returns bytes freed."""
    with closing(Journal.open(paths.database)) as journal:
        journal.commit(Batch(folded=[Folded(CheckpointsPruned(at_s=time.time(), commits=doomed))]))
    epoch = fence.current_epoch(store)
    return delete(store, doomed) + (sweep(store, epoch) if epoch is not None else 0)


def _duration(text: str) -> float:
    try:
        return duration_s(text)
    except ValueError as error:
        raise BadDurationError(f"--max-age {text!r}: {error}") from error


def _as_json(checkpoint: Checkpoint) -> dict[str, Any]:
    return {**asdict(checkpoint), "good": checkpoint.good}


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(checkpoints, name="checkpoints")
