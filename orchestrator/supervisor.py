"""The supervisor's loop: gather events, fold them, journal, carry out. Effects only; every rule is in the engine.

One thread waits on the trainer's pidfd, the record bell, the control socket, the store thread's results, signals and
the clock. Events and decisions are durable before any effect starts, so a SIGKILL at any moment loses nothing: the
next supervisor restores the engine from the journal, takes a living trainer over without touching it, and finishes
what was decided and not done. Decisions in the journal are never computed again.
"""

import json
import secrets
import selectors
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

import structlog

from monitors.metrics import Metrics
from orchestrator.control import Server
from orchestrator.core import MakeCore, Setup, Update
from orchestrator.effects import Effects, Tools, spawn_spec
from orchestrator.files import replace_file
from orchestrator.frontdesk import FrontDesk, signal_pipe
from orchestrator.journal import Batch, Folded, Journal, StoredDecision
from orchestrator.patience import DiskPatience
from orchestrator.policy.events import (
    AttemptExited,
    Event,
    HangConfirmed,
    HangSuspected,
    Moved,
    RecordReceived,
    ResumeRequested,
    RunOpened,
    Ticked,
)
from orchestrator.process.attempt import Attempt, Departure
from orchestrator.process.child import become_subreaper, reap_orphans
from orchestrator.process.inbox import Bell, Inbox, keeper_number
from orchestrator.process.keepers import Keepers
from orchestrator.process.lock import RunLock
from orchestrator.process.manager import ServiceManager
from orchestrator.process.standby import Standby
from orchestrator.shipping import MOVED, Shipper
from orchestrator.store_work import StoreWorker
from orchestrator.takeover import open_engine, take_over
from orchestrator.telemetry import Telemetry, serve
from trainer.contract.paths import KEEPER_ROLES
from trainer.contract.segments import send_segments
from trainer.contract.store import StoreError

__all__ = ["Setup", "Supervisor", "Update"]

_SNAPSHOT_EVERY = 1000  # events: folding so many again takes well under a second
_GATHER_S = 0.05  # records that come within this share a transaction: one fsync, not one a step
_SOON_S = 1.0  # at the end of a run, what is due within this is waited for; later retries are the next launch's
_WORKER_ENDS_S = 1.0
_KEEPERS_END_S = 10.0  # of a supervisor that gives up; an orderly end waits as long as the store may take
_SETTLES_WITHIN_S = 120.0  # a few GB reach a disk in that; longer, and the run goes on from an older checkpoint
_HURRIES = ("stopped", "preempted")  # ends that somebody waits for; of the others Prometheus must see the last state
_LOG = structlog.get_logger(__name__)


class Supervisor:
    """One run from now to its end. `run` may be called once, in the main thread."""

    def __init__(self, setup: Setup, make_core: MakeCore, on_update: Callable[[Update], None] | None = None) -> None:
        self._setup = setup
        self._make_core = make_core
        self._on_update = on_update
        self._inbox: Inbox | None = None
        self._keeper_inboxes: list[Inbox] = []
        self._settling_since_s: float | None = None
        self._read_at_s: float | None = None
        self._since_snapshot = 0
        self._metrics_url: str | None = None
        self._needed: tuple[str, ...] | None = None

    def run(self) -> int:
        """Supervise until the run ends; returns the exit code.

        Raises:
            OrchestratorError: another supervisor has the run, the journal can't be used, the trainer can't be started.
            ExporterError: the metrics port is in use.
        """
        with ExitStack() as stack:
            self._open(stack)
            self._begin()
            self._manager.ready()
            while not self._is_over():
                self._turn()
            self._manager.leaving()
            return self._leave()

    # -- opening ----------------------------------------------------------------------------------------------------

    def _open(self, stack: ExitStack) -> None:
        setup, paths = self._setup, self._setup.paths
        paths.create()
        stack.enter_context(RunLock(paths.lock))
        self._journal = stack.enter_context(closing(Journal.open(paths.database)))
        self._journal.patience = DiskPatience(setup.config.deadlines.orphan_s / 2)
        metrics = Metrics(setup.config.name, setup.config_digest[:12], setup.code_version)
        self._exporter = serve(stack, metrics, setup.config.metrics, paths)
        self._metrics_url = self._exporter.url if self._exporter is not None else None
        self._manager = stack.enter_context(ServiceManager())
        self._core, totals = open_engine(self._journal, self._make_core)
        self._telemetry = Telemetry(metrics, setup.config.deadlines)
        self._telemetry.restore(totals, self._core.incidents(), self._core.status().step)
        metrics.count("supervisor_starts_total")
        become_subreaper()
        self._selector = stack.enter_context(selectors.DefaultSelector())
        signals = stack.enter_context(signal_pipe())
        self._bell = stack.enter_context(Bell(paths.records_socket))
        server = stack.enter_context(Server(paths.control_socket))
        self._desk = stack.enter_context(closing(FrontDesk(self._selector, server, signals)))
        self._worker = StoreWorker()
        stack.callback(self._worker.close, _WORKER_ENDS_S)
        for source in (self._bell, self._worker):
            self._selector.register(source, selectors.EVENT_READ)
        self._standby = self._new_standby(stack)
        nonce = self._journal.meta("nonce") or secrets.token_hex(16)
        self._shipper = Shipper(self._journal, paths)
        tools = Tools(
            paths, setup.config, self._journal, setup.store, self._worker, metrics, nonce, self._shipper,
            self._standby, self._telemetry.learned)  # fmt: skip
        self._journal.commit(Batch(meta={"nonce": nonce, "metrics_url": self._metrics_url or ""}))
        self._effects = Effects(tools)
        env = {name: secret.get_secret_value() for name, secret in setup.config.launch.env.items()}
        self._keepers = Keepers(paths, env, setup.config.deadlines.save)
        self._keeper_inboxes = [
            Inbox.of_keeper(paths, role, self._journal.cursor(keeper_number(role))) for role in KEEPER_ROLES
        ]
        stack.callback(self._let_go)

    def _new_standby(self, stack: ExitStack) -> Standby | None:
        """Nothing is started yet: the first attempt must not share its cores with a second start."""
        setup = self._setup
        if not setup.config.launch.standby or setup.config.launch.command is not None:
            return None
        spec = spawn_spec(setup.paths, setup.config.launch, 0)
        standby = Standby(spec.environment(), setup.paths.standby_output)
        stack.callback(standby.stop)
        return standby

    def _begin(self) -> None:
        """Take over what the last supervisor left, then tell the engine that the run is open."""
        setup = self._setup
        if setup.config.launch.command is None:  # one of the user's own may save in its own way
            self._keepers.start()
        taken = take_over(self._journal, self._effects, setup.paths, setup.config.deadlines)
        if taken.attempt is not None:
            self._effects.attempt = taken.attempt
            self._follow(taken.attempt)
        if taken.attempt is None or taken.attempt.pid is None:
            self._wait_for_snapshots()
        now_s = time.time()
        # before it is decided from where to go on: what was saved, also while nobody looked
        events: list[Event] = [*self._read(self._keeper_inboxes, everything=True), *self._effects.take_events()]
        if setup.resume_because is not None:
            events.append(ResumeRequested(at_s=now_s, because=setup.resume_because))
        opened = RunOpened(
            at_s=now_s,
            run_id=setup.config.name,
            config_digest=setup.config_digest,
            policy_digest=setup.policy_digest,
            code_version=setup.code_version,
            adopted=taken.attempt.number if taken.attempt and taken.attempt.pid else None,
            fresh=setup.fresh,
            order=setup.order,
            moved=Moved.model_validate_json(moved) if (moved := self._journal.meta(MOVED)) else None,
        )
        self._next_tick_s = time.monotonic()
        self._process([*events, opened])
        for stored in taken.pending:
            self._effects.carry_out(stored)

    def _wait_for_snapshots(self) -> None:
        """Have what a trainer left in the arena put on disk, if it died together with its supervisor."""
        deadline_s = time.monotonic() + _SETTLES_WITHIN_S
        while self._keepers.has_pending() and time.monotonic() < deadline_s:
            self._keepers.watch(time.monotonic())
            time.sleep(_GATHER_S)

    def _follow(self, attempt: Attempt) -> None:
        """Read its records and wait for its end."""
        self._inbox = Inbox(self._setup.paths, attempt.number, self._journal.cursor(attempt.number))
        if attempt.child is not None:
            self._selector.register(attempt.child.pidfd, selectors.EVENT_READ)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def _is_over(self) -> bool:
        return self._effects.end is not None and self._effects.attempt is None

    def _turn(self) -> None:
        ready: set[object] = {key.fileobj for key, _ in self._selector.select(self._patience_s())}
        asked = self._desk.take_in(ready)
        if self._bell in ready:
            self._selector.unregister(self._bell)  # heard; what else comes in the meantime is read with it
            self._read_at_s = time.monotonic() + _GATHER_S
        for finished in self._worker.finished():
            self._effects.store_finished(finished)
        self._effects.timers.run()
        now_s = time.monotonic()
        attempt = self._effects.attempt
        departure = self._advance(attempt, ready, now_s) if attempt is not None else None
        ticked = self._tick(now_s) if now_s >= self._next_tick_s else []
        read = bool(ticked) or departure is not None or (self._read_at_s is not None and now_s >= self._read_at_s)
        records = self._records(everything=departure is not None) if read else []
        events = [*self._effects.take_events(), *records, *asked, *ticked]
        if attempt is not None and departure is not None:
            events.append(self._departed(attempt, departure))
        self._process(events)
        self._desk.answer(self._core.status())

    def _patience_s(self) -> float:
        attempt = self._effects.attempt
        due = (self._next_tick_s, self._read_at_s, self._effects.timers.due_s(), attempt.due_s() if attempt else None)
        return max(0.0, min(at_s for at_s in due if at_s is not None) - time.monotonic())

    def _process(self, events: Sequence[Event]) -> None:
        """Fold, make durable, carry out; again for what the effects themselves led to."""
        while events:
            folded = tuple(Folded(event, tuple(self._core.fold(event))) for event in events)
            stored = self._commit(folded)
            self._telemetry.decided(stored)
            for one in stored:
                self._effects.carry_out(one)
            attempt = self._effects.attempt
            if attempt is not None and (self._inbox is None or self._inbox.attempt != attempt.number):
                self._follow(attempt)
            if self._on_update is not None:
                self._on_update(Update(self._core.status(), folded, self._metrics_url))
            events = self._effects.take_events()

    def _commit(self, folded: tuple[Folded, ...], *, snapshot: bool = False) -> list[StoredDecision]:
        self._since_snapshot = 0 if snapshot else self._since_snapshot + len(folded)
        if self._since_snapshot >= _SNAPSHOT_EVERY:
            self._since_snapshot, snapshot = 0, True
        status, attempt = self._core.status(), self._effects.attempt
        incidents = self._telemetry.changed(self._core.incidents())
        self._telemetry.show(status, trainer_up=attempt is not None and attempt.pid is not None)
        self._say_what_is_needed()
        stored = self._journal.commit(
            Batch(
                folded=folded,
                incidents=incidents,
                cursors={inbox.attempt: inbox.cursor for inbox in self._inboxes()},
                outcomes=self._effects.take_outcomes(),
                meta={"status": status.model_dump_json(), "totals": self._telemetry.totals()},
                snapshot=self._core.snapshot() if snapshot else None,
            )
        )
        self._shipper.committed(folded, incidents_changed=bool(incidents))
        return stored

    def _say_what_is_needed(self) -> None:
        """Said before the events that it follows from are durable: keeping too much for a moment harms nobody."""
        needed = self._core.needed()
        if needed == self._needed:
            return
        try:
            replace_file(self._setup.paths.needed_commits, json.dumps(needed).encode())
            self._needed = needed
        except OSError as error:  # a full disk; said again with the next commit
            _LOG.warning("needed_commits_not_said", error=str(error))

    # -- what the loop watches --------------------------------------------------------------------------------------

    def _records(self, *, everything: bool) -> list[Event]:
        """Records that have come in; of an attempt that has ended, all there will ever be."""
        if self._read_at_s is not None:
            self._read_at_s = None
            self._selector.register(self._bell, selectors.EVENT_READ)
        self._bell.drain()  # before the files are read: a record that comes later rings again
        return self._read(self._inboxes(), everything=everything)

    def _read(self, inboxes: Sequence[Inbox], *, everything: bool) -> list[Event]:
        events: list[Event] = []
        for inbox in inboxes:
            rejected = inbox.rejected
            while records := inbox.poll():
                for record in records:
                    self._telemetry.observe(record)
                    events.append(RecordReceived(at_s=time.time(), record=record))
                if not everything:
                    break
            self._telemetry.metrics.count("records_rejected_total", by=inbox.rejected - rejected)
        return events

    def _inboxes(self) -> list[Inbox]:
        """The attempt's own records first: a snapshot is told before what becomes of it."""
        return [*([self._inbox] if self._inbox is not None else []), *self._keeper_inboxes]

    def _tick(self, now_s: float) -> list[Event]:
        planned_s, self._next_tick_s = self._next_tick_s, now_s + self._setup.tick_s
        reap_orphans()
        status = self._core.status()
        self._manager.alive(f"{status.state}, step {status.step} of {status.total_steps}")
        for role in self._keepers.watch(now_s):
            self._telemetry.metrics.count("keeper_restarts_total", role)
        attempt = self._effects.attempt
        if self._standby is not None and attempt is not None and attempt.step > 0 and not attempt.is_leaving:
            self._standby.keep(now_s)
        return [*self._look(now_s, planned_s), Ticked(at_s=time.time())]

    def _look(self, now_s: float, planned_s: float) -> list[Event]:
        attempt = self._effects.attempt
        seen = attempt.look(now_s, planned_s) if attempt else None
        if attempt is None or seen is None or not seen.changed:
            return []
        _LOG.warning("hang", stage=seen.verdict, attempt=attempt.number, phase=seen.phase, silent_s=seen.silent_s)
        self._telemetry.metrics.count("hangs_total", seen.verdict)
        kind = HangConfirmed if seen.verdict == "confirmed" else HangSuspected
        return [
            kind(at_s=time.time(), attempt=attempt.number, phase=seen.phase, step=seen.step, silent_s=seen.silent_s)
        ]

    def _advance(self, attempt: Attempt, ready: set[object], now_s: float) -> Departure | None:
        if attempt.child is not None and attempt.child.pidfd in ready:
            self._selector.unregister(attempt.child.pidfd)
            attempt.exited(now_s)
        departure = attempt.advance(now_s)
        if departure is None or self._has_settled(now_s):
            return departure
        attempt.ask_again(now_s)
        return None

    def _has_settled(self, now_s: float) -> bool:
        """Whether what a dead trainer left in the arena is on disk: the next attempt may start from it."""
        if self._settling_since_s is None:
            self._settling_since_s = now_s
        waited_s = now_s - self._settling_since_s
        if self._keepers.has_pending() and waited_s < _SETTLES_WITHIN_S:
            return False
        self._settling_since_s = None
        return True

    def _departed(self, attempt: Attempt, departure: Departure) -> AttemptExited:
        cause, status = departure.cause, departure.status
        _LOG.info("attempt_exited", attempt=attempt.number, cause=cause.cause, detail=cause.detail)
        self._telemetry.metrics.count("attempt_exits_total", cause.cause)
        attempt.close()
        self._effects.departed()
        return AttemptExited(
            at_s=time.time(),
            attempt=attempt.number,
            cause=cause.cause,
            code=status.code,
            signum=status.signum,
            detail=cause.detail,
            frames=cause.frames,
        )

    # -- leaving ----------------------------------------------------------------------------------------------------

    def _leave(self) -> int:
        """Let snapshots, store calls and evidence come to their end, keep the state, and say how the run ended."""
        assert self._effects.end is not None
        self._keepers.stop(self._setup.config.deadlines.grace_s)
        self._process(self._records(everything=True))
        deadline_s = time.monotonic() + self._setup.config.store.timeout_s
        while self._unfinished() and time.monotonic() < deadline_s:
            time.sleep(_GATHER_S)
            self._effects.timers.run()
            for finished in self._worker.finished():
                self._effects.store_finished(finished)
        self._effects.ended()
        self._commit((), snapshot=True)
        self._ship_the_rest()
        if self._exporter is not None and self._effects.end.state not in _HURRIES:
            self._exporter.linger()
        return self._effects.end.exit_code

    def _ship_the_rest(self) -> None:
        """The uploader has left; what follows it is little, and the next launch sends what cannot be sent now."""
        self._shipper.cut()
        try:
            send_segments(self._setup.store, self._setup.paths.outbox)
        except StoreError as error:
            _LOG.warning("journal_not_shipped", why=str(error))

    def _unfinished(self) -> bool:
        due_s = self._effects.timers.due_s()
        working = self._worker.outstanding + self._effects.hooks.outstanding
        return working > 0 or (due_s is not None and due_s <= time.monotonic() + _SOON_S)

    def _let_go(self) -> None:
        """Whatever ends this supervisor, a living trainer and its keepers are left alone: the next one takes over."""
        if self._effects.attempt is None:
            self._keepers.stop(_KEEPERS_END_S)
        self._keepers.let_go()
        if self._effects.attempt is not None:
            self._effects.attempt.close()
