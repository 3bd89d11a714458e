"""The resume plan: everything a trainer attempt is told before it starts, and plan updates while it runs.

The plan alone is authoritative (DESIGN 8.4): a checkpoint's own copy of skips and overlays is only compared.
Positions count samples in the raw data order, epochs concatenated; ranges are half-open.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Contract(BaseModel):
    """Base of everything that crosses a process boundary: frozen, unknown keys are errors, NaN travels as text."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class SkipRange(Contract):
    """Raw positions [begin, end) that are not read where they lie; `defer` reads them after the plan's end."""

    begin: int = Field(ge=0)
    end: int = Field(ge=0)
    then: Literal["defer", "drop"] = "defer"
    incident: int | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.end <= self.begin:
            raise ValueError(f"a skip range needs begin < end, got [{self.begin}, {self.end})")
        return self


class Quarantine(Contract):
    """A shard none of whose samples is read at raw positions >= from_position."""

    shard: int = Field(ge=0, description="index of the shard in the data manifest")
    from_position: int = Field(ge=0)
    incident: int | None = None


class Overlay(Contract):
    """A factor on the schedule: `factor` until `hold_until_step`, then linearly back to 1 in `ramp_steps`.

    Applies to updates with `from_step <= step` (step N is the Nth update). `keep` never ramps back.
    """

    from_step: int = Field(ge=0)
    factor: float = Field(gt=0, le=1)
    hold_until_step: int = Field(ge=0)
    ramp_steps: int = Field(default=0, ge=0)
    keep: bool = False
    incident: int | None = None

    def at(self, step: int) -> float:
        """The factor for the update that is number `step` (1-based)."""
        if step < self.from_step:
            return 1.0
        if self.keep or step <= self.hold_until_step:
            return self.factor
        done = (step - self.hold_until_step) / self.ramp_steps if self.ramp_steps else 1.0
        return 1.0 if done >= 1.0 else self.factor + (1.0 - self.factor) * done


def overlay_factor(overlays: tuple[Overlay, ...], step: int) -> float:
    """Of several overlays the smallest applies (DESIGN 8.3)."""
    return min((overlay.at(step) for overlay in overlays), default=1.0)


class Share(Contract):
    """A source of a blend: one of `weight` parts of what is read."""

    source: str
    weight: float = Field(gt=0, allow_inf_nan=False)


class OrderSpec(Contract):
    """What fixes the raw order: the first `num_shards` of the run's shards, how they are blended, seed and length."""

    manifest: str = Field(description="digest of these shards")
    num_shards: int = Field(gt=0)
    mix: tuple[Share, ...] = Field(min_length=1)
    seed: int
    sample_tokens: int = Field(gt=0)


class Segment(OrderSpec):
    """From this raw position on the order is this one."""

    from_position: int = Field(ge=0)

    @property
    def spec(self) -> OrderSpec:
        """What it fixes, wherever it begins."""
        return OrderSpec(**{name: getattr(self, name) for name in OrderSpec.model_fields})


class ReplaySpec(Contract):
    """A diagnosis replay: run from the loaded checkpoint to `to_step`, commit nothing, leave with REPLAY_DONE."""

    to_step: int = Field(gt=0)
    capture: bool = Field(default=False, description="activation statistics and norms at every step")


class ResumePlan(Contract):
    """What one attempt does: where it starts, what it may not read, and by which factor the LR is lowered."""

    version: Literal[1] = 1
    run_id: str
    attempt: int = Field(ge=1)
    epoch: int = Field(ge=0, description="fence epoch under which this attempt commits")
    candidates: tuple[str, ...] = Field(
        default=(),
        description="commit ids, best first; the first that verifies is loaded. Empty: fresh start",
    )
    fresh: bool = Field(default=False, description="may start from initial weights; refused if candidates exist")
    branch: int = Field(default=0, ge=0, description="folded into the RNG after a training rollback; 0 is exact")
    reanchor: bool = Field(
        default=False,
        description="quarantines and overlays that begin later are moved to the loaded checkpoint",
    )
    segments: tuple[Segment, ...] = ()
    skips: tuple[SkipRange, ...] = ()
    deferred_from: int | None = Field(
        default=None, description="raw position from which deferred samples are read; fixed by the first skip"
    )
    quarantines: tuple[Quarantine, ...] = ()
    overlays: tuple[Overlay, ...] = ()
    replay: ReplaySpec | None = None
    failure_every_s: float = Field(
        default=86_400.0, gt=0, description="mean time between failures, for an automatic checkpoint interval"
    )
    incident: int | None = None
    because: str = ""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.fresh == bool(self.candidates):
            raise ValueError("a plan either starts fresh or names candidate checkpoints, never both or neither")
        return self

    def anchored(self, step: int, position: int) -> "ResumePlan":
        """This plan with later quarantines and overlays moved to the loaded (step, raw position)."""
        if not self.reanchor:
            return self
        quarantines = tuple(
            q.model_copy(update={"from_position": min(q.from_position, position)}) for q in self.quarantines
        )
        overlays = tuple(o.model_copy(update={"from_step": min(o.from_step, step + 1)}) for o in self.overlays)
        return self.model_copy(update={"quarantines": quarantines, "overlays": overlays})


class PlanUpdate(Contract):
    """What a running attempt applies at its next step boundary; each list replaces the plan's."""

    skips: tuple[SkipRange, ...] = ()
    quarantines: tuple[Quarantine, ...] = ()
    overlays: tuple[Overlay, ...] = ()


def read_plan(path: Path) -> ResumePlan:
    """Read a plan file.

    Raises:
        OSError: the file cannot be read.
        pydantic.ValidationError: it is not a valid plan.
    """
    return ResumePlan.model_validate_json(path.read_bytes())
