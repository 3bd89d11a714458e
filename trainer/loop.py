"""The training loop, the only one: steps, and between them whatever is due at a step boundary.

Step N is the Nth update and uses `schedule(N-1)` times the overlays at N. Nothing here decides what a bad loss means;
the loop reports, obeys commands and leaves when asked. A step's figures are read one step late on a GPU, so that
the host prepares the next step meanwhile; they are always settled before a boundary's work begins.
"""

import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

import structlog
import torch

from monitors.records import (
    ActivationRecord,
    EvalRecord,
    FinishedRecord,
    PhaseRecord,
    PlanAppliedRecord,
    StartedRecord,
    StepRecord,
    StepTime,
)
from trainer.checkpoint import Health
from trainer.contract.commands import ApplyPlan, CheckpointNow, Command, CommandReader, EvaluateNow, Leave
from trainer.contract.exit_codes import ExitCode
from trainer.contract.liveness import Phase
from trainer.contract.plan import overlay_factor
from trainer.data.errors import DataError
from trainer.data.stream import validation_batches
from trainer.errors import SaveFailedError
from trainer.evaluate import evaluate
from trainer.faults.desk import StepInput
from trainer.orphan import OrphanWatch
from trainer.probe import ProbeBatch
from trainer.recording import StepFacts, started_fields, step_fields
from trainer.saving import Saver, SaveSchedule, finite_or_none
from trainer.schedule import lr_at
from trainer.setup import Machinery, Workplace, order_facts, patience_with_data
from trainer.state import Progress, TrainingState, collect
from trainer.step import PendingResult, StepResult

log = structlog.get_logger(__name__)

_SMOOTHING = 0.05  # of the step time
WARM_UP_STEPS = 5  # the first steps allocate, autotune and fault pages in; they have a deadline of their own

Reason = Literal["finished", "preempted", "left", "replay_done", "orphaned"]


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A step whose figures may not be on the host yet."""

    facts: StepFacts
    pending: PendingResult
    data_s: float
    launched_s: float


class Loop:
    """One attempt, from its loaded state to its end."""

    def __init__(self, at: Workplace, machinery: Machinery) -> None:
        self._at = at
        self._config = at.config
        self._m = machinery
        self._replay = machinery.plan.replay
        self._progress = machinery.start.progress
        self._overlays = machinery.plan.overlays
        self._commands = CommandReader(at.paths.commands(machinery.plan.attempt))
        self._orphan = OrphanWatch(at.reporter, at.config.deadlines.orphan_s, at.parent_pid)
        self._probe = ProbeBatch(machinery.stream.vocab_size, at.config.batch.sequence_tokens)
        loaded_step = None if machinery.start.loaded is None else self._progress.step
        plan, every = machinery.plan, at.config.checkpoint.every_steps
        schedule = SaveSchedule(every, plan.failure_every_s, loaded_step)
        self._saver = Saver(machinery.snapshotter, at.paths, plan.attempt, at.reporter, schedule)
        self._in_flight: deque[_InFlight] = deque()
        self._lag = 1 if machinery.device.type == "cuda" else 0
        self._last: StepResult | None = None
        self._clock_s = time.monotonic()
        self._phase: Phase | None = None
        self._steps_run = 0
        self._step_s: float | None = None
        self._save_due: int | None = None
        self._compiled: set[bool] = set()
        self._evaluated_step: int | None = None
        self._leaving: Reason | None = None

    @property
    def step(self) -> int:
        """Updates done so far."""
        return self._progress.step

    def run(self) -> ExitCode:
        """Train to the end, or until asked to leave; records, checkpoints and the exit code are the result.

        Raises:
            DataError: the data is not as its manifest says.
            SaveFailedError: a checkpoint without which the attempt is worth nothing could not be committed.
        """
        last_step = self._replay.to_step if self._replay is not None else self._config.steps
        self._begin()
        try:
            while self._leaving is None and self.step < last_step:
                self._train_one()
                self._boundary()
        except DataError:  # whoever mends the data goes on from here, not from the last scheduled checkpoint
            if not self._at.stop:
                self._settle()
                self._save_for_good()
                raise
            self._leaving = "preempted"  # asked to leave while it waited for the data
        return self._end()

    def close(self) -> None:
        """Release data, arena and mailbox; a save that is on its way goes on without us."""
        self._saver.close()
        self._m.stream.close()
        self._commands.close()

    # Beginning and end

    def _begin(self) -> None:
        self._at.liveness.beat(self.step)
        probe_loss = self._probe.loss(self._m.model, self._m.precision)
        self._at.reporter.emit(StartedRecord, **started_fields(self._at, self._m, probe_loss))
        if self._m.start.loaded is None:
            self._save()
            if not self._saver.flush(0, self._config.deadlines.save):
                raise SaveFailedError(0, self._saver.last_error)
        self._obey()
        self._enter(Phase.WARM_UP)
        self._clock_s = time.monotonic()

    def _end(self) -> ExitCode:
        self._settle()
        if self._leaving is None and self._replay is not None:
            return self._finish("replay_done", ExitCode.REPLAY_DONE)
        if self._leaving == "left":
            return self._finish("left", ExitCode.LEFT)
        saved = self._save_for_good()
        if self._leaving is None:
            if not saved:
                raise SaveFailedError(self.step, self._saver.last_error)
            return self._finish("finished", ExitCode.FINISHED)
        if not saved:  # nothing newer than the last commit is there, so this is no preemption with a checkpoint
            return self._finish("left", ExitCode.LEFT)
        return self._finish(self._leaving, ExitCode.ORPHANED if self._leaving == "orphaned" else ExitCode.PREEMPTED)

    def _save_for_good(self) -> bool:
        """Have the state of the last step committed before the process ends, and evaluate it if training is done."""
        if self._replay is not None:
            return False
        if not self._saver.has(self.step):
            self._saver.wait_until_ready(self._config.deadlines.save)  # training is over: there is nothing to hold up
            self._save(even_if_not_finite=True)
        done = self.step == self._config.steps
        if done and self._leaving is None and self._evaluated_step != self.step and self._steps_run:
            self._evaluate(None)
        self._enter(Phase.SAVE)
        return self._saver.flush(self.step, self._config.deadlines.save)

    def _ready_to_save(self) -> bool:
        """Whether a snapshot can be taken now. What is due stays due; only on request is anything waited for, once."""
        wait = self._save_due == self.step and self._config.checkpoint.patience_s > 0
        return self._saver.wait_until_ready(self._config.checkpoint.patience_s) if wait else self._saver.ready()

    def _finish(self, reason: Reason, code: ExitCode) -> ExitCode:
        self._enter(Phase.LEAVE)
        self._at.reporter.emit(FinishedRecord, step=self.step, reason=reason)
        log.info("leaving", step=self.step, reason=reason)
        return code

    # One update

    def _train_one(self) -> None:
        config, number = self._config, self.step + 1
        begun_s = time.monotonic()
        batch = self._m.stream.next_batch(config.batch.sequences)
        given = StepInput(batch.tokens, batch.positions, batch.shards)
        given = self._m.faults.before_step(number, batch.begin, batch.end, given)
        planned = lr_at(number - 1, config.schedule, config.optimizer.peak_lr, config.steps)
        planned *= overlay_factor(self._overlays, number) * given.planned_factor
        lr = planned * given.applied_factor
        tokens = torch.from_numpy(given.tokens)
        details = self._wants_details(number)
        self._announce_compilation(details)
        launched_s = time.monotonic()
        pending = self._m.step(tokens, lr, ratios=self._wants_ratios(number), details=details)
        trained = tokens.shape[0] * (tokens.shape[1] - 1)
        facts = StepFacts(number, batch.begin, batch.end, batch.positions, batch.shards, trained, lr, planned)
        self._in_flight.append(_InFlight(facts, pending, launched_s - begun_s, launched_s))
        self._progress = Progress(number, self._progress.tokens + trained, batch.end, self._progress.skipped_updates)
        self._settle(self._lag)
        self._steps_run += 1
        self._at.liveness.beat(number)
        if self._phase in (Phase.COMPILE, Phase.WARM_UP):
            self._enter(Phase.TRAIN if self._steps_run >= WARM_UP_STEPS else Phase.WARM_UP)

    def _announce_compilation(self, details: bool) -> None:
        """The graph with details is another one, compiled when it is first wanted: that takes a longer deadline."""
        if self._config.compile and details not in self._compiled:
            self._compiled.add(details)
            self._enter(Phase.COMPILE)

    def _wants_ratios(self, number: int) -> bool:
        return number % self._config.monitor.update_ratio_every == 0

    def _wants_details(self, number: int) -> bool:
        capture = self._replay is not None and self._replay.capture
        return capture or number % self._config.monitor.details_every == 0

    def _settle(self, leave: int = 0) -> None:
        """Read and report steps until at most `leave` are in flight."""
        while len(self._in_flight) > leave:
            done = self._in_flight.popleft()
            result = done.pending.read()
            read_s = time.monotonic()
            compute = read_s - max(done.launched_s, self._clock_s)
            other = max(0.0, read_s - self._clock_s - done.data_s - compute)
            self._clock_s = read_s
            times = StepTime(data=done.data_s, compute=compute, other=other)
            before_s = times.total if self._step_s is None else self._step_s
            self._step_s = before_s + _SMOOTHING * (times.total - before_s)
            self._tell(done.facts, result, times)
            self._last = result
            if result.skipped:
                skipped = self._progress.skipped_updates + 1
                self._progress = Progress(self.step, self._progress.tokens, self._progress.position, skipped)

    def _tell(self, facts: StepFacts, result: StepResult, times: StepTime) -> None:
        reporter = self._at.reporter
        reporter.emit(StepRecord, **step_fields(facts, result, times, replay=self._replay is not None))
        if result.details is not None:
            reporter.emit(ActivationRecord, step=facts.step, groups=result.details.activations)

    # Boundaries

    def _boundary(self) -> None:
        """Whatever is due between two steps."""
        config = self._config
        if self._replay is None:
            if self._steps_run == 1:  # the optimizer has all of its state from the first update on
                self._saver.reserve(self._collect())
            last = self.step == config.steps
            if self._save_due is None and self._saver.due(self.step):
                self._save_due = self.step
            if self._save_due is not None and not last and self._ready_to_save():
                self._save()
            if self.step % config.evaluate.every_steps == 0 and not last:
                self._evaluate(None)
            self._saver.poll()
        self._obey()

    def _obey(self) -> None:
        """Commands, signals and the orphan rule; the first that says leave has its way."""
        for command in self._commands.poll():
            self._carry_out(command)
        if self._leaving is None and self._at.stop:
            self._leaving = "preempted"
        if self._leaving is None and self._orphan.is_orphan():
            self._leaving = "orphaned"

    def _carry_out(self, command: Command) -> None:
        match command:
            case CheckpointNow():
                if self._replay is None:
                    self._save_due = self.step  # at the latest at a boundary at which a slot is free
                    if self._saver.ready():
                        self._save()
            case EvaluateNow():
                self._evaluate(command.id)
            case ApplyPlan():
                self._settle()
                self._overlays = command.update.overlays
                self._m.stream.apply(skips=command.update.skips, quarantines=command.update.quarantines)
                position = self._progress.position
                self._at.reporter.emit(PlanAppliedRecord, step=self.step, position=position, command=command.id)
            case Leave():
                self._leaving = "preempted" if command.save else "left"
                log.info("asked_to_leave", save=command.save, because=command.because)

    def _evaluate(self, command: int | None) -> None:
        """Evaluate on the held-out samples; given up, without a record, if the attempt is to leave meanwhile."""
        config = self._config
        if config.data.validation is None:
            if command is not None:
                log.warning("evaluation_impossible", command=command, why="data.validation is not set")
            return
        phase = self._phase
        self._settle()
        self._enter(Phase.EVALUATE)
        sequences = config.batch.micro_sequences or config.batch.sequences
        batches = validation_batches(
            config.data,
            config.batch.sequence_tokens,
            config.evaluate.sequences,
            sequences,
            cache_dir=self._at.paths.data_cache,
            patience=patience_with_data(self._at),
        )
        found = evaluate(
            self._m.model, batches, self._m.precision, hook=self._m.hook, interrupted=lambda: bool(self._at.stop)
        )
        if found is not None:
            self._evaluated_step = self.step
            self._at.reporter.emit(
                EvalRecord,
                step=self.step,
                loss=found.loss,
                perplexity=found.perplexity,
                seconds=found.seconds,
                command=command,
                metrics=found.metrics,
            )
        self._back_to(phase)

    # Saving

    def _save(self, *, even_if_not_finite: bool = False) -> None:
        """Snapshot the state of this step, unless it is saved already, or no state to come back to."""
        late_steps = self.step - (self.step if self._save_due is None else self._save_due)
        self._save_due = None
        self._settle()
        if self._saver.has(self.step):
            return
        phase = self._phase
        self._enter(Phase.SAVE)
        if self._last is not None and not self._last.finite and not even_if_not_finite:
            self._saver.refuse(self.step, "the last update was not finite, so this is no state to come back to")
        else:
            self._saver.save(self.step, self._collect(), self._health(), self._step_s, late_steps)
        self._back_to(phase)

    def _collect(self) -> TrainingState:
        facts = {
            "overlays": [overlay.model_dump() for overlay in self._overlays],
            "precision": self._m.precision.name,
            "deterministic": self._config.deterministic,
            "compile": self._config.compile,
            "data": order_facts(self._m.stream.segments, self._progress.position),
        }
        core = self._m.step
        branch, guards = self._m.plan.branch, core.guards.tensors()
        return collect(core.model, core.optimizer, core.scaler, self._progress, branch, facts, guards)

    def _health(self) -> Health:
        last = self._last
        return Health(
            loss=finite_or_none(last.loss if last else None),
            grad_norm=finite_or_none(last.grad_norm if last else None),
            probe_loss=finite_or_none(self._probe.loss(self._m.model, self._m.precision)),
        )

    # Phases

    def _enter(self, phase: Phase) -> None:
        if phase is self._phase:
            return
        self._phase = phase
        self._at.liveness.enter(phase)
        self._at.reporter.emit(PhaseRecord, phase=phase.value, step=self.step)

    def _back_to(self, phase: Phase | None) -> None:
        """The phase before a boundary's work; its time counts for no step."""
        if phase is not None:
            self._enter(phase)
        self._clock_s = time.monotonic()
