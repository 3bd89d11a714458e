"""The facts of a logbook: all that its three forms show, and nothing that is not recorded.

Numbers that are not finite, and what was not recorded, are None. Times are unix seconds; those of curves are seconds
since the run began, so that a curve is short to write.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Facts(BaseModel):
    """Common to all: read-only, and no field beside the known ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class Curve(Facts):
    """Part of a series that one attempt ran and that has one fate. Thinned out, but with every extreme."""

    attempt: int
    survives: bool
    steps: list[int]
    times_s: list[float]
    values: list[float]


class Series(Facts):
    """One line of a panel, in pieces."""

    name: str
    curves: list[Curve]


class Panel(Facts):
    """A chart: series that share a unit."""

    key: str
    title: str
    unit: str = ""
    log: bool = Field(default=False, description="best seen on a logarithmic scale")
    series: list[Series]


class Trend(Facts):
    """Shares over equal parts of all updates, in the order in which they were run."""

    steps: list[int] = Field(description="the last one of each part")
    spikes_loss: list[float] = Field(description="share of updates more than 7 standard deviations above the mean")
    spikes_grad_norm: list[float]
    clipped: list[float]
    skipped: list[float]


class Totals(Facts):
    """Sums over all updates that were run, replays aside."""

    updates: int = 0
    lost: int = Field(default=0, description="of branches that were rolled back")
    kept_s: float = 0.0
    lost_s: float = 0.0
    clipped: int = 0
    skipped: int = 0
    spikes_loss: int = 0
    spikes_grad_norm: int = 0
    non_finite: int = 0
    non_finite_steps: list[int] = Field(default=[], description="the first of them")


class Bucket(Facts):
    """Where a part of the wall time went."""

    name: str
    seconds: float
    what: str


class Verdict(Facts):
    """The run in a line."""

    state: str
    because: str
    step: int
    total_steps: int
    tokens: int
    loss: float | None
    validation: tuple[int, float] | None
    goodput: float | None = Field(description="share of the wall time in updates that count; None: no times recorded")
    wall_s: float
    incidents: int
    open_incidents: int
    rollbacks: int
    lost_steps: int
    needs: list[str] = Field(description="what a person has to do")
    sentence: str


class Attempt(Facts):
    """One process that trained."""

    attempt: int
    replay: bool
    spawned_at_s: float
    ended_at_s: float | None
    first_update_at_s: float | None
    started_step: int | None
    last_step: int | None
    loaded: str | None
    cause: str | None
    detail: str | None


class Difference(Facts):
    """A fact that is not the same in all attempts: [first attempt with it, value]."""

    what: str
    values: list[tuple[int, str]]


class Worst(Facts):
    """A sequence that stood out around an onset. Its text is not recorded; its place in the data is."""

    position: int
    loss: float | None
    step: int


class IncidentFacts(Facts):
    """One incident as it is told."""

    id: int
    cls: str
    kind: Literal["bad", "warn", "good", "info"]
    of_training: bool = Field(description="about the loss or the weights, not about a process or its speed")
    onset_step: int
    detected_step: int
    end_step: int | None
    at_s: float
    attempt: int
    outcome: str
    cause: str = Field(description="`unknown` where nothing recorded speaks for one")
    seen: str
    numbers: list[str]
    sure: list[str]
    considered: list[str]
    done: list[str]
    cost: str
    after: list[str]
    worst: list[Worst]
    box: list[Panel] = Field(
        description="every update from 200 before the onset on, without times; empty: not recorded"
    )
    branches: Panel | None = Field(description="the branch that was left and the one that replaced it, by data")


class Checkpoint(Facts):
    """A commit: where it got to, and what was found of it."""

    step: int
    commit: str
    at_s: float
    bytes: int
    where: str
    standing: str


class Skipped(Facts):
    """Data that was left out."""

    what: str
    samples: int | None
    tokens: int | None
    then: str
    incident: int | None


class Source(Facts):
    """What the model read of one source."""

    name: str
    samples: int
    tokens: int


class Opening(Facts):
    """A supervisor took the run, under this configuration."""

    at_s: float
    code_version: str
    config_digest: str
    policy_digest: str
    changed: list[str]


class Configuration(Facts):
    """What the run was told."""

    config: dict[str, Any]
    policy: str
    openings: list[Opening]


class Logbook(Facts):
    """The whole."""

    version: Literal[1] = 1
    run: str
    made_at_s: float
    began_at_s: float
    verdict: Verdict
    panels: list[Panel]
    trend: Trend
    totals: Totals
    incidents: list[IncidentFacts]
    incidents_left_out: int
    attempts: list[Attempt]
    differences: list[Difference]
    sources: list[Source]
    skipped: list[Skipped]
    checkpoints: list[Checkpoint]
    checkpoints_left_out: int
    goodput: list[Bucket]
    configuration: Configuration
