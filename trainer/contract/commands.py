"""Commands to a running attempt: an append-only file that the loop polls at step boundaries.

A file, not a socket: it survives a supervisor restart, a command is never lost or applied twice (ids), and
looking for news costs one `fstat` a step.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from trainer.contract.plan import Contract, PlanUpdate


class CheckpointNow(Contract):
    """Save a checkpoint at the next step boundary; answered by a `commit` or `commit_failed` record."""

    kind: Literal["checkpoint"] = "checkpoint"
    id: int


class EvaluateNow(Contract):
    """Evaluate at the next step boundary; answered by an `eval` record that carries the id."""

    kind: Literal["evaluate"] = "evaluate"
    id: int


class ApplyPlan(Contract):
    """Take a new plan at the next step boundary; answered by `plan_applied`."""

    kind: Literal["apply_plan"] = "apply_plan"
    id: int
    update: PlanUpdate


class Leave(Contract):
    """Leave at the next step boundary, with a checkpoint (PREEMPTED) or without one (LEFT)."""

    kind: Literal["leave"] = "leave"
    id: int
    save: bool
    because: str = ""


Command = Annotated[CheckpointNow | EvaluateNow | ApplyPlan | Leave, Field(discriminator="kind")]
_COMMANDS: TypeAdapter[Command] = TypeAdapter(Command)


def append_command(path: Path, command: Command) -> None:
    """Append one command, durable before this returns. Ids must rise; a repeated id is ignored by the reader."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, command.model_dump_json().encode() + b"\n")
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def read_commands(path: Path) -> list[Command]:
    """Every complete command of a mailbox; none if it is not there."""
    try:
        complete = path.read_bytes().rpartition(b"\n")[0]
    except FileNotFoundError:
        return []
    return [_COMMANDS.validate_json(line) for line in complete.splitlines()]


class CommandReader:
    """The trainer's side of the mailbox."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o600)
        self._offset = 0
        self._last_id = 0

    def poll(self) -> list[Command]:
        """Commands that came since the last call; a line still being written is left for the next."""
        if os.fstat(self._descriptor).st_size <= self._offset:
            return []
        raw = os.pread(self._descriptor, 1 << 20, self._offset)
        complete = raw[: raw.rfind(b"\n") + 1]
        self._offset += len(complete)
        commands = [_COMMANDS.validate_json(line) for line in complete.splitlines()]
        fresh = [command for command in commands if command.id > self._last_id]
        self._last_id = max((command.id for command in fresh), default=self._last_id)
        return fresh

    def close(self) -> None:
        """Release the descriptor."""
        os.close(self._descriptor)
