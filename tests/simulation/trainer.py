"""A simulated trainer process: loads, trains, saves, answers commands, dies. Nothing is computed between two looks.

What is collapsed: of the saves in a stretch only those are made that its end could still tell of: the ones that have
not proven themselves yet, the three before them, and the nearest to each distance that retention keeps. The others
would have been made, proven good and pruned with nobody looking, since a stretch ends with every fault, every incident
and every look of a supervisor. Real retention rests on what an earlier one kept, so a real run may hold a few old
checkpoints more than this one; it never holds fewer. And a save counts as stored right after its own step if it would
be stored by the end of the stretch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from monitors.records import Condemned, EvalRecord, PlanAppliedRecord, SnapshotRecord, StartedRecord
from orchestrator.policy.events import Event, RecordReceived, StepsPassed
from orchestrator.recovery.catalog import verify
from orchestrator.recovery.retention import BACK_STEPS
from tests.simulation.data import Chunk, Walk
from tests.simulation.keeper import Save
from trainer.contract.commands import ApplyPlan, CheckpointNow, Command, EvaluateNow
from trainer.contract.manifest import commit_id
from trainer.contract.plan import ResumePlan, overlay_factor
from trainer.contract.store import StoreError
from trainer.interval import Measured, choose_interval

if TYPE_CHECKING:
    from tests.simulation.world import World

PEAK_LR = 3e-4
HEALTHY_LOSS = 2.0
_EVALUATION_S = 20.0
_ROUNDING_S = 1e-6  # an update that ends at a moment is done at that moment


@dataclass(slots=True)
class Consumed:
    """Updates (first - 1, last] of an attempt and the raw positions they took: what really happened."""

    attempt: int
    first: int
    chunk: Chunk
    replay: bool

    @property
    def last(self) -> int:
        """The last of them."""
        return self.first + self.chunk.steps - 1


@dataclass(slots=True)
class Trainer:
    """One process. Its records lie on the node, whoever reads them."""

    world: World
    plan: ResumePlan
    pid: int
    boot: int
    released: bool = False
    alive: bool = True
    loaded: bool = False
    hung_since_s: float | None = None
    leaving: bool = False
    cause: str = "unknown"
    settled_at_s: float = 0.0
    step: int = 0
    position: int = 0
    records: list[Event] = field(default_factory=list)
    parent: str | None = None
    bad_from: int | None = None
    interval: int = 1
    origin_s: float = 0.0
    origin_step: int = 0
    saved: int = 0
    seq: int = 0
    stalls: int = 0

    @property
    def attempt(self) -> int:
        """Its number."""
        return self.plan.attempt

    @property
    def last_step(self) -> int:
        """After which it leaves by itself."""
        return self.plan.replay.to_step if self.plan.replay else self.world.profile.total_steps

    @property
    def training(self) -> bool:
        """Whether it does updates at this moment."""
        return self.alive and self.loaded and self.hung_since_s is None

    # -- loading ------------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """It may run."""
        self.released = True
        self.world.clock.after(self.world.profile.restart_s, self._load)

    def _load(self) -> None:
        if not self.alive or self.hung_since_s is not None:
            return
        condemned: list[Condemned] = []
        save: Save | None = None
        try:
            for candidate in self.plan.candidates:
                problem = self._problem(candidate)
                if problem is None:
                    save = self.world.saves[candidate]
                    break
                condemned.append(Condemned(commit=candidate, why=problem))
        except StoreError:
            self.end("store")
            return
        if self.plan.candidates and save is None:
            self.end("checkpoint")
            return
        self._begin(save, tuple(condemned))

    def _problem(self, commit: str) -> str | None:
        """The local disk first, then the store, where a torn read is read again."""
        if self.world.keeper.on_disk(commit) is not None:
            return None
        found = verify(self.world.store, commit)
        return None if found.ok else "; ".join(found.problems)

    def _begin(self, save: Save | None, condemned: tuple[Condemned, ...]) -> None:
        profile = self.world.profile
        self.loaded = True
        self.parent = save.commit if save else None
        self.step, self.position = (save.step, save.position) if save else (0, 0)
        self.plan = self.plan.anchored(self.step, self.position)
        measured = Measured(profile.stall_s, profile.disk_s, profile.step_s)
        chosen = choose_interval(measured, self.plan.failure_every_s)
        self.interval = chosen.steps
        self._restart_pace()
        layout = profile.layout
        self.write(
            StartedRecord, step=self.step, position=self.position, tokens=self.step, loaded=self.parent,
            condemned=condemned, precision="bf16", device="sim", parameters=1, vocab_size=8,
            batch_samples=profile.batch, sample_tokens=1, total_steps=profile.total_steps,
            total_samples=layout.block_samples * layout.num_shards * 10, peak_lr=PEAK_LR,
            shards=tuple(str(number) for number in range(layout.num_shards)),
            shard_samples=(layout.block_samples * 10,) * layout.num_shards, warmup_steps=profile.warmup_steps,
            replay=self.plan.replay is not None,
        )  # fmt: skip
        if self.plan.replay is None:
            snapshot = {"stall_s": profile.stall_s, "bytes": 1, "next_steps": chosen.steps, "because": chosen.because}
            self.write(SnapshotRecord, step=self.step, **snapshot)
            self.write(EvalRecord, step=self.step, loss=HEALTHY_LOSS, perplexity=1.0, seconds=1.0)
        if save is None and self.plan.fresh:
            self._save(self.step, self.position, self.world.clock.now_s)
        self.world.loaded(self)
        self.world.clock.at(self.time_of(self.last_step), self._finish)
        if self.plan.replay is not None:
            self.world.clock.at(self.time_of(self.last_step), self._replayed)

    def _finish(self) -> None:
        if not self.training or self.leaving or self.plan.replay is not None:
            return
        self.look()
        if self.step < self.last_step:
            self.world.clock.at(self.time_of(self.last_step) + _ROUNDING_S, self._finish)
            return
        if self.parent_step() < self.step:
            self._save(self.step, self.position, self.world.clock.now_s)
        self.leaving = True
        self.world.clock.after(self.world.profile.disk_s, lambda: self.end("finished"))

    def _replayed(self) -> None:
        if not self.alive or self.hung_since_s is not None:
            return
        for first, last, loss, skipped in self.world.diseases.replayed(self):
            self.records.append(self._stretch(first, last, self.position, 0, loss=loss, skipped=skipped))
        self.world.account.replayed_s += (self.last_step - self.step) * self.world.profile.step_s
        self.end("replay_done")

    # -- training -----------------------------------------------------------------------------------------------------

    def _restart_pace(self) -> None:
        self.origin_s, self.origin_step, self.saved = self.world.clock.now_s, self.step, 0

    def time_of(self, step: int) -> float:
        """When an update will be done, stalls included."""
        done = step - self.origin_step
        stalls = 0 if self.plan.replay else max(0, done - 1) // self.interval
        return self.origin_s + done * self.world.profile.step_s + stalls * self.world.profile.stall_s

    def _due(self, now_s: float) -> int:
        profile = self.world.profile
        elapsed = now_s - self.origin_s + _ROUNDING_S
        period = self.interval * profile.step_s + profile.stall_s
        rounds = int(elapsed // period)
        done = rounds * self.interval + min(self.interval, int((elapsed - rounds * period) // profile.step_s))
        return min(self.origin_step + done, self.last_step)

    def look(self) -> None:
        """Have everything be done and written that is due by now."""
        if not self.training or self.leaving or self.plan.replay is not None:
            return
        now_s = self.world.clock.now_s
        due = max(self.step, self._due(now_s))
        ready = [number for number in self._saves_by(now_s) if number > self.saved]
        self.stalls += len(ready)
        wanted = self._worth_making(ready, due)
        self._train(self.world.walk(self.plan), due - self.step, wanted, thinned=len(wanted) < len(ready))
        self.saved = max([self.saved, *ready])

    def _saves_by(self, now_s: float) -> range:
        """Numbers of the saves of this stretch that are on disk by then."""
        profile = self.world.profile
        period = self.interval * profile.step_s + profile.stall_s
        return range(1, max(0, int((now_s - self.origin_s - profile.disk_s) // period)) + 1)

    def _worth_making(self, ready: list[int], now: int) -> dict[int, int]:
        """Step -> number of those that the end of the stretch can tell of."""
        steps = {self.origin_step + number * self.interval: number for number in ready}
        proven = [step for step in steps if step <= now - self.world.profile.good_after_steps]
        wanted = {step for step in steps if step not in proven} | set(proven[-1:])
        for back in BACK_STEPS[1:]:
            if proven and proven[0] <= now - back:
                wanted.add(min(proven, key=lambda step: abs(step - (now - back))))
        if self.bad_from is not None:
            wanted |= set(steps)
        return {step: steps[step] for step in sorted(wanted)}

    def _train(self, walk: Walk, count: int, wanted: dict[int, int], *, thinned: bool) -> None:
        profile = self.world.profile
        period = self.interval * profile.step_s + profile.stall_s
        for chunk in walk.chunks(self.position, count):
            first, size = self.step + 1, (chunk.end - chunk.begin) // chunk.steps
            self.world.consumed.append(Consumed(self.attempt, first, chunk, replay=False))
            self.step, self.position = first + chunk.steps - 1, chunk.end
            saves = []
            for step in (one for one in wanted if first <= one <= self.step):
                on_disk_s = self.origin_s + wanted[step] * period + profile.disk_s
                save = self._made(step, chunk.begin + (step - first + 1) * size, on_disk_s)
                self.world.saves[save.commit] = save
                saves.append(save)
            records = self.world.keeper.catch_up(saves)
            self.records.append(self._stretch(first, self.step, chunk.end, size, saves=tuple(records), thinned=thinned))

    def _made(self, step: int, position: int, on_disk_s: float) -> Save:
        name = commit_id(step, self.plan.epoch, self.attempt)
        healthy = self.bad_from is None or step < self.bad_from
        save = Save(name, step, position, self.parent, on_disk_s + self.world.profile.upload_s, healthy)
        self.parent = name
        return save

    def parent_step(self) -> int:
        """Of the newest save, or of what was loaded."""
        return self.world.saves[self.parent].step if self.parent else -1

    def _save(self, step: int, position: int, on_disk_s: float) -> None:
        save = self._made(step, position, on_disk_s)
        self.world.saves[save.commit] = save
        self.records.append(RecordReceived(at_s=self.world.clock.wall_s, record=self.world.keeper.record(save, "disk")))
        self.world.keeper.take(save)

    def _stretch(
        self, first: int, last: int, end: int, size: int, *, loss: float | None = None, skipped: bool = False,
        saves: tuple[Any, ...] = (), thinned: bool = False,
    ) -> StepsPassed:  # fmt: skip
        bad = self.bad_from is not None and last >= self.bad_from
        return StepsPassed(
            at_s=self.world.clock.wall_s, attempt=self.attempt, first_step=first, step=last, end=end, samples=size,
            tokens=1, step_s=self.world.profile.step_s, grad_norm=0.5, skipped=skipped, saves=saves, thinned=thinned,
            loss=loss if loss is not None else HEALTHY_LOSS + (1.5 if bad else 0.0),
            lr=PEAK_LR * overlay_factor(self.plan.overlays, last), replay=self.plan.replay is not None,
        )  # fmt: skip

    def blow_up(self, steps: int) -> None:
        """So many updates are not finite, and are not applied; their data is used up."""
        self.look()
        for chunk in self.world.walk(self.plan).chunks(self.position, min(steps, self.last_step - self.step)):
            first, size = self.step + 1, (chunk.end - chunk.begin) // chunk.steps
            self.world.consumed.append(Consumed(self.attempt, first, chunk, replay=False))
            self.step, self.position = first + chunk.steps - 1, chunk.end
            self.records.append(self._stretch(first, self.step, chunk.end, size, loss=float("nan"), skipped=True))
        self._restart_pace()

    def write(self, kind: type[Any], **fields: Any) -> None:
        """One record."""
        self.seq += 1
        record = kind.model_validate(
            {"seq": self.seq, "attempt": self.attempt, "at_s": self.world.clock.wall_s, **fields}
        )
        self.records.append(RecordReceived(at_s=self.world.clock.wall_s, record=record))

    # -- commands, and the end ----------------------------------------------------------------------------------------

    def obey(self, command: Command) -> None:
        """At the next step boundary, which is now."""
        if not self.training or self.leaving or self.plan.replay is not None:
            return
        self.look()
        match command:
            case ApplyPlan(update=update):
                self.plan = ResumePlan.model_validate({**self.plan.model_dump(), **update.model_dump()})
                self.write(PlanAppliedRecord, step=self.step, position=self.position, command=command.id)
            case EvaluateNow():
                self.world.clock.after(_EVALUATION_S, lambda: self._evaluated(command.id))
            case CheckpointNow():
                if self.parent_step() < self.step:
                    self._save(self.step, self.position, self.world.clock.now_s + self.world.profile.disk_s)
            case _:
                pass  # Leave comes by way of `stop`

    def _evaluated(self, command: int) -> None:
        if not self.training or self.leaving:
            return
        self.look()
        loss = HEALTHY_LOSS + (1.5 if self.world.diseases.is_real() else 0.0)
        self.write(EvalRecord, step=self.step, loss=loss, perplexity=1.0, seconds=_EVALUATION_S, command=command)
        self.world.supervise()

    def stop(self, how: Literal["save", "leave", "kill"], grace_s: float) -> None:
        """As a process is stopped: what does not listen is killed after the grace."""
        clock, profile = self.world.clock, self.world.profile
        if how == "kill":
            clock.after(1.0, lambda: self.end("hang" if self.hung_since_s is not None else "killed"))
        elif not self.training:
            clock.after(grace_s if self.hung_since_s is not None else 0.0, lambda: self.end("left"))
        elif how == "leave" or self.plan.replay is not None:
            self.look()
            self.leaving = True
            clock.after(profile.step_s, lambda: self.end("left"))
        else:
            self.look()
            self.leaving = True
            if self.parent_step() < self.step:
                self._save(self.step, self.position, clock.now_s)
            clock.after(profile.stall_s + profile.disk_s, lambda: self.end("preempted"))

    def hang(self) -> None:
        """It stands still from now on."""
        self.look()
        self.hung_since_s = self.world.clock.now_s

    def end(self, cause: str, *, arena_lost: bool = False) -> None:
        """It is dead. A snapshot that is complete still reaches the disk, unless the machine's memory is gone too."""
        if not self.alive:
            return
        if not self.leaving:
            self.look()
        clock, profile = self.world.clock, self.world.profile
        self.settled_at_s = clock.now_s
        if self.training:
            self.world.trained_at_s = clock.now_s
        if self.training and not arena_lost and not self.leaving and self.plan.replay is None:
            self._settle_snapshot()
        if self.hung_since_s is not None:
            self.world.account.hung_s += clock.now_s - self.hung_since_s
        self.world.account.stalled_s += self.stalls * profile.stall_s
        self.alive, self.cause = False, cause
        clock.at(self.settled_at_s, self.world.supervise)

    def _settle_snapshot(self) -> None:
        profile, now_s = self.world.profile, self.world.clock.now_s
        period = self.interval * profile.step_s + profile.stall_s
        number = self.saved + 1
        complete_s = self.origin_s + number * period
        step = self.origin_step + number * self.interval
        if complete_s > now_s or step > self.step:
            return
        position = self.world.position_after(self.attempt, step)
        self.settled_at_s = complete_s + profile.disk_s
        self.stalls += 1
        save = self._made(step, position, self.settled_at_s)
        self.world.saves[save.commit] = save
        record = RecordReceived(at_s=self.world.clock.wall_s, record=self.world.keeper.record(save, "disk"))
        self.records.append(record)
        self.world.keeper.take(save)
