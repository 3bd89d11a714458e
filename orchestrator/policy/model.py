"""The policy grammar: what a policy.yaml may say. Closed: every key, action and class is listed here and nowhere else.

Durations are written `30s`, `5m`, `6h`, `2d` and kept in seconds; amounts of data `300 batches`. Rules are tried in
order and the first match wins; a class that no rule of the file matches falls to the shipped policy's rule for it.
"""

import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from monitors.settings import DetectSettings
from monitors.taxonomy import IncidentClass
from trainer.contract.durations import DurationS
from trainer.contract.liveness import Phase


def _batches(value: object) -> object:
    match = re.fullmatch(r"\s*(\d+)\s+batch(?:es)?\s*", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("an amount of data is a number of batches: 300 batches")
    return int(match[1])


Batches = Annotated[int, BeforeValidator(_batches, json_schema_input_type=str), Field(ge=1)]


class Section(BaseModel):
    """Base of every part of the grammar: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NoArguments(Section):
    """An action that takes no arguments is written `{name: {}}` or just `name` in a `do` list."""


class NotifyArguments(Section):
    """info is written down, warning is shown, page wakes somebody: only when automation gives up."""

    level: Literal["info", "warning", "page"] = "warning"


class LowerLr(Section):
    """The schedule times `factor` for `hold_steps` counted from the detection, then back to 1 in `ramp_steps`."""

    factor: float = Field(gt=0, lt=1)
    hold_steps: int = Field(default=500, ge=0)
    ramp_steps: int = Field(default=1000, ge=0)
    keep: bool = Field(default=False, description="never ramp back")
    min_factor: float = Field(default=0.05, gt=0, le=1, description="escalation multiplies, never below this")


class Diagnose(Section):
    """Replay the bad stretch from the last good checkpoint, up to four times, within a budget of steps."""

    max_steps: int = Field(
        default=8000, ge=2, le=1_000_000, description="of all replays together; what does not fit is inconclusive"
    )
    lr_factor: float = Field(default=0.01, gt=0, lt=1, description="of the replay with a lowered LR: an experiment")


class RollBack(Section):
    """Back to the newest good checkpoint at or before the onset minus `margin_steps`."""

    margin_steps: int = Field(default=100, ge=0)


def _by_replay(value: object) -> object:
    return {} if value == "replay" else value


ByReplay = Annotated[Diagnose, BeforeValidator(_by_replay, json_schema_input_type=Diagnose | Literal["replay"])]

ActionName = Literal[
    "record", "notify", "capture", "evaluate", "diagnose", "checkpoint", "lower_lr", "roll_back", "skip_data",
    "quarantine_shards", "reseed", "restart", "widen_rollback", "halt",
]  # fmt: skip
_BARE = frozenset(get_args(ActionName)) - {"lower_lr", "skip_data"}  # these need their arguments


class Actions(Section):
    """A set of actions carried out together as one transaction, in the order of this table."""

    capture: NoArguments | None = Field(default=None, description="keep the last 200 records and the stacks")
    evaluate: NoArguments | None = Field(default=None, description="evaluate now; the result is evidence")
    diagnose: ByReplay | None = Field(default=None, description="replay the bad stretch to find the cause")
    record: NoArguments | None = Field(default=None, description="write it into the logbook, nothing else")
    checkpoint: NoArguments | None = Field(default=None, description="save a checkpoint now")
    roll_back: RollBack | None = Field(default=None, description="go back to a good checkpoint before the onset")
    widen_rollback: NoArguments | None = Field(default=None, description="restart from the next older checkpoint")
    restart: NoArguments | None = Field(default=None, description="from the newest verified checkpoint")
    skip_data: Batches | None = Field(
        default=None, description="jump so many batches from the margin before the onset on"
    )
    quarantine_shards: NoArguments | None = Field(default=None, description="never read the finding's shards again")
    lower_lr: LowerLr | None = Field(default=None, description="an overlay on the schedule")
    reseed: NoArguments | None = Field(default=None, description="fold a new branch number into the RNG")
    notify: NotifyArguments | None = Field(default=None, description="tell people")
    halt: NoArguments | None = Field(default=None, description="stop until a person resumes the run")

    def names(self) -> list[ActionName]:
        """The actions that are set, in the order in which they are carried out."""
        return [name for name in type(self).model_fields if getattr(self, name) is not None]  # type: ignore[misc]

    def merged(self, other: "Actions") -> "Actions":
        """Both sets; what `other` sets wins."""
        return self.model_copy(update={name: getattr(other, name) for name in other.names()})


def _bare_action(value: object) -> object:
    if isinstance(value, str) and value in _BARE:
        return Actions.model_validate({value: {}})
    raise ValueError(f"unknown action {value!r} or one that needs arguments; without arguments: {sorted(_BARE)}")


_Item = Annotated[
    Annotated[Actions, BeforeValidator(_bare_action, json_schema_input_type=str), Tag("name")]
    | Annotated[Actions, Tag("with_arguments")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "with_arguments"),
]


CauseOfDeath = Literal[
    "killed", "host_oom", "cuda_oom", "gpu", "nccl", "gpu_needs_reset", "native_crash", "disk_full", "store",
    "checkpoint", "config", "user_error", "host_lost", "error", "unknown", "data", "data_unreachable",
]  # fmt: skip
"""Causes of an ended attempt that make it a crash, the last two a data error; the table is in
orchestrator/process/causes.py."""

#: The attempt is dead when these are answered, so there is nothing to evaluate, cut or skip.
_OF_THE_PROCESS = frozenset(
    {IncidentClass.CRASH, IncidentClass.HANG, IncidentClass.PREEMPTION, IncidentClass.DATA_ERROR}
)
_WHAT_FOLLOWS: tuple[ActionName, ...] = ("restart", "widen_rollback", "halt")
_FOR_THE_DEAD = frozenset({"record", "notify", "capture", *_WHAT_FOLLOWS})


class When(Section):
    """Further conditions of a rule; all given ones must hold."""

    cause: CauseOfDeath | tuple[CauseOfDeath, ...] | None = Field(
        default=None, description="of a crash or a data error"
    )
    phase: Phase | tuple[Phase, ...] | None = Field(default=None, description="of a hang")
    validation_confirms: bool | None = Field(default=None, description="an evaluation on the spot shows it too")
    verdict: Literal["hardware", "data", "data_and_state", "state", "optimisation", "inconclusive"] | None = Field(
        default=None, description="what `diagnose` found"
    )
    in_warm_up: bool | None = Field(default=None, description="the onset lies within the LR warm-up")


class Backoff(Section):
    """Waiting before a restart, only where the world outside must change. `full` jitter takes 0 to the whole wait."""

    start: DurationS = 1.0
    factor: float = Field(default=2.0, ge=1)
    max: DurationS = 300.0
    jitter: Literal["full", "none"] = "full"


class Rule(Section):
    """What is done about a class. `ladder` takes one rung further at each relapse and stays on its last."""

    on: IncidentClass | Annotated[tuple[IncidentClass, ...], Field(min_length=1)]
    when: When = When()
    do: tuple[_Item, ...] | None = None
    ladder: tuple[Actions, ...] | None = None
    backoff: Backoff | None = None
    because: str | None = None

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if (self.do is None) == (self.ladder is None):
            raise ValueError("a rule has either `do` or `ladder`")
        if not self.rungs() or not all(rung.names() for rung in self.rungs()):
            raise ValueError("a rule with no action does nothing; write `do: [record]` if that is meant")
        self._check_process_rule()
        for rung in self.rungs():
            if sum(getattr(rung, name) is not None for name in (*_WHAT_FOLLOWS, "roll_back")) > 1:
                raise ValueError("only one of roll_back, restart, widen_rollback and halt can follow")
            changes = rung.skip_data or rung.lower_lr or rung.reseed or rung.quarantine_shards
            if rung.roll_back is not None and not changes and self.when.verdict != "hardware":
                raise ValueError(
                    "a roll_back that changes nothing would only repeat itself: add skip_data, lower_lr, "
                    "quarantine_shards or reseed, or restrict the rule with `when: {verdict: hardware}`"
                )
            if rung.reseed is not None and rung.roll_back is None:
                raise ValueError("reseed belongs to a rollback: other random numbers from the target on; add roll_back")
            if rung.skip_data is not None and rung.roll_back is None:
                raise ValueError("skip_data without going back would skip what was read already: add roll_back")
        return self

    def _check_process_rule(self) -> None:
        classes = frozenset(self.classes())
        if self.when.cause is not None and classes not in ({IncidentClass.CRASH}, {IncidentClass.DATA_ERROR}):
            raise ValueError("`cause` is a condition of crash or data_error alone")
        if self.when.phase is not None and classes != {IncidentClass.HANG}:
            raise ValueError("`phase` is a condition of hang alone")
        if not classes & _OF_THE_PROCESS:
            return
        names = self.rungs()[0].names()
        if len(self.rungs()) > 1 or not set(names) <= _FOR_THE_DEAD or not set(names) & set(_WHAT_FOLLOWS):
            raise ValueError(
                f"the trainer is dead when {', '.join(sorted(classes & _OF_THE_PROCESS))} is answered: `do` says what "
                f"follows, one of {', '.join(_WHAT_FOLLOWS)}, beside record, notify and capture; "
                "`on_no_progress` says what comes after repeated failures"
            )

    def classes(self) -> tuple[IncidentClass, ...]:
        """The classes it answers to."""
        return self.on if isinstance(self.on, tuple) else (self.on,)

    def rungs(self) -> tuple[Actions, ...]:
        """The ladder, or `do` as a ladder of one."""
        if self.ladder is not None:
            return self.ladder
        merged = Actions()
        for item in self.do or ():
            merged = merged.merged(item)
        return (merged,)


class ProcessBudget(Section):
    """Restarts after crashes and hangs within a window; refilled whenever a new step becomes durable."""

    restarts: int = Field(default=10, ge=0)
    per: DurationS = 6 * 3600.0


class TrainingBudget(Section):
    """Rollbacks; refilled by a good checkpoint `refill_after_steps` full-LR steps beyond onset and highest step."""

    rollbacks: int = Field(default=6, ge=0)
    refill_after_steps: int = Field(default=2000, ge=1)


class Budgets(Section):
    """What may be spent before a person is asked."""

    process: ProcessBudget = ProcessBudget()
    training: TrainingBudget = TrainingBudget()


class Guards(Section):
    """Limits beyond which automation stops (DESIGN 6)."""

    warm_up_rollbacks: int = Field(default=1, ge=0, description="more than these: peak LR or warm-up is wrong")
    lower_lr_floor: float = Field(default=0.2, ge=0, le=1, description="no lower_lr below this share of the peak")
    max_skipped_share: float = Field(default=0.02, gt=0, le=1, description="of the planned samples")
    max_discarded_share: float = Field(default=0.05, gt=0, le=1, description="of the planned steps")
    always_skipped_batches: int = Field(default=2000, ge=0, description="but so many always: short plans, one ladder")
    always_discarded_steps: int = Field(default=3000, ge=0, description="but so many always")
    max_quarantined_share: float = Field(default=0.005, gt=0, le=1, description="of all samples")
    validation_tolerance: float = Field(default=0.02, ge=0, description="nats above expectation that confirm")
    relapse_steps: int = Field(default=2000, ge=0, description="a new incident before overlay end plus this")
    checkpoint_overdue_factor: float = Field(default=3.0, gt=1, description="times the usual time between commits")

    @model_validator(mode="before")
    @classmethod
    def _a_written_share_holds_alone(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        pairs = (("max_skipped_share", "always_skipped_batches"), ("max_discarded_share", "always_discarded_steps"))
        return {floor: 0 for share, floor in pairs if share in given} | given


class NoProgress(Section):
    """After so many attempts without a new durable step: one action further each time."""

    attempts: int = Field(default=3, ge=1)
    do: tuple[Literal["widen_rollback", "halt"], ...] = ("widen_rollback", "halt")


class NotifyHook(Section):
    """A command of your own that is told what people should know: one JSON object on its standard input."""

    command: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        default=None, description="program and arguments, no shell; no secrets: arguments can be read by others"
    )
    level: Literal["info", "warning", "page"] = Field(default="warning", description="the lowest that is told")
    timeout: DurationS = Field(default=30.0, description="after which the command is killed")


class Policy(Section):
    """policy.yaml as a whole."""

    version: Literal[1]
    mode: Literal["enforce", "observe"] = "enforce"
    detect: DetectSettings = DetectSettings()
    budgets: Budgets = Budgets()
    guards: Guards = Guards()
    rules: tuple[Rule, ...] = ()
    on_no_progress: NoProgress = NoProgress()
    notify: NotifyHook = NotifyHook()

    def with_fallback(self, shipped: "Policy") -> "Policy":
        """This policy with the shipped rules behind its own, so that every class has an answer."""
        return self.model_copy(update={"rules": self.rules + shipped.rules})


def policy_schema() -> dict[str, Any]:
    """JSON Schema of policy.yaml, for editors."""
    return Policy.model_json_schema(mode="validation")
