"""Training incidents as the detectors tell of them, with what they are due to and how they take to treatment.

A disease breaks out at a step, is reported by findings, is treated by what the policy decides, and then is cured with
some probability or relapses some steps later; a few never heal and must end with the policy asking a person, who mends
them. Between outbreaks the run is healthy. One disease at a time: two would blur which of them a recovery was for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from monitors.taxonomy import Finding, FindingKind, IncidentClass
from orchestrator.policy.events import FindingMade

if TYPE_CHECKING:
    from tests.simulation.trainer import Trainer
    from tests.simulation.world import World

Cause = Literal["hardware", "data", "data_and_state", "state", "optimisation", "inconclusive"]
Row = tuple[int, int, float, bool]
_CAUSES: tuple[Cause, ...] = ("hardware", "data", "data_and_state", "state", "optimisation", "inconclusive")
_NEVER_HEALS = 0.05
_NAN_STEPS = 3
_NOTICES = (
    IncidentClass.THROUGHPUT_DROP, IncidentClass.UPDATE_RATIO_HIGH, IncidentClass.UPDATE_RATIO_LOW,
    IncidentClass.VALIDATION_DIVERGENCE, IncidentClass.ACTIVATION_VANISHING, IncidentClass.ACTIVATION_EXPLOSION,
    IncidentClass.REPEATED_SPIKES_BY_STATE, IncidentClass.LEVEL_SHIFT, IncidentClass.LOSS_IMPLAUSIBLY_LOW,
)  # fmt: skip
_WEIGHTS: dict[IncidentClass, float] = {
    IncidentClass.TRANSIENT_SPIKE: 6, IncidentClass.UNRECOVERED_SPIKE: 3, IncidentClass.SLOW_DIVERGENCE: 2,
    IncidentClass.SUDDEN_NAN: 2, IncidentClass.NAN_AFTER_LOAD: 1, IncidentClass.REPEATED_SPIKES_BY_SHARDS: 1,
    IncidentClass.PLATEAU_THEN_NAN: 0.2, IncidentClass.IMMEDIATE_NAN: 0.1, IncidentClass.LR_MISMATCH: 0.3,
    IncidentClass.LOSS_DISCONTINUITY: 0.3, IncidentClass.INITIAL_LOSS_OFF: 0.1,
    **dict.fromkeys(_NOTICES, 0.4),
}  # fmt: skip


_RESTARTED = (IncidentClass.LR_MISMATCH, IncidentClass.LOSS_DISCONTINUITY)


@dataclass(slots=True)
class Disease:
    """One course of it, through all its outbreaks."""

    cls: IncidentClass
    cause: Cause
    heals: float
    real: bool
    key: int = 0
    onset: int = 0
    outbreaks: int = 0
    treated: bool = False
    suspected: bool = False
    told: bool = False


@dataclass(slots=True)
class Diseases:
    """What ails the run."""

    world: World
    now: Disease | None = None
    had: dict[IncidentClass, int] = field(default_factory=dict)
    _key: int = 0

    def is_real(self) -> bool:
        """Whether an evaluation of this moment would show it."""
        return self.now is not None and self.now.real

    def strike(self) -> None:
        """A new one, of a class and a cause that chance chooses."""
        trainer = self.world.trainer
        if self.now is not None or trainer is None or not trainer.training or trainer.plan.replay is not None:
            return
        rng = self.world.rng
        cls = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        heals = 0.0 if rng.random() < _NEVER_HEALS else rng.choice((0.4, 0.7, 1.0))
        self.now = Disease(cls, rng.choice(_CAUSES), heals, real=rng.random() < 0.8)
        self._break_out(self.now, trainer)

    def on_loaded(self, trainer: Trainer) -> None:
        """A new attempt: the disease is healed by what was done, or will be back."""
        one = self.now
        if one is None or trainer.plan.replay is not None:
            return
        rng = self.world.rng
        one.treated = one.told and (trainer.plan.reanchor or one.cls in _RESTARTED)
        if one.treated and rng.random() < one.heals:
            self.now = None
            return
        if one.cls in _NOTICES or one.cls is IncidentClass.TRANSIENT_SPIKE:
            self.now = None
            return
        if not one.treated and rng.random() < 0.3:
            self.now = None  # it was chance, and the run is another one since
            return
        back = rng.randint(5, 8) if one.cls is IncidentClass.NAN_AFTER_LOAD else rng.randint(20, 1500)
        onset = trainer.step + back if one.cls is IncidentClass.NAN_AFTER_LOAD else max(one.onset, trainer.step) + back
        self._at_step(trainer, onset, lambda: self._break_out(one, trainer))

    def mended(self) -> None:
        """A person has seen to it."""
        self.now = None

    # -- outbreaks ----------------------------------------------------------------------------------------------------

    def _break_out(self, one: Disease, trainer: Trainer) -> None:
        trainer.look()
        if trainer.step + 400 > trainer.last_step:
            self.now = None
            return
        self._key += 1
        one.key, one.onset, one.treated, one.told = self._key, trainer.step + 1, False, False
        one.suspected = False
        one.outbreaks += 1
        self.had[one.cls] = self.had.get(one.cls, 0) + 1
        self.world.note_fault("disease", str(one.cls))
        match one.cls:
            case IncidentClass.TRANSIENT_SPIKE | IncidentClass.UNRECOVERED_SPIKE | IncidentClass.SLOW_DIVERGENCE:
                self._spike(one, trainer)
            case IncidentClass.SUDDEN_NAN | IncidentClass.PLATEAU_THEN_NAN | IncidentClass.IMMEDIATE_NAN:
                self._nan(one, trainer)
            case IncidentClass.NAN_AFTER_LOAD if one.outbreaks == 1:
                trainer.end("killed")  # so that there is a load after which it can be not finite
            case IncidentClass.NAN_AFTER_LOAD:
                self._nan(one, trainer)
            case _:
                self._report(one, trainer, "classified")
                if one.cls in _NOTICES:
                    self._at_step(trainer, one.onset + 60, lambda: self._over(one, trainer))
                elif one.cls is IncidentClass.REPEATED_SPIKES_BY_SHARDS:
                    self.now = None

    def _spike(self, one: Disease, trainer: Trainer) -> None:
        trainer.bad_from = one.onset if one.real and one.cls is not IncidentClass.TRANSIENT_SPIKE else None
        self._at_step(trainer, one.onset + 1, lambda: self._report(one, trainer, "suspected"))
        if one.cls is IncidentClass.TRANSIENT_SPIKE:
            self._at_step(trainer, one.onset + 30, lambda: self._over(one, trainer))
        else:
            self._at_step(trainer, one.onset + 50, lambda: self._settled(one, trainer))

    def _settled(self, one: Disease, trainer: Trainer) -> None:
        self._report(one, trainer, "classified")
        if one.cls is IncidentClass.SLOW_DIVERGENCE and trainer.training and not trainer.leaving:
            healed = self.world.rng.random() < one.heals
            then = self._over if healed else self._worse
            self._at_step(trainer, one.onset + 400, lambda: then(one, trainer))
        elif not one.real:
            self._at_step(trainer, one.onset + 200, lambda: self._over(one, trainer))

    def _worse(self, one: Disease, trainer: Trainer) -> None:
        """The lowered LR has not helped: the climb is found anew."""
        self._report(one, trainer, "closed", end_step=trainer.step)
        self._break_out(one, trainer)

    def _nan(self, one: Disease, trainer: Trainer) -> None:
        trainer.blow_up(_NAN_STEPS)
        self._report(one, trainer, "classified")

    def _over(self, one: Disease, trainer: Trainer) -> None:
        trainer.bad_from = None
        self._report(one, trainer, "closed", end_step=trainer.step)
        if self.now is one:
            self.now = None

    def _report(self, one: Disease, trainer: Trainer, kind: FindingKind, end_step: int | None = None) -> None:
        trainer.look()
        shards: tuple[int, ...] = ()
        if one.cls is IncidentClass.REPEATED_SPIKES_BY_SHARDS:
            shards = (self.world.rng.randrange(self.world.profile.layout.num_shards),)
        one.suspected = True
        one.told = one.told or kind == "classified"
        found = Finding(
            kind, one.key, one.cls, one.onset, max(trainer.step, one.onset), "simulated", end_step, {}, shards
        )
        event = FindingMade(at_s=self.world.clock.wall_s, attempt=trainer.attempt, finding=found)
        trainer.records.append(event)
        self.world.supervise()

    def _at_step(self, trainer: Trainer, step: int, call: Callable[[], None]) -> None:
        """When that attempt has done that update; never, if it does not live to do it."""

        def due() -> None:
            if not trainer.training or trainer.leaving or self.world.trainer is not trainer:
                return
            trainer.look()
            if trainer.step < step:
                self._at_step(trainer, step, call)
            else:
                call()

        self.world.clock.at(max(trainer.time_of(step), self.world.clock.now_s + 0.01), due)

    # -- replays ------------------------------------------------------------------------------------------------------

    def replayed(self, trainer: Trainer) -> Iterator[Row]:
        """Rows (first, last, loss, skipped) of a replay: healthy up to the onset, then as its cause has it."""
        one, first, last = self.now, trainer.step + 1, trainer.last_step
        onset = one.onset if one is not None else last + 1
        if onset > first:
            yield first, min(onset - 1, last), 2.0, False
        if onset <= last:
            bad = one is not None and self._goes_wrong(one, trainer)
            yield max(onset, first), last, float("nan") if bad else 2.0, bad

    def _goes_wrong(self, one: Disease, trainer: Trainer) -> bool:
        plan, known = trainer.plan, self.world.plan_before_replay
        extra = [skip for skip in plan.skips if skip not in known.skips]
        lowered = len(plan.overlays) > len(known.overlays)
        position = self.world.position_at_onset(one.onset)
        without_suspect = any(skip.begin <= position < skip.end for skip in extra)
        match one.cause:
            case "hardware":
                return False
            case "data":
                return not without_suspect
            case "data_and_state":
                return not extra
            case "state":
                return True
            case "optimisation":
                return not lowered
            case _:
                return self.world.rng.random() < 0.5
