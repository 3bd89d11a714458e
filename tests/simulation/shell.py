"""The supervisor's shell in the simulated world, and the moments at which it may be killed.

Real: `Engine`, `Journal` (SQLite in a memory file system), `open_engine`, `still_valid`, `claim_epoch`, `tidy`,
`write_verdict`, the waiting between tries. Mirrored, because the real ones hold processes, sockets and threads:
`Supervisor._process` and `_commit` (fold, one transaction, carry out, again for what that led to), `_begin` with
`take_over` (adopt what lives, end what was never let go, tell the end of what died meanwhile), `Effects` by decision,
and the two stages of a hang. A store call is made at once instead of in a thread; a mirrored order that differs from
the real one would be an error here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, assert_never

from orchestrator.effects import retry_wait_s, tidy
from orchestrator.journal import Batch, Cursor, Folded, Journal, Outcome, Spawned, StoredDecision
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
from orchestrator.policy.engine import Engine
from orchestrator.policy.events import (
    AttemptExited,
    AttemptSpawned,
    Event,
    HangConfirmed,
    HangSuspected,
    RecordReceived,
    ResumeRequested,
    RunOpened,
)
from orchestrator.recovery.claim import claim_nonce
from orchestrator.takeover import open_engine, still_valid
from trainer.contract.fence import FenceError
from trainer.contract.store import StoreError
from trainer.contract.verdicts import write_verdict

if TYPE_CHECKING:
    from tests.simulation.trainer import Trainer
    from tests.simulation.world import World

GRACE_S = 120.0
_SNAPSHOT_EVERY = 50  # events, of which one stands for thousands of steps
_SOON_S = 0.1  # what a command leads to is seen as soon as it is there
_KEEPERS = -1  # in the place of an attempt's number, for the cursor of the keepers' records


class SupervisorKilled(Exception):  # noqa: N818  it is no error, it is what happens
    """The process is gone at this very instruction."""


class Shell:
    """One supervisor process, from its start to its death or its leave."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.alive = True
        self.journal = Journal.open(world.database)
        self.core = self._open()
        self.trainer: Trainer | None = None
        self.end: EndRun | None = None
        self._end_id: int | None = None
        self._starting: StoredDecision | None = None
        self._stops: list[int] = []
        self._outcomes: dict[int, Outcome] = {}
        self._events: list[Event] = []
        self._incidents: dict[int, str] = {}
        self._since_snapshot = 0
        self._busy = False

    def _open(self) -> Engine:
        def make(snapshot: bytes | None) -> Engine:
            policy, facts = self.world.policy, self.world.profile.facts
            return Engine(policy, facts) if snapshot is None else Engine.restore(policy, facts, snapshot)

        core, _ = open_engine(self.journal, make)
        assert isinstance(core, Engine)
        return core

    # -- beginning ----------------------------------------------------------------------------------------------------

    def begin(self, resume_because: str | None = None) -> None:
        """Take over what is there, and tell the engine that the run is open."""
        world = self.world
        self._cursors = {number: self.journal.cursor(number) for number in [_KEEPERS, *world.attempts_with_records()]}
        pending = still_valid(self.journal.pending(), self._settle)
        pending, adopted = self._take_over(pending)
        events: list[Event] = self._records() + self._take_events()
        if resume_because is not None:
            events.append(ResumeRequested(at_s=world.clock.wall_s, because=resume_because))
        opened = RunOpened(
            at_s=world.clock.wall_s, run_id="sim", config_digest="c", policy_digest="p", code_version="1",
            adopted=adopted,
        )  # fmt: skip
        self.process([*events, opened])
        for stored in pending:
            self._carry_out(stored)
            self.may_die()
        self.process(self._take_events())
        if self.trainer is not None and self.trainer.hung_since_s is not None:
            self.watch(self.trainer)
        self._later(_SOON_S, lambda: None)

    def _take_over(self, pending: list[StoredDecision]) -> tuple[list[StoredDecision], int | None]:
        row, world = self.journal.last_attempt(), self.world
        if row is None or row["ended_at_s"] is not None:
            return pending, None
        number = int(row["attempt"])
        trainer = world.process_of(number, row["pid"], row["boot_id"])
        starts = (one for one in pending if isinstance(one.decision, StartAttempt))
        start = next(
            (s for s in starts if isinstance(s.decision, StartAttempt) and s.decision.plan.attempt == number), None
        )
        if start is not None and not trainer.released:
            trainer.alive = False
            return pending, None
        if start is not None:
            self._spawned(start.id, trainer)
            pending.remove(start)
        self.trainer = trainer
        return pending, number if trainer.alive else None

    # -- the loop -----------------------------------------------------------------------------------------------------

    def look(self, *events: Event) -> None:
        """Everything that there is to be seen now, and what somebody asks for."""
        if self._busy:
            self._events += events
            return
        trainer = self.trainer
        seen = [*self._take_events(), *self._records(), *events]
        if trainer is not None and not trainer.alive and self.world.clock.now_s >= trainer.settled_at_s:
            self.trainer = None
            for stop in self._stops:
                self._settle(stop)
            self._stops.clear()
            cause = self.world.cause_of(trainer)
            seen.append(AttemptExited(at_s=self.world.clock.wall_s, attempt=trainer.attempt, cause=cause))
        self.process(seen)
        if self.end is not None and self.trainer is None:
            self._leave()

    def process(self, events: Sequence[Event]) -> None:
        """Fold, make durable, carry out; again for what the effects themselves led to."""
        self._busy = True
        try:
            while events:
                folded = []
                for event in events:
                    before = self.world.check.before(self.core, event)
                    decisions = tuple(self.core.fold(event))
                    self.world.check.after(self.core, event, before)
                    folded.append(Folded(event, decisions))
                self.may_die()
                stored = self._commit(tuple(folded))
                self.may_die(settled=True)
                for one in stored:
                    self._carry_out(one)
                    self.may_die()
                events = self._take_events()
        finally:
            self._busy = False

    def may_die(self, *, settled: bool = False) -> None:
        """A place at which a kill leaves something half done; `settled`: the journal says all that memory does."""
        self.world.kill_points += 1
        if self.world.kill_at_point != self.world.kill_points:
            return
        if settled:
            self.world.remember(self.core.snapshot())
        raise SupervisorKilled

    def _commit(self, folded: tuple[Folded, ...], *, snapshot: bool = False) -> list[StoredDecision]:
        self.world.need_disk()
        self._since_snapshot += len(folded)
        if self._since_snapshot >= _SNAPSHOT_EVERY or snapshot:
            self._since_snapshot, snapshot = 0, True
        changed = {}
        for incident in self.core.incidents()[-8:]:
            text = incident.model_dump_json(by_alias=True)
            if self._incidents.get(incident.id) != text:
                self._incidents[incident.id] = changed[incident.id] = text
        outcomes, self._outcomes = self._outcomes, {}
        cursors = dict(list(self._cursors.items())[-2:])  # of the attempt under way and the keepers
        return self.journal.commit(
            Batch(
                folded=folded, incidents=changed, cursors=cursors, outcomes=outcomes,
                snapshot=self.core.snapshot() if snapshot else None,
            )
        )  # fmt: skip

    def _records(self) -> list[Event]:
        """What the attempt and the keepers have written since the last time; taken in when the batch is durable."""
        found: list[Event] = []
        if self.trainer is not None:
            self.trainer.look()
            found += self._new(self.trainer.attempt, self.trainer.records)
        return found + self._new(_KEEPERS, self.world.keeper_records)

    def _new(self, number: int, records: Sequence[Event]) -> list[Event]:
        known = self._cursors.pop(number, Cursor()).seq
        self._cursors[number] = Cursor(seq=len(records))
        now_s = self.world.clock.wall_s
        return [
            record.model_copy(update={"at_s": now_s}) if isinstance(record, RecordReceived) else record
            for record in records[known:]
        ]

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _settle(self, decision: int, text: str = "") -> None:
        self._outcomes[decision] = Outcome(True, text)

    # -- effects ------------------------------------------------------------------------------------------------------

    def _carry_out(self, stored: StoredDecision) -> None:
        decision, world = stored.decision, self.world
        match decision:
            case StartAttempt():
                self._start(stored, decision)
            case StopAttempt():
                self._stop(stored, decision)
            case SendCommand():
                if self.trainer is not None and self.trainer.attempt == decision.attempt:
                    self.trainer.obey(decision.command)
                    self._later(_SOON_S, lambda: None)
                self._settle(stored.id)
            case WriteVerdict():
                self._store_call(
                    stored, lambda: write_verdict(world.store, decision.commit, decision.verdict, decision.why)
                )
            case PruneCheckpoints():
                world.check.pruned(decision.commits)
                self._store_call(stored, lambda: tidy(world.store, decision))
            case Notify() | CaptureEvidence():
                self._settle(stored.id)
            case EndRun():
                self._end(stored, decision)
            case _:
                assert_never(decision)

    def _start(self, stored: StoredDecision, decision: StartAttempt) -> None:
        self._starting = stored
        wait_s = min(decision.wait_s, max(0.0, decision.not_before_s - self.world.clock.wall_s))
        self._later(wait_s, lambda: self._claim(stored, decision))

    def _claim(self, stored: StoredDecision, decision: StartAttempt) -> None:
        if self._starting is not stored:
            return
        nonce = claim_nonce("sim", decision.plan.epoch, "secret")

        def call() -> None:
            self.world.claim(self.world.store, decision.plan, nonce, None)

        self._store_call(stored, call, then=lambda: self._spawn(stored, decision))

    def _spawn(self, stored: StoredDecision, decision: StartAttempt) -> None:
        if self._starting is not stored:
            return
        world = self.world
        world.check.claimed()
        trainer = world.spawn(decision.plan)
        self.may_die()
        world.need_disk()
        spawned = Spawned(trainer.attempt, trainer.pid, str(trainer.boot), trainer.pid, world.clock.wall_s, None)
        self.journal.record_spawn(spawned)
        self.may_die()
        trainer.release()
        self.may_die()
        self._starting = None
        self.trainer = trainer
        self._cursors[trainer.attempt] = self.journal.cursor(trainer.attempt)
        self._spawned(stored.id, trainer)

    def _spawned(self, decision: int, trainer: Trainer) -> None:
        spawned = AttemptSpawned(at_s=self.world.clock.wall_s, attempt=trainer.attempt, pid=trainer.pid)
        self._events.append(spawned)
        self._settle(decision, f"pid {trainer.pid}")

    def _stop(self, stored: StoredDecision, decision: StopAttempt) -> None:
        if self.trainer is None or self.trainer.attempt != decision.attempt:
            self._settle(stored.id, "it had ended already")
            return
        self._stops.append(stored.id)
        self.trainer.stop(decision.how, GRACE_S)

    def _end(self, stored: StoredDecision, decision: EndRun) -> None:
        if self._starting is not None:
            self._settle(self._starting.id, "superseded by the end of the run")
            self._starting = None
        self.end, self._end_id = decision, stored.id
        if self.trainer is not None:
            self.trainer.stop("leave", GRACE_S)

    def _leave(self) -> None:
        if self._end_id is not None:
            self._settle(self._end_id)
        self._commit((), snapshot=True)
        assert self.end is not None
        self.close()
        self.world.left(self.end)

    def _store_call(
        self, stored: StoredDecision, call: Callable[[], object], tries: int = 0, then: Callable[[], None] | None = None
    ) -> None:
        try:
            call()
        except StoreError:
            self._later(retry_wait_s(tries), lambda: self._store_call(stored, call, tries + 1, then))
        except FenceError as error:
            if then is not None:  # the real one raises RunSupersededError and leaves
                self.world.check.superseded(str(error))
                raise SupervisorKilled from error
            self._outcomes[stored.id] = Outcome(False, str(error))
        else:
            self._settle(stored.id) if then is None else then()

    def _later(self, wait_s: float, call: Callable[[], None]) -> None:
        """A timer of this process: it dies with it."""
        if wait_s <= 0:
            call()
            return

        def act() -> None:
            call()
            self.look()

        def due() -> None:
            if self.alive:
                self.world.guarded(act)

        self.world.clock.after(wait_s, due)

    # -- watching -----------------------------------------------------------------------------------------------------

    def watch(self, trainer: Trainer) -> None:
        """The two stages of a hang: at half the limit it is suspected, at the whole it is confirmed."""
        limit_s = self.world.profile.hang_limit_s

        def told(kind: type[HangSuspected] | type[HangConfirmed], silent_s: float) -> None:
            if trainer.alive and self.trainer is trainer:
                at_s = self.world.clock.wall_s
                self.look(kind(at_s=at_s, attempt=trainer.attempt, phase="step", step=trainer.step, silent_s=silent_s))

        self._later(limit_s / 2, lambda: told(HangSuspected, limit_s / 2))
        self._later(limit_s, lambda: told(HangConfirmed, limit_s))

    def close(self) -> None:
        """The process is gone; what it had not journaled is forgotten."""
        self.alive = False
        self.journal.close()
