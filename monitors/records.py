"""Records: what the trainer says of itself, one JSON object per event, versioned, numbered per sender.

Step N is the Nth update. Data positions are global and raw: `[begin, end)` of consecutive records tile. A record
*survives* if no later attempt (replays aside) loaded a checkpoint below its step. Non-finite values travel as the
strings "NaN", "Infinity" and "-Infinity", since JSON has no others. Norms are L2, losses nats a token, times seconds.
"""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

LAYER_GROUPS = ("embed", "early", "mid", "late", "head")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    version: Literal[1] = 1
    seq: int = Field(ge=1, description="rises by one per record of a sender (attempt and rank)")
    attempt: int = Field(ge=1)
    at_s: float = Field(description="unix time; for people, never for decisions about order")


class DataRange(BaseModel):
    """Raw positions [begin, end) that a step consumed or passed over."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    begin: int
    end: int


class StepTime(BaseModel):
    """Where a step's seconds went."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: float
    compute: float
    other: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.data + self.compute + self.other


SkipReason = Literal["non_finite", "norm"]


class Prevention(BaseModel):
    """Which rungs of the prevention ladder acted on an update, and how far they went."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clip_factor: float | None = Field(default=None, description="of the gradient; None: not clipped, or not applied")
    clipped_by: Literal["clip_norm", "adaptive_clip"] | None = Field(default=None, description="the lower limit")
    skipped: SkipReason | None = Field(default=None, description="norm: finite, but far above its band")
    gave_in: bool = Field(default=False, description="too many were skipped: applied, and the band starts anew")
    norm_limit: float | None = Field(default=None, description="top of the band that the norm is above of")


class StepRecord(_Record):
    """One update. `grad_norm` is taken before clipping; `skipped` means not applied, `prevention` says why.

    Our trainer records every field; what a recorded trace of another lacks is None, never 0.
    """

    kind: Literal["step"] = "step"
    step: int
    loss: float
    grad_norm: float | None = Field(default=None, description="None: not recorded")
    clipped: bool = False
    lr: float | None = None
    lr_planned: float | None = Field(default=None, description="schedule times overlay; `lr` is what was applied")
    update_ratio: dict[str, float] = Field(default_factory=dict, description="layer group -> |dw| / |w|")
    tokens: int | None = None
    step_time_s: StepTime | None = None
    data: DataRange | None = None
    shards: dict[int, tuple[int, float]] = Field(
        default_factory=dict, description="shard -> (sequences, sum of their mean losses)"
    )
    worst: tuple[int, float] | None = Field(default=None, description="(raw position, loss) of the worst sequence")
    skipped: bool = False
    prevention: Prevention | None = Field(default=None, description="None: no rung acted, or not recorded")
    scaler: float | None = Field(default=None, description="fp16 loss scale")
    replay: bool = False
    grad_norms: dict[str, float] | None = Field(default=None, description="on a schedule, per layer group")
    attention_logit_max: dict[str, float] | None = Field(default=None, description="on a schedule")
    log_z: float | None = Field(default=None, description="on a schedule: mean log partition of the output")
    second_moment_ratio: dict[str, float] | None = Field(default=None, description="RMS of g^2/v, on a schedule")

    @property
    def skip_reason(self) -> SkipReason | None:
        """Why the update was not applied, None if it was. A record that does not say so knows of one reason only."""
        if not self.skipped:
            return None
        return (self.prevention and self.prevention.skipped) or "non_finite"

    @property
    def is_ordinary(self) -> bool:
        """Whether nothing of it needs anybody at once: applied, finite."""
        return not self.skipped and math.isfinite(self.loss) and math.isfinite(self.grad_norm or 0.0)


class PhaseRecord(_Record):
    """The main loop has entered a phase."""

    kind: Literal["phase"] = "phase"
    phase: str
    step: int


class EvalRecord(_Record):
    """Validation on the same held-out samples each time; `command` is the id of the EvaluateNow it answers."""

    kind: Literal["eval"] = "eval"
    step: int
    loss: float
    perplexity: float
    seconds: float
    command: int | None = None
    metrics: dict[str, float] = Field(default_factory=dict, description="what the downstream hook returned")


class ActivationStats(BaseModel):
    """Statistics of one layer group's block outputs; dead and saturated are fractions of MLP units."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    rms: float
    max: float
    dead: float
    saturated: float


class ActivationRecord(_Record):
    """Activation statistics per layer group, on a schedule and in capture mode."""

    kind: Literal["activation"] = "activation"
    step: int
    groups: dict[str, ActivationStats]


class SnapshotRecord(_Record):
    """The state of `step` was copied to host memory; `stall_s` is how long the loop stood still."""

    kind: Literal["snapshot"] = "snapshot"
    step: int
    stall_s: float
    bytes: int
    late_steps: int = Field(default=0, description="steps after it was due: the disk was slower than the interval")
    next_steps: int | None = Field(default=None, description="an automatic interval: steps until the next one is due")
    because: str = ""


class CommitRecord(_Record):
    """A checkpoint's manifest exists: on the node's own disk first, later in the store."""

    kind: Literal["commit"] = "commit"
    tier: Literal["disk", "store"] = "store"
    step: int
    commit: str
    position: int = Field(description="raw cursor: the first position not yet consumed")
    tokens: int
    bytes: int
    seconds: float


class CommitFailedRecord(_Record):
    """A save did not come to its end; training goes on. `gone`: it will not be tried again, and is nowhere."""

    kind: Literal["commit_failed"] = "commit_failed"
    step: int
    error: str
    commit: str | None = Field(default=None, description="None: no snapshot was taken")
    gone: bool = False
    superseded: bool = Field(default=False, description="the store has gone on without this commit's epoch")


class PlanAppliedRecord(_Record):
    """A plan update is in force from the update after `step`."""

    kind: Literal["plan_applied"] = "plan_applied"
    step: int
    position: int
    command: int


class Condemned(BaseModel):
    """A candidate checkpoint that failed its verification on load."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    commit: str
    why: str


class StartedRecord(_Record):
    """The state is loaded (or initialised) and the first step comes next."""

    kind: Literal["started"] = "started"
    step: int
    position: int
    tokens: int
    loaded: str | None = Field(description="commit id, None for a fresh start")
    condemned: tuple[Condemned, ...] = ()
    precision: str
    device: str
    parameters: int
    vocab_size: int
    batch_samples: int
    sample_tokens: int
    total_steps: int
    total_samples: int = Field(description="samples in one epoch")
    shards: tuple[str, ...] = Field(description="names, by shard index")
    shard_samples: tuple[int, ...] = ()
    peak_lr: float
    warmup_steps: int
    probe_loss: float | None = Field(default=None, description="loss of the probe batch right after the load")
    probe_expected: float | None = Field(default=None, description="the same, as the manifest recorded it")
    fresh_guards: tuple[str, ...] = Field(
        default=(), description="rungs whose window starts anew, because the checkpoint holds none that fits"
    )
    replay: bool = False


class FinishedRecord(_Record):
    """The attempt leaves by itself."""

    kind: Literal["finished"] = "finished"
    step: int
    reason: Literal["finished", "preempted", "left", "replay_done", "orphaned"]


class ErrorRecord(_Record):
    """The attempt leaves because of an exception. `frames` are the top frames, normalised (file:function)."""

    kind: Literal["error"] = "error"
    step: int
    where: str
    type: str
    message: str
    frames: tuple[str, ...] = ()
    traceback: str = ""


class FaultRecord(_Record):
    """An injected fault fired (tests and drills only)."""

    kind: Literal["fault"] = "fault"
    step: int
    fault: str
    count: int


Record = Annotated[
    StepRecord
    | PhaseRecord
    | EvalRecord
    | ActivationRecord
    | SnapshotRecord
    | CommitRecord
    | CommitFailedRecord
    | PlanAppliedRecord
    | StartedRecord
    | FinishedRecord
    | ErrorRecord
    | FaultRecord,
    Field(discriminator="kind"),
]
_RECORDS: TypeAdapter[Record] = TypeAdapter(Record)


def parse_record(line: bytes | str) -> Record:
    """Parse one JSON line.

    Raises:
        pydantic.ValidationError: it is not a record of this version.
    """
    return _RECORDS.validate_json(line)
