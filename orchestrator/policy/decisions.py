"""What is to be done, in the imperative: the only output of the policy engine.

Every decision is journaled before its effect starts and is idempotent: carried out twice it does no more than once.
`incident` is the id of its cause.
"""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from trainer.contract.commands import Command
from trainer.contract.plan import ResumePlan


class _Decision(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    incident: int | None = None


class StartAttempt(_Decision):
    """Claim `plan.epoch`, write the plan file and spawn the attempt.

    Not before `not_before_s` (unix time), but never later than `wait_s` from now: the clock may be put right meanwhile.
    """

    kind: Literal["start_attempt"] = "start_attempt"
    plan: ResumePlan
    not_before_s: float = 0.0
    wait_s: float = math.inf


class StopAttempt(_Decision):
    """Bring the attempt to its end: save and leave, leave without saving, or kill at once (stacks dumped first)."""

    kind: Literal["stop_attempt"] = "stop_attempt"
    attempt: int
    how: Literal["save", "leave", "kill"]
    because: str


class SendCommand(_Decision):
    """Put a command into the attempt's mailbox."""

    kind: Literal["send_command"] = "send_command"
    attempt: int
    command: Command


class WriteVerdict(_Decision):
    """Write a create-only fact about a commit to the store."""

    kind: Literal["write_verdict"] = "write_verdict"
    commit: str
    verdict: Literal["good", "bad"]
    why: str


class PruneCheckpoints(_Decision):
    """Delete these commits from the store, manifest first."""

    kind: Literal["prune_checkpoints"] = "prune_checkpoints"
    commits: tuple[str, ...]
    epoch: int = Field(default=0, description="of the attempt that runs; data of earlier ones without a manifest goes")


class Notify(_Decision):
    """Tell people: info is written down, warning is shown, page wakes somebody."""

    kind: Literal["notify"] = "notify"
    level: Literal["info", "warning", "page"]
    title: str
    text: str
    command: tuple[str, ...] = Field(default=(), description="the user's own, run with the message as JSON on stdin")
    timeout_s: float = 30.0


class CaptureEvidence(_Decision):
    """Keep the black box (last records, stacks) for the incident."""

    kind: Literal["capture_evidence"] = "capture_evidence"
    attempt: int


#: How a run may end, and the exit code that says so; without a checkpoint a stop is 130 or 143 instead (DESIGN 11).
EXIT_CODES = {"finished": 0, "failed": 1, "halted": 3, "budget_used_up": 4, "stopped": 5, "preempted": 75}


class EndRun(_Decision):
    """The supervisor leaves with this state and exit code."""

    kind: Literal["end_run"] = "end_run"
    state: Literal["finished", "halted", "stopped", "preempted", "failed", "budget_used_up"]
    exit_code: int
    because: str


Decision = Annotated[
    StartAttempt | StopAttempt | SendCommand | WriteVerdict | PruneCheckpoints | Notify | CaptureEvidence | EndRun,
    Field(discriminator="kind"),
]
DECISIONS: TypeAdapter[Decision] = TypeAdapter(Decision)
