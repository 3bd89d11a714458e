"""Carries decisions out. No rule is in here: what is to be done comes from the engine, what came of it goes back.

Every effect may be done twice (a supervisor that died in between does it again) and then does no more than once:
command ids, create-only objects, files replaced as a whole. What may block is given to the store thread, what must
wait is given to a timer; nothing here waits. A failing store never ends the run: it is tried again, ever more rarely.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import assert_never

import structlog

from monitors.metrics import Metrics
from orchestrator.errors import RunSupersededError
from orchestrator.evidence import capture
from orchestrator.files import replace_file
from orchestrator.hooks import Hooks
from orchestrator.journal import Journal, Outcome, Spawned, StoredDecision
from orchestrator.policy.decisions import (
    CaptureEvidence,
    EndRun,
    Notify,
    PruneCheckpoints,
    SendCommand,
    StartAttempt,
    StopAttempt,
    WriteVerdict,
)
from orchestrator.policy.events import AttemptSpawned, Event
from orchestrator.process.attempt import Attempt
from orchestrator.process.child import SpawnSpec, oom_kills, spawn
from orchestrator.process.learned import Learned
from orchestrator.process.standby import Standby
from orchestrator.recovery.claim import claim_epoch, claim_nonce
from orchestrator.recovery.prune import prune, sweep
from orchestrator.shipping import Shipper
from orchestrator.store_work import Finished, StoreWorker
from trainer.contract import fence
from trainer.contract.commands import append_command
from trainer.contract.config import LaunchConfig, RunConfig
from trainer.contract.paths import RunPaths
from trainer.contract.plan import ResumePlan
from trainer.contract.store import Store, StoreError
from trainer.contract.verdicts import write_verdict

_RETRY_FIRST_S = 1.0
_RETRY_MOST_S = 60.0
_STACKS_S = 0.5  # between asking for the stacks and taking what was written
_LOG = structlog.get_logger(__name__)


@dataclass(slots=True)
class Timers:
    """What is to be done later, on CLOCK_MONOTONIC."""

    _pending: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def after(self, wait_s: float, call: Callable[[], None]) -> None:
        """Do something in so many seconds."""
        self._pending.append((time.monotonic() + wait_s, call))

    def due_s(self) -> float | None:
        """When the next one is due."""
        return min((due for due, _ in self._pending), default=None)

    def run(self) -> None:
        """Do what is due."""
        now_s = time.monotonic()
        due = [call for at_s, call in self._pending if at_s <= now_s]
        self._pending = [(at_s, call) for at_s, call in self._pending if at_s > now_s]
        for call in due:
            call()


@dataclass(frozen=True, slots=True)
class Tools:
    """What effects work with."""

    paths: RunPaths
    config: RunConfig
    journal: Journal
    store: Store
    worker: StoreWorker
    metrics: Metrics
    nonce: str
    shipper: Shipper
    standby: Standby | None = None
    learned: Learned = field(default_factory=Learned)


class Effects:
    """The hands of the supervisor. `attempt` is the one under way; `end` is set once the run is to end."""

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        self.timers = Timers()
        self.hooks = Hooks()
        self.attempt: Attempt | None = None
        self.end: EndRun | None = None
        self._end_id: int | None = None
        self._events: list[Event] = []
        self._outcomes: dict[int, Outcome] = {}
        self._starting: StoredDecision | None = None
        self._stops: list[int] = []
        self._calls: dict[int, tuple[str, Callable[[], object], int]] = {}

    # -- for the loop -----------------------------------------------------------------------------------------------

    def take_events(self) -> list[Event]:
        """What effects have led to since the last time."""
        events, self._events = self._events, []
        return events

    def take_outcomes(self) -> dict[int, Outcome]:
        """Decisions that have come to their end since the last time, for the next transaction."""
        outcomes, self._outcomes = self._outcomes, {}
        return outcomes

    def settle(self, decision: int, text: str = "", *, ok: bool = True) -> None:
        """Say how a decision ended."""
        self._outcomes[decision] = Outcome(ok, text)

    def carry_out(self, stored: StoredDecision) -> None:
        """Begin the effect of one decision."""
        decision = stored.decision
        match decision:
            case StartAttempt():
                self._start(stored, decision)
            case StopAttempt():
                self._stop(stored, decision)
            case SendCommand():
                append_command(self.tools.paths.commands(decision.attempt), decision.command)
                self.settle(stored.id)
            case WriteVerdict():
                self._write_verdict(stored, decision)
            case PruneCheckpoints():
                self._store_call(stored.id, decision.kind, lambda: tidy(self.tools.store, decision))
            case Notify():
                self._notify(stored, decision)
            case CaptureEvidence():
                self._capture(stored, decision)
            case EndRun():
                self._end(stored, decision)
            case _:
                assert_never(decision)

    # -- starting ---------------------------------------------------------------------------------------------------

    def _start(self, stored: StoredDecision, decision: StartAttempt) -> None:
        self._starting = stored
        wait_s = min(decision.wait_s, max(0.0, decision.not_before_s - time.time()))
        if wait_s:
            self.timers.after(wait_s, lambda: self._claim(stored, decision.plan))
        else:
            self._claim(stored, decision.plan)

    def _claim(self, stored: StoredDecision, plan: ResumePlan) -> None:
        if self._starting is stored:
            journal_from = self.tools.shipper.begins(plan.epoch)
            nonce = claim_nonce(self.tools.config.name, plan.epoch, self.tools.nonce)
            self._store_call(stored.id, "claim", lambda: claim_epoch(self.tools.store, plan, nonce, journal_from))

    def _spawn(self, stored: StoredDecision, plan: ResumePlan) -> None:
        """The epoch is ours: write the plan, start the process blocked, journal it, let it run."""
        tools = self.tools
        replace_file(tools.paths.plan(plan.attempt), plan.model_dump_json(indent=1).encode())
        launch = tools.config.launch
        oom_before = oom_kills()
        child = spawn(spawn_spec(tools.paths, launch, plan.attempt), tools.standby)
        tools.metrics.count("attempt_starts_total", "cold" if child.is_cold else "standby")
        identity = child.identity
        tools.journal.record_spawn(
            Spawned(plan.attempt, identity.pid, identity.boot_id, identity.starttime, time.time(), oom_before)
        )
        child.release()
        self._starting = None
        self.attempt = Attempt(
            tools.paths,
            plan.attempt,
            tools.config.deadlines,
            time.monotonic(),
            child,
            oom_kills_before=oom_before,
            learned=tools.learned,
        )
        tools.metrics.count("attempts_total")
        self.spawned(stored.id, plan.attempt, identity.pid)

    def spawned(self, decision: int, attempt: int, pid: int) -> None:
        """A process runs on behalf of this decision: now, or found so after a restart."""
        _LOG.info("attempt_spawned", attempt=attempt, pid=pid)
        self._events.append(AttemptSpawned(at_s=time.time(), attempt=attempt, pid=pid))
        self.settle(decision, f"pid {pid}")

    # -- stopping, telling, keeping ---------------------------------------------------------------------------------

    def _stop(self, stored: StoredDecision, decision: StopAttempt) -> None:
        if self.attempt is None or self.attempt.number != decision.attempt:
            self.settle(stored.id, "it had ended already")
            return
        _LOG.info("attempt_stopping", attempt=decision.attempt, how=decision.how, because=decision.because)
        self.attempt.stop(decision.how, time.monotonic())
        self._stops.append(stored.id)  # settled at its end: a supervisor that takes over in between must stop it too

    def departed(self) -> None:
        """The attempt has ended."""
        for decision in self._stops:
            self.settle(decision)
        self._stops.clear()
        self.attempt = None

    def _notify(self, stored: StoredDecision, decision: Notify) -> None:
        level = {"info": _LOG.info, "warning": _LOG.warning, "page": _LOG.critical}[decision.level]
        level("notification", title=decision.title, text=decision.text, incident=decision.incident)
        self.tools.journal.notify(stored, time.time(), decision.level, decision.title, decision.text)
        self.tools.metrics.count("notifications_total", decision.level)
        if decision.command:
            told = decision.model_dump(include={"level", "title", "text", "incident"})
            message = {
                "run": self.tools.config.name,
                "run_dir": str(self.tools.paths.root),
                "at_s": time.time(),
                **told,
            }
            self.hooks.start(decision.command, json.dumps(message).encode(), decision.timeout_s)
        self.settle(stored.id)

    def _capture(self, stored: StoredDecision, decision: CaptureEvidence) -> None:
        living = self.attempt is not None and self.attempt.number == decision.attempt
        asked = living and self.attempt is not None and self.attempt.ask_for_stacks()
        self.timers.after(_STACKS_S if asked else 0.0, lambda: self._keep(stored, decision))

    def _keep(self, stored: StoredDecision, decision: CaptureEvidence) -> None:
        try:
            where = capture(self.tools.paths, decision.attempt, decision.incident)
        except OSError as error:  # evidence is not worth the run
            _LOG.warning("evidence_not_kept", attempt=decision.attempt, error=str(error))
            self.settle(stored.id, str(error), ok=False)
            return
        self.settle(stored.id, str(where))

    def _end(self, stored: StoredDecision, decision: EndRun) -> None:
        if self._starting is not None:
            self.settle(self._starting.id, "superseded by the end of the run")
            self._starting = None
        self.end, self._end_id = decision, stored.id
        if self.attempt is not None:  # it was started in the very moment in which the end was decided
            self.attempt.stop("leave", time.monotonic())
        _LOG.info("run_ending", state=decision.state, exit_code=decision.exit_code, because=decision.because)

    def ended(self) -> None:
        """The supervisor is about to leave."""
        if self._end_id is not None:
            self.settle(self._end_id)

    # -- the store --------------------------------------------------------------------------------------------------

    def _write_verdict(self, stored: StoredDecision, decision: WriteVerdict) -> None:
        def call() -> bool:
            return write_verdict(self.tools.store, decision.commit, decision.verdict, decision.why, decision.incident)

        if decision.verdict == "good":
            self.tools.metrics.set("last_good_timestamp_seconds", time.time())
        self._store_call(stored.id, decision.kind, call)

    def _store_call(self, decision: int, what: str, call: Callable[[], object], tries: int = 0) -> None:
        self._calls[decision] = (what, call, tries)
        self.tools.worker.submit(decision, call)

    def store_finished(self, finished: Finished) -> None:
        """A call has come back.

        Raises:
            RunSupersededError: somebody else writes this run.
        """
        what, call, tries = self._calls.pop(finished.decision)
        match finished.error:
            case None if what == "claim":
                self._claimed(finished.decision)
            case None:
                self.settle(finished.decision)
            case StoreError() as error:
                wait_s = retry_wait_s(tries)
                _LOG.warning("store_call_failed", call=what, error=str(error), again_in_s=wait_s)
                self.tools.metrics.count("store_retries_total")
                self.timers.after(wait_s, lambda: self._again(finished.decision, what, call, tries + 1))
            case (fence.FenceError() | ValueError()) as error if what == "claim":
                stored = self._starting
                raise RunSupersededError(_epoch_of(stored), str(error))
            case (fence.FenceError() | ValueError()) as error:
                _LOG.error("store_call_impossible", call=what, error=str(error))
                self.settle(finished.decision, str(error), ok=False)

    def _again(self, decision: int, what: str, call: Callable[[], object], tries: int) -> None:
        if what != "claim" or (self._starting is not None and self._starting.id == decision):
            self._store_call(decision, what, call, tries)

    def _claimed(self, decision: int) -> None:
        starting = self._starting
        if starting is not None and starting.id == decision and isinstance(starting.decision, StartAttempt):
            self.tools.shipper.claimed()
            self._spawn(starting, starting.decision.plan)


def spawn_spec(paths: RunPaths, launch: LaunchConfig, attempt: int) -> SpawnSpec:
    """What is started for an attempt."""
    env = {name: secret.get_secret_value() for name, secret in launch.env.items()}
    return SpawnSpec(paths, attempt, launch.command, env, launch.threads)


def retry_wait_s(tries: int) -> float:
    """Before a failed store call is made again, for the so many-th time: ever more rarely."""
    return float(min(_RETRY_MOST_S, _RETRY_FIRST_S * 2**tries))


def tidy(store: Store, decision: PruneCheckpoints) -> None:
    """Delete what was decided, and what earlier epochs left half done."""
    prune(store, decision.commits)
    if decision.epoch:
        sweep(store, decision.epoch)


def _epoch_of(stored: StoredDecision | None) -> int:
    return stored.decision.plan.epoch if stored and isinstance(stored.decision, StartAttempt) else -1
