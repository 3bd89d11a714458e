"""Where the loop meets the injected faults: two moments, each a method. With no faults configured all do nothing.

A fault is counted first, recorded second and takes effect last, so that one that kills the process leaves both.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from monitors.records import FaultRecord
from trainer.contract.config import FaultKind
from trainer.faults import effects, process
from trainer.faults.death import die
from trainer.faults.injector import Fired, Injector, Occasion
from trainer.model import GPT
from trainer.reporter import Reporter
from trainer.step import TrainStep

_AT_LOAD: tuple[FaultKind, ...] = ("drop_optimizer_state",)
_AT_STEP: tuple[FaultKind, ...] = (
    "slow", "sigkill", "hang", "oom", "bad_shard", "lr_bomb", "lr_override", "zero_layer", "saturate_layer",
    "scale_qk", "loss_drift", "bit_flip", "nan_loss", "nan_grad", "grad_bomb", "leak_targets",
)  # fmt: skip


@dataclass(slots=True)
class StepInput:
    """What a step is about to be given; faults change it."""

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    shards: NDArray[np.int64]
    planned_factor: float = 1.0
    applied_factor: float = 1.0


class FaultDesk:
    """Carries out what the injector says is due."""

    def __init__(self, injector: Injector, reporter: Reporter, attempt: int, vocab_size: int) -> None:
        self._injector = injector
        self._reporter = reporter
        self._attempt = attempt
        self._vocab_size = vocab_size
        self._step: TrainStep | None = None
        self._leak: effects.TargetLeak | None = None
        self._flips: list[effects.ActivationFlip] = []

    def attach(self, step: TrainStep) -> None:
        """Take hold of the numerical core, once it is built."""
        self._step = step
        if self._injector.configured("leak_targets"):
            self._leak = effects.TargetLeak(step.model)
        flips = [f for f in self._injector.of("bit_flip") if f.target == "activation"]
        self._flips = [effects.ActivationFlip(step.model, fault) for fault in flips]

    def after_load(self, step: int) -> None:
        """The state of `step` has been loaded."""
        for fired in self._due(Occasion(self._attempt, step), _AT_LOAD):
            self._say(fired, step)
            effects.drop_moments(self._core.optimizer)

    def before_step(self, step: int, begin: int, end: int, given: StepInput) -> StepInput:
        """Update number `step` is about to happen on raw positions [begin, end)."""
        self._clear()
        if given.positions.size:  # what is read, not what is passed over: a skipped range touches nobody
            begin, end = int(given.positions.min()), int(given.positions.max()) + 1
        occasion = Occasion(self._attempt, step, begin, end, frozenset(int(s) for s in np.unique(given.shards)))
        for fired in self._due(occasion, _AT_STEP):
            self._say(fired, step)
            given = self._apply(fired, step, given)
        return given

    @property
    def _core(self) -> TrainStep:
        assert self._step is not None, "attach comes before the first load"
        return self._step

    def _due(self, occasion: Occasion, kinds: tuple[FaultKind, ...]) -> list[Fired]:
        return self._injector.due(occasion, kinds)

    def _say(self, fired: Fired, step: int) -> None:
        self._reporter.emit(FaultRecord, step=step, fault=fired.fault.kind, count=fired.count)

    def _clear(self) -> None:
        """Faults of one step end with it."""
        core = self._core
        core.transform_losses = None
        core.after_backward = None
        for flip in self._flips:
            flip.armed = False
        if self._leak is not None:
            self._leak.odds = 1.0

    def _apply(self, fired: Fired, step: int, given: StepInput) -> StepInput:
        fault, model = fired.fault, self._core.model
        match fault.kind:
            case "slow":
                process.dawdle(fault)
            case "sigkill":
                die()
            case "hang":
                process.hang(fault)
            case "oom":
                process.exhaust_memory(next(model.parameters()).device)
            case "bad_shard":
                tokens = effects.garble(fault, given.tokens, given.positions, given.shards, self._vocab_size)
                return replace(given, tokens=tokens)
            case "lr_bomb":
                return replace(given, planned_factor=given.planned_factor * fault.factor)
            case "lr_override":
                return replace(given, applied_factor=given.applied_factor * fault.factor)
            case _:
                self._disturb(fired, step)
        return given

    def _disturb(self, fired: Fired, step: int) -> None:
        """Faults of the arithmetic."""
        fault, core = fired.fault, self._core
        match fault.kind:
            case "zero_layer" | "saturate_layer" | "scale_qk" as kind:
                _WEIGHTS[kind](core.model, fault)
            case "loss_drift":
                effects.drift(core.model, fault, step, fired.count)
            case "bit_flip" if fault.target == "weight":
                effects.flip_weight_bit(core.model, fault)
            case "bit_flip" if fault.target == "activation":
                for flip in self._flips:
                    flip.armed |= flip.fault == fault
            case "bit_flip" | "nan_grad" | "grad_bomb" as kind:
                core.after_backward = _then(core.after_backward, lambda m: _GRADIENTS[kind](m, fault))
            case "nan_loss":
                core.transform_losses = effects.poison_losses
            case "leak_targets":
                assert self._leak is not None, "attach has seen that it is configured"
                self._leak.odds = fault.factor


_WEIGHTS = {
    "zero_layer": effects.zero_layer, "saturate_layer": effects.saturate_layer, "scale_qk": effects.scale_qk,
}  # fmt: skip
_GRADIENTS = {
    "bit_flip": effects.flip_gradient_bit, "nan_grad": effects.poison_gradient, "grad_bomb": effects.reverse_gradients,
}  # fmt: skip


def _then(first: Callable[[GPT], None] | None, second: Callable[[GPT], None]) -> Callable[[GPT], None]:
    def both(model: GPT) -> None:
        if first is not None:
            first(model)
        second(model)

    return both
