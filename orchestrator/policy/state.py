"""Everything the policy engine remembers: one tree of plain values, serialised whole as a snapshot.

The engine's fold is the only code that changes it. Steps count updates, positions are raw, times unix seconds.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from monitors.taxonomy import Evidence, IncidentClass
from orchestrator.recovery.retention import Spacing
from trainer.contract.plan import OrderSpec, Overlay, Quarantine, Segment, SkipRange

Verdict = Literal["hardware", "data", "data_and_state", "state", "optimisation", "inconclusive"]
RunPhase = Literal[
    "new", "starting", "running", "recovering", "stopping", "finished", "halted", "stopped", "preempted", "failed",
    "budget_used_up",
]  # fmt: skip
ENDED: frozenset[str] = frozenset({"finished", "halted", "stopped", "preempted", "failed", "budget_used_up"})


class _Mutable(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class RunFacts(BaseModel):
    """What the engine must know of the configuration; the shell reads it from run.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    total_steps: int
    warmup_steps: int
    batch_samples: int
    good_after_steps: int = 100
    keep_good: int = 3
    keep_for: tuple[Spacing, ...] = ()
    checkpoint_every: int | None = Field(default=1000, description="None: the trainer chooses and says so")
    has_validation: bool = True
    planned_changes: tuple[int, ...] = ()
    trace: bool = Field(default=False, description="a recorded run is replayed: no evaluation can be asked for")


class Commit(_Mutable):
    """A checkpoint of the current lineage, oldest first in `EngineState.commits`."""

    id: str
    step: int
    position: int
    tokens: int
    where: Literal["disk", "store"] = Field(default="store", description="disk: on its way to the store")
    standing: Literal["committed", "good", "bad"] = "committed"
    committed_at_s: float | None = Field(default=None, description="the journaled time of its record")
    tainted: bool = Field(default=False, description="lies within an incident: never promoted")


class Cost(_Mutable):
    """What an incident cost, beside the work that would have been done anyway."""

    steps: int = 0
    tokens: int = 0
    skipped_samples: int = 0
    detect_s: float = Field(default=0.0, description="from the onset to the detection")
    restart_s: float = Field(default=0.0, description="from the detection, or the death, to the state loaded again")
    recompute_s: float = Field(default=0.0, description="from there to the step where the run had been")


class Considered(_Mutable):
    """A rule about an incident's class, by its place in the policy (the first is 1), and why it was chosen or not."""

    rule: int
    matched: bool
    why: str


class Course(_Mutable):
    """The loss over the steps that were run again, before and after: medians, nats."""

    before: float
    after: float
    allowed: float

    @property
    def rejoined(self) -> bool:
        """Whether it is as low again."""
        return self.after <= self.before + self.allowed


class Incident(_Mutable):
    """One incident, from suspicion to its outcome; what `longwatch incidents` prints."""

    id: int
    cls: IncidentClass = Field(serialization_alias="class")
    onset_step: int
    detected_step: int
    end_step: int | None = None
    decision: list[str] = Field(default_factory=list)
    why: str
    state: Literal["suspected", "evaluating", "diagnosing", "recovering", "open", "closed", "dismissed"] = "suspected"
    outcome: Literal[
        "", "came_back", "worked", "relapsed", "notice", "halted", "refuted", "superseded", "not_recovered"
    ] = ""
    evidence: Evidence = Field(default_factory=dict)
    shards: list[int] = Field(default_factory=list)
    cause: str | None = None
    phase: str | None = None
    validation: Literal["confirmed", "refuted", "assumed"] | None = None
    verdict: Verdict | None = None
    rules: int = Field(default=0, description="how many the policy had when it was answered; 0: not answered yet")
    considered: list[Considered] = Field(default_factory=list, description="those of its class, in order")
    refused: str = Field(default="", description="the guard that stood against what the rule says")
    rung: int = 0
    rungs: int = Field(default=1, description="of the rule that was chosen")
    relapse_of: int | None = None
    target_step: int | None = None
    resume_step: int | None = Field(default=None, description="where the run had been when it was stopped")
    course: Course | None = Field(default=None, description="whether the loss rejoined its earlier course")
    lr_restored_step: int | None = Field(default=None, description="its lowered LR was back at the schedule here")
    cost: Cost = Field(default_factory=Cost)
    attempt: int = 0
    observed: bool = Field(default=False, description="decided in observe mode or in a replay: nothing was touched")
    opened_at_s: float = 0.0
    key: int | None = Field(default=None, description="the diagnosis' key for it")

    @property
    def is_open(self) -> bool:
        """Still going on, or not yet judged."""
        return self.state not in ("closed", "dismissed")


class Recovery(_Mutable):
    """What happens once the running attempt is dead."""

    kind: Literal["restart", "diagnose", "halt", "stop", "preempt", "budget"]
    incident: int | None = None
    candidates: list[str] = Field(default_factory=list)
    reanchor: bool = False
    because: str = ""


class LadderPlace(_Mutable):
    """How far a family of incidents has climbed: one rung further at each relapse."""

    rung: int
    incident: int
    relapse_until_step: int
    factor: float = 1.0


class ReplayRow(_Mutable):
    """What one replayed step gave; `skipped` for not being finite."""

    loss: float
    grad_norm: float
    skipped: bool


class HistoryRow(_Mutable):
    """What is kept of a surviving step: where its data ended, when it was, and what it gave.

    With `steps` it stands for so many steps, the last of them `step`, that differ in their place alone.
    """

    step: int
    end: int
    at_s: float
    loss: float
    grad_norm: float
    skipped: bool = False
    steps: int = 1
    samples: int = Field(default=0, description="raw positions of each of several steps")


class DiagnosisByReplay(_Mutable):
    """A diagnosis in progress: which replays have run, and what they gave."""

    incident: int
    candidates: list[str]
    from_step: int = Field(description="of the state that the replays load")
    onset_step: int
    to_step: int
    max_steps: int = Field(description="of all replays together")
    lr_factor: float
    suspect: tuple[int, int] = Field(description="raw positions of the steps that went wrong")
    control: tuple[int, int] | None = Field(default=None, description="an equal innocent window")
    level: float | None = Field(default=None, description="of the loss before the onset, nats a token")
    sigma: float = Field(default=0.0, description="robust, of one step's loss around it")
    recorded: dict[int, ReplayRow] = Field(default_factory=dict)
    runs: list[dict[int, ReplayRow]] = Field(default_factory=list)


class Failure(_Mutable):
    """How an attempt failed, by which the same failure is known again."""

    signature: str
    step: int
    loaded_step: int | None


class EngineState(_Mutable):
    """The whole memory of a run."""

    phase: RunPhase = "new"
    now_s: float = Field(default=0.0, description="never goes back: the clock, plus what it was once set back")
    clock_set_back_s: float = Field(default=0.0, description="by how much now_s is ahead of the clock")
    attempt: int = 0
    alive: bool = Field(default=False, description="an attempt was decided on and has not ended")
    spawned: bool = Field(default=False, description="its process exists")
    epoch: int = 0
    branch: int = 0
    step: int = 0
    position: int = 0
    tokens: int = 0
    highest_step: int = 0
    best_durable_step: int = -1
    last_loss: float | None = None
    last_lr: float | None = None
    tokens_per_s: float | None = None
    trained_s: float = Field(default=0.0, description="time spent in steps, those that were lost later included")
    save_every: int | None = Field(default=None, description="steps between checkpoints, as the trainer chose last")
    save_because: str = ""
    last_eval: tuple[int, float] | None = None
    peak_lr: float | None = None
    precision: str = ""
    total_samples: int = 0
    shard_names: list[str] = Field(default_factory=list)
    shard_samples: list[int] = Field(default_factory=list)
    commits: list[Commit] = Field(default_factory=list)
    abandoned: list[str] = Field(default_factory=list, description="commits of branches that were rolled back")
    order: OrderSpec | None = Field(default=None, description="of the data, as the configuration asks for it")
    segments: list[Segment] = Field(default_factory=list, description="of the order, as it has been decided")
    deferred_from: int | None = Field(default=None, description="end of the plan when a skip was first decided")
    skips: list[SkipRange] = Field(default_factory=list)
    quarantines: list[Quarantine] = Field(default_factory=list)
    overlays: list[Overlay] = Field(default_factory=list)
    plans_sent: dict[int, tuple[int, int]] = Field(
        default_factory=dict, description="command -> how many quarantines and overlays its plan has"
    )
    in_effect: tuple[int, int] = Field(default=(0, 0), description="quarantines and overlays that were ever applied")
    incidents: list[Incident] = Field(default_factory=list)
    ladders: dict[str, LadderPlace] = Field(default_factory=dict)
    pending: Recovery | None = None
    undelivered: Recovery | None = Field(default=None, description="a rollback whose state has not been loaded yet")
    stepped: bool = Field(default=False, description="the attempt has done a step")
    reanchoring: bool = Field(default=False, description="the attempt's plan re-anchors what began later")
    overdue_told: bool = Field(default=False, description="that no checkpoint has reached the store for long")
    never_back_from: int | None = Field(default=None, description="onset of a damage that nobody has undone")
    replay: DiagnosisByReplay | None = None
    evaluations: dict[int, int] = Field(default_factory=dict, description="command id -> incident id")
    evals: list[tuple[int, float]] = Field(default_factory=list, description="(step, loss) of the lineage, newest last")
    history: list[HistoryRow] = Field(default_factory=list, description="the newest surviving steps")
    next_command: int = 1
    attempts_without_progress: int = 0
    loaded_step: int | None = Field(default=None, description="of the attempt, once it has loaded")
    last_failure: Failure | None = None
    idle_departures: int = Field(default=0, description="attempts in a row that left by themselves without one step")
    outages: int = Field(default=0, description="attempts in a row that ended because the data was away")
    restarts_at_s: list[float] = Field(default_factory=list)
    rollbacks_used: int = 0
    rollback_onset_step: int = 0
    warm_up_rollbacks: int = 0
    discarded_steps: int = 0
    courses: dict[int, dict[int, float]] = Field(
        default_factory=dict, description="incident -> step -> loss: what its recovery is held against"
    )
    unhealthy_until_step: int = Field(default=0, description="the last step that does not count as healthy")
    hang_phase: str | None = None
    config_digest: str = ""
    policy_digest: str = ""

    def incident(self, number: int | None) -> Incident | None:
        """The incident with this id."""
        return next((incident for incident in reversed(self.incidents) if incident.id == number), None)


class RunStatus(BaseModel):
    """One screen's worth of facts: what `longwatch status --json` prints, without the run directory."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    state: Literal["starting", "running", "recovering", "stopped", "halted", "finished", "failed"]
    step: int
    total_steps: int
    attempt: int
    loss: float | None
    lr: float | None
    tokens: int
    tokens_per_s: float | None
    validation: tuple[int, float] | None
    last_good_step: int | None
    last_commit_step: int | None
    last_stored_step: int | None = None
    checkpoint_interval: str = ""
    rollbacks_left: int
    restarts_left: int
    open_incidents: int
    incidents: int
    lr_factor: float
    quarantined_shards: list[str]
    mode: Literal["enforce", "observe"] = "enforce"
    because: str = ""
