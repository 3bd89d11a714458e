"""The smallest policy that the supervisor's shell can be driven by: restart whatever dies, stop when asked.

And the helpers of its tests: a run in a directory, in this process or as a process of its own that can be killed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from monitors.records import CommitRecord, StepRecord
from monitors.taxonomy import IncidentClass
from orchestrator.core import Core, Setup, Update
from orchestrator.errors import JournalMissingError
from orchestrator.journal import Journal
from orchestrator.policy.decisions import (
    CaptureEvidence,
    Decision,
    EndRun,
    Notify,
    PruneCheckpoints,
    SendCommand,
    StartAttempt,
    StopAttempt,
    WriteVerdict,
)
from orchestrator.policy.events import (
    AttemptExited,
    AttemptSpawned,
    CheckpointRequested,
    Event,
    HangConfirmed,
    HangSuspected,
    RecordReceived,
    ResumeRequested,
    RunOpened,
    StopRequested,
)
from orchestrator.policy.state import Incident, RunStatus
from orchestrator.supervisor import Supervisor
from trainer.contract.commands import CheckpointNow
from trainer.contract.config import RunConfig
from trainer.contract.paths import RunPaths
from trainer.contract.plan import ResumePlan
from trainer.contract.store import open_store

MOST_ATTEMPTS = 4


class _State(BaseModel):
    phase: str = "starting"
    attempt: int = 0
    spawned: bool = False
    step: int = 0
    tokens: int = 0
    commits: list[str] = Field(default_factory=list)
    incidents: list[Incident] = Field(default_factory=list)
    stopping: str | None = None
    command: int = 0
    seen: list[tuple[int, int]] = Field(default_factory=list)


class RestartingCore:
    """Restarts every attempt that dies, up to a limit."""

    def __init__(self, snapshot: bytes | None = None) -> None:
        self.state = _State.model_validate_json(snapshot) if snapshot else _State()

    def fold(self, event: Event) -> list[Decision]:
        """One event in, decisions out."""
        state = self.state
        match event:
            case RunOpened() if state.attempt == 0 or state.phase == "stopped":
                return self._start()
            case RunOpened() if state.phase in ("finished", "halted"):
                return [EndRun(state="finished", exit_code=0 if state.phase == "finished" else 3, because="was over")]
            case ResumeRequested():
                return self._start()
            case AttemptSpawned():
                state.phase, state.spawned = "running", True
            case RecordReceived(record=StepRecord() as record):
                state.step, state.tokens = record.step, record.tokens or 0
                state.seen.append((record.attempt, record.step))
            case RecordReceived(record=CommitRecord() as record):
                state.commits.append(record.commit)
                why = WriteVerdict(commit=record.commit, verdict="good", why="committed")
                return [why, PruneCheckpoints(commits=tuple(state.commits[:-2]))]
            case HangSuspected():
                return [CaptureEvidence(attempt=event.attempt)]
            case HangConfirmed():
                return [StopAttempt(attempt=event.attempt, how="kill", because="hang")]
            case CheckpointRequested():
                state.command += 1
                return [SendCommand(attempt=state.attempt, command=CheckpointNow(id=state.command))]
            case StopRequested():
                return self._stop(event)
            case AttemptExited():
                return self._exited(event)
            case _:
                pass
        return []

    def _start(self) -> list[Decision]:
        state = self.state
        state.attempt += 1
        state.phase, state.spawned, state.stopping = "starting", False, None
        candidates = tuple(reversed(state.commits[-2:]))
        plan = ResumePlan(
            run_id="run", attempt=state.attempt, epoch=state.attempt, candidates=candidates, fresh=not candidates
        )
        return [StartAttempt(plan=plan)]

    def _stop(self, event: StopRequested) -> list[Decision]:
        state = self.state
        if not state.spawned:
            state.phase = "stopped"
            return [EndRun(state="stopped", exit_code=5, because="nothing ran")]
        state.stopping = event.by
        return [StopAttempt(attempt=state.attempt, how="save" if event.save else "leave", because=event.by)]

    def _exited(self, event: AttemptExited) -> list[Decision]:
        state = self.state
        state.spawned = False
        if event.cause == "finished":
            state.phase = "finished"
            return [EndRun(state="finished", exit_code=0, because="done")]
        if state.stopping is not None:
            state.phase = "stopped"
            code = 5 if state.stopping == "operator" else 75
            return [EndRun(state="stopped", exit_code=code, because=state.stopping)]
        number = len(state.incidents) + 1
        state.incidents.append(
            Incident(
                id=number, cls=IncidentClass.CRASH, onset_step=state.step, detected_step=state.step, why=event.cause,
                cause=event.cause, decision=["restart"], attempt=event.attempt,
            )
        )  # fmt: skip
        told = Notify(level="warning", title="crash", text=event.cause, incident=number)
        if state.attempt >= MOST_ATTEMPTS:
            state.phase = "halted"
            return [told, EndRun(state="halted", exit_code=3, because="too many attempts")]
        return [told, *self._start()]

    def snapshot(self) -> bytes:
        """State as JSON."""
        return self.state.model_dump_json().encode()

    def needed(self) -> tuple[str, ...]:
        """Nothing is kept."""
        return ()

    def incidents(self) -> list[Incident]:
        """All incidents."""
        return self.state.incidents

    def status(self) -> RunStatus:
        """What is known."""
        state = self.state
        return RunStatus.model_validate(
            {
                "state": state.phase, "step": state.step, "total_steps": 0, "attempt": state.attempt, "loss": None,
                "lr": None, "tokens": state.tokens, "tokens_per_s": None, "validation": None, "last_good_step": None,
                "last_commit_step": None, "rollbacks_left": 0, "restarts_left": 0,
                "open_incidents": len(state.incidents), "incidents": len(state.incidents), "lr_factor": 1.0,
                "quarantined_shards": [],
            }
        )  # fmt: skip


def make_core(snapshot: bytes | None) -> Core:
    """For the supervisor."""
    return RestartingCore(snapshot)


@dataclass
class SmallRun:
    """A run of the child script in one directory."""

    root: Path
    behaviour: dict[str, Any]
    deadlines: dict[str, float] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def paths(self) -> RunPaths:
        """The run directory."""
        return RunPaths(self.root / "run")

    @property
    def config(self) -> RunConfig:
        """run.yaml."""
        child = str(Path(__file__).parents[1] / "children.py")
        config: dict[str, Any] = {
            "name": "run", "steps": 10, "schedule": {"warmup_steps": 0}, "data": {"train": "unused"},
            "metrics": {"port": None}, "store": {"url": str(self.root / "store")}, "deadlines": self.deadlines,
            "launch": {"command": [sys.executable, child, json.dumps(self.behaviour)]},
        }  # fmt: skip
        return RunConfig.model_validate(config | self.changes)

    def setup(self, **changes: Any) -> Setup:
        """A checked launch."""
        self.root.mkdir(exist_ok=True)
        store = open_store(self.config.store, self.root, "run")
        return Setup(
            paths=self.paths, config=self.config, store=store, config_digest="c" * 64, policy_digest="p" * 64,
            code_version="test", tick_s=0.05, **changes,
        )  # fmt: skip

    def supervise(self, on_update: Callable[[Update], None] | None = None, **changes: Any) -> int:
        """Run a supervisor in this process to its end."""
        return Supervisor(self.setup(**changes), make_core, on_update).run()

    def start(self) -> subprocess.Popen[str]:
        """Run a supervisor as a process of its own."""
        arguments = [str(self.root), json.dumps([self.behaviour, self.deadlines, self.changes])]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.orchestrator.restarting", *arguments],
            cwd=Path(__file__).parents[2], env={**os.environ}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def journal(self) -> Any:
        """The journal, for reading; a context manager."""
        return closing(Journal.read_only(self.paths.database))

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Rows of one of the journal's readers; none before there is a journal."""
        try:
            with self.journal() as journal:
                return [dict(row) for row in getattr(journal, table)()]
        except JournalMissingError:
            return []

    def journaled(self) -> list[Event]:
        """Events of the journal; none before there is one."""
        try:
            with self.journal() as journal:
                return list(journal.events())
        except JournalMissingError:
            return []

    def seen(self) -> list[tuple[int, int]]:
        """(attempt, step) of every step record in the order in which the engine got them, over all supervisors."""
        with self.journal() as journal:
            _, snapshot = journal.newest_snapshot()
            core = RestartingCore(snapshot)
            return core.state.seen


if __name__ == "__main__":
    behaviour, deadlines, changes = json.loads(sys.argv[2])
    sys.exit(SmallRun(Path(sys.argv[1]), behaviour, deadlines, changes).supervise())
