"""Builds everything that the loop needs from a configuration and a plan, and loads the state that the plan names.

Order matters: overrides (learning rate, skips, quarantines) come after the load, so that a checkpoint can never bring
its own values back (OPT's betas, composer#3154). What cannot work is found here, before the first step.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from trainer.checkpoint import Author, CheckpointError, Loaded, Snapshotter, StateMismatchError, load_checkpoint
from trainer.checkpointing.load import ArenaTier, StoreTier, Tier
from trainer.contract.config import RunConfig
from trainer.contract.liveness import LivenessWriter
from trainer.contract.paths import RunPaths
from trainer.contract.plan import ResumePlan, Segment
from trainer.contract.store import Store, open_store
from trainer.data.book import Book, bring_up, read_book
from trainer.data.errors import DataError
from trainer.data.patience import Patience
from trainer.data.stream import DataStream
from trainer.errors import NoCandidateError, SetupError
from trainer.evaluate import Hook, load_hook
from trainer.faults.desk import FaultDesk
from trainer.faults.injector import Injector
from trainer.keeping.tier import LocalTier
from trainer.model import GPT, Forward, padded_vocab
from trainer.optim import build_optimizer
from trainer.precision import Precision, resolve
from trainer.reporter import Reporter
from trainer.signals import StopFlag
from trainer.state import Progress, restore, restore_rng, seed_everything
from trainer.step import TrainStep

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Workplace:
    """What an attempt has before anything is built."""

    config: RunConfig
    plan: ResumePlan
    paths: RunPaths
    reporter: Reporter
    liveness: LivenessWriter
    stop: StopFlag
    parent_pid: int


@dataclass(frozen=True, slots=True)
class Start:
    """Where training begins: the progress, the commit it comes from, and the candidates that were refused.

    `fresh_guards` are the rungs of the prevention ladder whose window that commit does not hold.
    """

    progress: Progress
    loaded: Loaded | None
    condemned: tuple[tuple[str, str], ...]
    fresh_guards: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Machinery:
    """Everything that the loop drives. `plan` is anchored to the loaded state."""

    plan: ResumePlan
    start: Start
    step: TrainStep
    precision: Precision
    stream: DataStream
    snapshotter: Snapshotter
    faults: FaultDesk
    hook: Hook | None

    @property
    def model(self) -> GPT:
        """The model, uncompiled."""
        return self.step.model

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.step.model.parameters()).device


def build(at: Workplace) -> Machinery:
    """Build and load; the next thing is the first step.

    Raises:
        TrainerError: it cannot be.
        DataError: the data is not as its manifest says.
        StoreError: the store cannot be reached.
    """
    config = at.config
    device = configure_torch(config)
    seed_everything(config.seed)
    hook = load_hook(config.evaluate.hook)
    patience = patience_with_data(at)
    book = patience.outlast(lambda _: bring_up(config.data, read_book(at.paths.data_book)))
    vocab_size = checked_vocab_size(config, book)
    faults = FaultDesk(Injector(config.faults, at.paths.fault_counts()), at.reporter, at.plan.attempt, vocab_size)
    precision = resolve(config.precision, device)
    log.info("precision", name=precision.name, why=precision.why, device=str(device))
    step = build_step(config, vocab_size, device, precision)
    faults.attach(step)
    with closing(open_store(config.store, at.paths.root, at.plan.run_id)) as store:
        start = load(at.plan, store, step, nearer_tiers(at.paths))
    faults.after_load(start.progress.step)
    plan = at.plan.anchored(start.progress.step, start.progress.position)
    snapshotter = build_snapshotter(at, start.loaded)
    stream = open_stream(at, book, plan, start, patience)
    if start.loaded is not None:  # last, because building the parts above may throw dice
        restore_rng(start.loaded.extra, config.seed, plan.branch)
    return Machinery(plan, start, step, precision, stream, snapshotter, faults, hook)


def configure_torch(config: RunConfig) -> torch.device:
    """Threads, determinism and device, before the first tensor."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        # would write every fresh tensor once more, for nothing
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    if config.launch.threads is not None:  # bits on a CPU depend on the number of threads
        torch.set_num_threads(config.launch.threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_step(config: RunConfig, vocab_size: int, device: torch.device, precision: Precision) -> TrainStep:
    """Model, optimizer and update step, with initial weights drawn on the CPU (the same on every device)."""
    size = config.model.vocab_size or padded_vocab(vocab_size)
    model = GPT(
        config.model, size, config.batch.sequence_tokens, activation_checkpointing=config.activation_checkpointing
    ).to(device)
    return TrainStep(
        model,
        build_optimizer(model, config.optimizer),
        precision=precision,
        clip_norm=config.optimizer.clip_norm,
        prevention=config.prevention,
        micro_sequences=config.batch.micro_sequences,
        scaler=precision.scaler(),
        forward=_compiled(model) if config.compile else None,
    )


def _compiled(model: GPT) -> Callable[..., Forward]:
    """What is called instead of the model: a plain callable, since a compiled module has no truth value."""
    module: Any = torch.compile(model)
    call: Callable[..., Forward] = module.__call__
    return call


def checked_vocab_size(config: RunConfig, book: Book) -> int:
    """The vocabulary of the run's data, before anything is built for it.

    Raises:
        SetupError: the configured model is too small for it.
    """
    if config.model.vocab_size is not None and config.model.vocab_size < book.vocab_size:
        what = f"model.vocab_size {config.model.vocab_size} is less than the {book.vocab_size} of the data"
        raise SetupError(what, "raise it, or leave it out")
    return book.vocab_size


def build_snapshotter(at: Workplace, loaded: Loaded | None) -> Snapshotter:
    """What copies the states of this attempt."""
    author = Author(
        run_id=at.plan.run_id,
        epoch=at.plan.epoch,
        attempt=at.plan.attempt,
        config_digest=hashlib.sha256(at.config.model_dump_json().encode()).hexdigest(),
        loaded=loaded.parent if loaded is not None else None,
    )
    return Snapshotter(at.paths.arena, author)


def patience_with_data(at: Workplace) -> Patience:
    """How long an outage of the data is waited for: never so long that it would be taken for a hang."""
    deadlines = at.config.deadlines
    silence_s = min(deadlines.load, deadlines.warm_up, deadlines.train, deadlines.evaluate)
    return Patience(min(at.config.data.timeout_s, silence_s / 2), give_up=lambda: bool(at.stop))


def open_stream(at: Workplace, book: Book, plan: ResumePlan, start: Start, patience: Patience) -> DataStream:
    """The training data from the raw position of the loaded state on.

    Raises:
        DataError: up to there, the plan's order is not the one that the checkpoint was trained on.
    """
    position = start.progress.position
    stream = DataStream(
        at.config.data,
        sample_tokens=at.config.batch.sequence_tokens,
        book=book,
        segments=plan.segments,
        skips=plan.skips,
        quarantines=plan.quarantines,
        position=position,
        planned_samples=plan.deferred_from,
        cache_dir=at.paths.data_cache,
        patience=patience,
    )
    if start.loaded is not None:
        trained_on = start.loaded.extra["facts"].get("data")
        if trained_on is not None and trained_on != order_facts(stream.segments, position):
            stream.close()
            raise DataError(
                f"checkpoint {start.loaded.manifest.commit} was trained on another order of the data than the plan has "
                f"before raw position {position}",
                "bring data, data.json and run.yaml back as they were; the checkpoint itself is sound",
            )
    return stream


def order_facts(segments: tuple[Segment, ...], position: int) -> list[dict[str, Any]]:
    """What a checkpoint keeps of the order: the segments that were read from before its raw position."""
    return [segment.model_dump(mode="json") for segment in segments if segment.from_position < position]


def nearer_tiers(paths: RunPaths) -> tuple[Tier, ...]:
    """Where a checkpoint may be found before the store is asked, nearest first."""
    local = LocalTier(paths.local_tier).store
    return (ArenaTier(paths.arena, local), StoreTier("local disk", local))


def load(plan: ResumePlan, store: Store, step: TrainStep, nearer: Sequence[Tier] = ()) -> Start:
    """Load the first candidate that verifies, from the nearest place that has it; none for a fresh start.

    Raises:
        NoCandidateError: all of them failed.
        StoreError: the store could not be asked, which condemns nothing.
    """
    if plan.fresh:
        return Start(Progress(), None, ())
    condemned: list[tuple[str, str]] = []
    for commit in plan.candidates:
        try:
            loaded = load_checkpoint(store, commit, nearer)
            progress = restore(step.model, step.optimizer, step.scaler, loaded.tensors, loaded.extra)
        except (CheckpointError, StateMismatchError) as error:
            log.error("candidate_condemned", commit=commit, why=str(error))
            condemned.append((commit, str(error)))
            continue
        log.info("loaded", commit=commit, step=progress.step, position=progress.position, from_tier=loaded.tier)
        fresh = step.guards.restore(loaded.tensors)
        if fresh:
            log.warning("guards_start_anew", rungs=fresh, why="the checkpoint holds no window that fits")
        return Start(progress, loaded, tuple(condemned), fresh)
    raise NoCandidateError(tuple(condemned))
