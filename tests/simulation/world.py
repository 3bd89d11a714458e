"""A node, its store and its people: everything around the supervisor, driven by one seed.

`run` goes on until the training run is finished, or something that must hold does not. The same profile and seed give
the same run, event for event.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from monitors.records import CommitFailedRecord, CommitRecord
from orchestrator.policy.decisions import EndRun
from orchestrator.policy.events import Event, RecordReceived, StopRequested
from orchestrator.policy.shipped import shipped_policy
from orchestrator.recovery.claim import claim_epoch
from tests.simulation.clock import Clock
from tests.simulation.data import Walk
from tests.simulation.diseases import Diseases
from tests.simulation.faults import Faults
from tests.simulation.goodput import Account, buckets
from tests.simulation.invariants import TRAINS_WITHIN_S, Broken, Invariants
from tests.simulation.keeper import Keeper, Save
from tests.simulation.profile import Profile
from tests.simulation.shell import Shell, SupervisorKilled
from tests.simulation.storage import SimBackend, SimStore
from tests.simulation.trainer import Consumed, Trainer
from trainer.contract.plan import ResumePlan
from trainer.contract.store import Store

_RESTARTED_AFTER_S = 2.0  # by systemd
_RELAUNCHED_AFTER_S = {"preempted": 120.0, "stopped": 1800.0, "halted": 3600.0, "budget_used_up": 3600.0}
_DATA_PATIENCE_S = 120.0  # the trainer's own, before it gives up
_MOST_EVENTS = 400_000


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a run."""

    profile: str
    seed: int
    weeks: float
    attempts: int
    faults: Counter[str]
    shares: dict[str, float]

    @property
    def goodput(self) -> float:
        """Share of the time that trained what survives."""
        return self.shares["training"]


class World:
    """One run from its first launch to its end."""

    def __init__(self, profile: Profile, seed: int, *, trace: bool = False) -> None:
        self.profile, self.seed = profile, seed
        self.rng = random.Random(f"{profile.name}/{seed}")
        self.policy = shipped_policy()
        self.clock = Clock()
        self.backend = SimBackend(self.clock)
        self.store = SimStore(self.backend)
        self.check = Invariants(self)
        self.account = Account()
        self.diseases = Diseases(self)
        self.faults = Faults(self)
        self.saves: dict[str, Save] = {}
        self.consumed: list[Consumed] = []
        self.keeper_records: list[Event] = []
        self.trainers: list[Trainer] = []
        self.shell: Shell | None = None
        self.boot = 1
        self.up = True
        self.trained_at_s = -1.0
        self.kill_points = 0
        self.kill_at_point = -1
        self.claim: Callable[[Store, ResumePlan, str, int | None], None] = claim_epoch
        self.data_away_until_s = self.disk_full_until_s = -1.0
        self.departures_s: list[float] = []
        self.failures: list[tuple[str, int]] = []
        self.departures_since_save = 0
        self.fatal_deaths = 0
        self.fired: Counter[str] = Counter()
        self.last_fault = "the launch"
        self.end: EndRun | None = None
        self.plan_before_replay: ResumePlan = ResumePlan(run_id="sim", attempt=1, epoch=0, fresh=True)
        self.tracing = trace
        self._fault_ends_s = 0.0
        self._wants: Literal["operator", "preemption"] | None = None
        self._resume_because: str | None = None
        self._memory: bytes | None = None
        self.database = Path()
        self.keeper = Keeper(
            self.clock, self.store, profile.upload_s, self._keeper_said, self._needed, self.check.stored
        )

    def run(self) -> Result:
        """To the end.

        Raises:
            Broken: something that must hold does not; the message has what replays it.
        """
        directory = Path(tempfile.mkdtemp(prefix="longwatch-sim-", dir=_memory_directory()))
        self.database = directory / "run.db"
        try:
            self.launch()
            self.faults.begin()
            for _ in range(_MOST_EVENTS):
                if self.end is not None and self.end.state == "finished":
                    return self._result()
                if not self.clock.advance():
                    raise Broken(f"{self.where()}: stuck: nothing will ever happen again")
            raise Broken(f"{self.where()}: stuck: it goes round in circles")
        finally:
            if self.shell is not None and self.shell.alive:
                self.shell.close()
            shutil.rmtree(directory)

    def where(self) -> str:
        """What replays this run, and how far it was."""
        return f"profile {self.profile.name!r}, seed {self.seed}, after {self.clock.now_s:.0f} s"

    def trace(self, text: str) -> None:
        """For a person who replays a seed."""
        if self.tracing:
            trainer = self.trainer
            step = f"attempt {trainer.attempt} step {trainer.step}" if trainer is not None else "no attempt"
            print(f"{self.clock.now_s:12.1f} {step}: {text}", flush=True)  # noqa: T201

    # -- processes ----------------------------------------------------------------------------------------------------

    @property
    def trainer(self) -> Trainer | None:
        """The newest process."""
        return self.trainers[-1] if self.trainers else None

    def launch(self) -> None:
        """A supervisor begins."""
        if not self.up or (self.shell is not None and self.shell.alive):
            return
        if self.clock.now_s < self.disk_full_until_s:
            self.clock.after(30.0, self.launch)
            return
        self.end = None
        because, self._resume_because = self._resume_because, None
        shell = self.shell = self.new_shell()
        if self._memory is not None:
            remembered, self._memory = self._memory, None
            self.check.replayed_core(remembered, shell.core.snapshot())
        self.guarded(lambda: shell.begin(because))
        self.check.checkpoints()
        if self._wants is not None and self.shell is shell and shell.alive:
            self.ask_to_stop(self._wants)

    def new_shell(self) -> Shell:
        """A supervisor process that has opened the journal."""
        return Shell(self)

    def walk(self, plan: ResumePlan) -> Walk:
        """The raw order as a trainer under this plan reads it."""
        return Walk(self.profile.layout, self.profile.batch, plan.skips, plan.quarantines)

    def spawn(self, plan: ResumePlan) -> Trainer:
        """A process that waits for its release."""
        trainer = Trainer(self, plan, pid=1000 + len(self.trainers), boot=self.boot)
        self.check.spawned(trainer, self.trainers[-3:])
        self.trainers.append(trainer)
        if plan.replay is None:
            self.plan_before_replay = plan
        return trainer

    def process_of(self, attempt: int, pid: int, boot: str) -> Trainer:
        """The process that a journal speaks of."""
        return next(t for t in reversed(self.trainers) if (t.attempt, t.pid, str(t.boot)) == (attempt, pid, boot))

    def cause_of(self, trainer: Trainer) -> str:
        """As the table of causes would have it: another boot is the machine's doing."""
        cause = "host_lost" if trainer.boot != self.boot and trainer.cause == "killed" else trainer.cause
        self.trace(f"ended: {cause}")
        if cause not in ("preempted", "left", "orphaned", "finished", "replay_done"):
            self.departures_s.append(self.clock.now_s)
            self.failures.append((cause, trainer.step))
            self.departures_since_save += cause != "data_unreachable"
        self.fatal_deaths += cause in ("data", "config", "checkpoint")
        return cause

    def guarded(self, call: Callable[[], object]) -> None:
        """What a supervisor does; if it is killed meanwhile, another begins."""
        shell = self.shell
        try:
            call()
        except SupervisorKilled:
            assert shell is not None
            self.fired["supervisor killed at a point"] += 1
            self._lost_supervisor(shell)

    def kill_supervisor(self) -> None:
        """SIGKILL."""
        if self.shell is not None and self.shell.alive:
            self._lost_supervisor(self.shell)

    def _lost_supervisor(self, shell: Shell) -> None:
        shell.close()
        trainer = self.trainer
        if trainer is not None and not trainer.released:
            trainer.alive = False  # the other end of its pipe is dead
        self.trace("supervisor killed")
        self.clock.after(_RESTARTED_AFTER_S, self.launch)

    def remember(self, snapshot: bytes) -> None:
        """What a supervisor knew when it was killed with nothing half done."""
        self._memory = snapshot

    def need_disk(self) -> None:
        """The journal needs space; a supervisor without any leaves."""
        if self.clock.now_s < self.disk_full_until_s:
            self.fired["journal on a full disk"] += 1
            raise SupervisorKilled

    def reboot(self, down_s: float) -> None:
        """Every process is gone, and what was in memory; the disk stays."""
        self.trace("reboot")
        shell, self.up = self.shell, False
        if self.trainer is not None:
            self.trainer.end("killed", arena_lost=True)
        if shell is not None and shell.alive:
            shell.close()
        self._memory = None
        self.boot += 1
        self.account.down_s += down_s

        def back() -> None:
            self.up = True
            self.keeper.turn_later()
            self.launch()

        self.clock.after(down_s, back)

    # -- what happens -------------------------------------------------------------------------------------------------

    def supervise(self) -> None:
        """Have the supervisor look, if there is one."""
        shell = self.shell
        if shell is not None and shell.alive:
            self.guarded(shell.look)

    def look(self) -> None:
        """The same, before something changes: what was due until now is done under the old conditions."""
        if self.trainer is not None:
            self.trainer.look()
        self.supervise()

    def tell(self, event: Event) -> None:
        """Somebody asks the supervisor for something."""
        shell = self.shell
        if shell is not None and shell.alive:
            self.guarded(lambda: shell.look(event))

    def ask_to_stop(self, by: Literal["operator", "preemption"]) -> None:
        """Asked again for as long as nobody has heard."""
        self._wants = by
        self.tell(StopRequested(at_s=self.clock.wall_s, by=by))

    def loaded(self, trainer: Trainer) -> None:
        """An attempt begins to train."""
        if self.clock.now_s < self.data_away_until_s and trainer.plan.replay is None:
            self.clock.after(_DATA_PATIENCE_S, lambda: trainer.end("data_unreachable"))
            return
        self.trace(f"loaded {trainer.parent}: {trainer.plan.because}")
        self.check.loaded(trainer)
        self.diseases.on_loaded(trainer)
        self.supervise()

    def left(self, end: EndRun) -> None:
        """The supervisor has left by itself."""
        self.trace(f"left: {end.state}, {end.because}")
        self.end, self._wants = end, None
        self.check.ended(end)
        if end.state == "finished":
            return
        wait_s = _RELAUNCHED_AFTER_S[end.state]
        self.account.ended_s += wait_s
        self.note_fault(end.state, until_s=self.clock.now_s + wait_s)
        if end.state in ("halted", "budget_used_up"):
            self.diseases.mended()
            self._resume_because = "mended by a person"
        self.clock.after(wait_s, self.launch)

    def note_fault(self, what: str, detail: str = "", until_s: float | None = None) -> None:
        """Something went wrong; some minutes after it has ended, training must go on."""
        self.fired[what] += 1
        self.last_fault = f"{what} {detail}".strip()
        self._fault_ends_s = max(self._fault_ends_s, self.clock.now_s, until_s or 0.0)
        ends_s = self._fault_ends_s

        def look() -> None:
            if self._fault_ends_s == ends_s:
                self.check.trains(ends_s)

        self.clock.at(ends_s + TRAINS_WITHIN_S, look)

    def resting(self) -> bool:
        """Whether not to train is right: finished, or between a stop and its relaunch."""
        return self.end is not None

    # -- what others ask ----------------------------------------------------------------------------------------------

    def attempts_with_records(self) -> list[int]:
        """Of the newest attempts; the records of older ones are taken in."""
        return [trainer.attempt for trainer in self.trainers[-3:]]

    def position_after(self, attempt: int, step: int) -> int:
        """Raw cursor after an update of an attempt."""
        for part in reversed(self.consumed):
            if part.attempt == attempt and part.first <= step <= part.last:
                size = (part.chunk.end - part.chunk.begin) // part.chunk.steps
                return part.chunk.end - (part.last - step) * size
        raise LookupError(step)

    def position_at_onset(self, step: int) -> int:
        """Raw cursor before an update, of whoever did it last."""
        for part in reversed(self.consumed):
            if part.first <= step <= part.last:
                size = (part.chunk.end - part.chunk.begin) // part.chunk.steps
                return part.chunk.begin + (step - part.first) * size
        raise LookupError(step)

    def _keeper_said(self, record: CommitRecord | CommitFailedRecord) -> None:
        self.keeper_records.append(RecordReceived(at_s=self.clock.wall_s, record=record))
        if isinstance(record, CommitRecord):
            self.departures_since_save = 0
        self.supervise()

    def _needed(self) -> tuple[str, ...]:
        return self.shell.core.needed() if self.shell is not None else ()

    def _result(self) -> Result:
        assert self.end is not None
        assert self.shell is not None
        shell = self.shell
        self.shell = reopened = Shell(self)
        try:
            self.check.replayed_core(shell.core.snapshot(), reopened.core.snapshot())
            self.check.finished(self.end)
        finally:
            reopened.close()
        step_s, total = self.profile.step_s, self.profile.total_steps
        done_s = sum(part.chunk.steps for part in self.consumed) * step_s
        shares = buckets(self.account, self.clock.now_s, total * step_s, done_s)
        weeks = self.clock.now_s / (7 * 86_400)
        faults = self.fired + self.backend.fired
        return Result(self.profile.name, self.seed, weeks, len(self.trainers), faults, shares)


def _memory_directory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
