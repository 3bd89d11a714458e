"""What happened, in the past tense: the only input of the policy engine. Every event is journaled before it is folded.

`at_s` is unix time and is made monotonic by the engine; no decision about order rests on it.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from monitors.records import CommitRecord, Record
from monitors.taxonomy import Finding
from trainer.contract.plan import OrderSpec


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    at_s: float


class Moved(BaseModel):
    """The run was begun on a machine that is not asked any more: what it claimed, and what it left in the store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    claimed_epoch: int
    commits: tuple[str, ...]


class RunOpened(_Event):
    """A supervisor took the run: first launch, or again after its own end. `adopted` names a living attempt.

    `order` is the order of the data that the configuration asks for, None where nothing has looked at the data.
    """

    kind: Literal["run_opened"] = "run_opened"
    run_id: str
    config_digest: str
    policy_digest: str
    code_version: str
    adopted: int | None = None
    fresh: bool = False
    order: OrderSpec | None = None
    moved: Moved | None = None


class RecordReceived(_Event):
    """A record of an attempt, in the order of its `seq`, each exactly once."""

    kind: Literal["record_received"] = "record_received"
    record: Record


class StepsPassed(_Event):
    """Updates that differ in their place alone, with what was saved meanwhile: to the policy the same as their records.

    A simulation feeds it in place of many step records; the detectors do not see it, their findings are events too.
    `step`, `end` and `lr` are those of the last update, `samples`, `tokens` and `step_s` those of each.
    """

    kind: Literal["steps_passed"] = "steps_passed"
    attempt: int
    first_step: int
    step: int
    end: int
    samples: int
    tokens: int
    step_s: float
    loss: float
    grad_norm: float
    lr: float
    skipped: bool = Field(default=False, description="the updates were not finite, and not applied")
    replay: bool = False
    saves: tuple[CommitRecord, ...] = Field(default=(), description="in order; each counts right after its own step")
    thinned: bool = Field(default=False, description="others were made and pruned meanwhile: none of them was overdue")


class FindingMade(_Event):
    """The detectors have found something in records that are not journaled: what a simulation feeds."""

    kind: Literal["finding_made"] = "finding_made"
    attempt: int
    finding: Finding


class AttemptSpawned(_Event):
    """The process exists and may run."""

    kind: Literal["attempt_spawned"] = "attempt_spawned"
    attempt: int
    pid: int


class AttemptExited(_Event):
    """The process is verified dead. `cause` is a row of the table in `orchestrator.process.causes`."""

    kind: Literal["attempt_exited"] = "attempt_exited"
    attempt: int
    cause: str
    code: int | None = None
    signum: int | None = None
    detail: str = ""
    frames: tuple[str, ...] = ()


class HangSuspected(_Event):
    """A phase has passed its deadline once: evidence is captured, nothing is killed yet."""

    kind: Literal["hang_suspected"] = "hang_suspected"
    attempt: int
    phase: str
    step: int
    silent_s: float


class HangConfirmed(_Event):
    """A phase has passed twice its deadline and no second witness speaks for it."""

    kind: Literal["hang_confirmed"] = "hang_confirmed"
    attempt: int
    phase: str
    step: int
    silent_s: float


class StopRequested(_Event):
    """Somebody wants the run to stop: the operator, or the machine (SIGTERM)."""

    kind: Literal["stop_requested"] = "stop_requested"
    by: Literal["operator", "preemption"]
    save: bool = True


class ResumeRequested(_Event):
    """A person takes a halted run up again."""

    kind: Literal["resume_requested"] = "resume_requested"
    because: str


class CheckpointRequested(_Event):
    """The operator wants a checkpoint now."""

    kind: Literal["checkpoint_requested"] = "checkpoint_requested"


class CheckpointsPruned(_Event):
    """A person had these commits deleted while no supervisor ran; journaled before the first of them goes."""

    kind: Literal["checkpoints_pruned"] = "checkpoints_pruned"
    commits: tuple[str, ...]


class Ticked(_Event):
    """Time has passed; deadlines are looked at."""

    kind: Literal["ticked"] = "ticked"


Event = Annotated[
    RunOpened
    | RecordReceived
    | StepsPassed
    | FindingMade
    | AttemptSpawned
    | AttemptExited
    | HangSuspected
    | HangConfirmed
    | StopRequested
    | ResumeRequested
    | CheckpointRequested
    | CheckpointsPruned
    | Ticked,
    Field(discriminator="kind"),
]
EVENTS: TypeAdapter[Event] = TypeAdapter(Event)
