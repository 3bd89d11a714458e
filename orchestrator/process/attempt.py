"""The attempt that is under way: watched, stopped in stages, and given up only when nothing of it lives.

A state machine without waiting: the loop calls `advance` when a stage is due. Stop = stacks if asked, SIGTERM, grace,
stacks, SIGKILL to everything, then nobody may hold the lock any more. Times are CLOCK_MONOTONIC seconds.
"""

from dataclasses import dataclass
from signal import SIGTERM
from typing import Literal

import structlog

from orchestrator.process import watch
from orchestrator.process.causes import Cause, Evidence, classify, output_tail, read_exit_file
from orchestrator.process.child import Child, ExitStatus, Usage, kill_leftovers, oom_kills
from orchestrator.process.kernel import xids_since
from orchestrator.process.learned import Learned
from orchestrator.process.lock import holders, is_free
from orchestrator.process.stacks import OutsideLook
from trainer.contract.commands import Leave, append_command
from trainer.contract.config import DeadlinesConfig
from trainer.contract.liveness import read_liveness
from trainer.contract.paths import RunPaths

#: Above every id that the engine will ever give: nothing is commanded after it.
LEAVE_COMMAND = 1 << 52
_STACKS_S = 1.0  # faulthandler writes in milliseconds; a process that takes longer is stopped or gone
_DRAIN_EVERY_S = 0.05
_UNDEAD_AFTER_S = 60.0  # killed and still there: uninterruptible sleep; people are told, nothing is started
_LOG = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Departure:
    """A process of the attempt is dead and nothing of it is left."""

    status: ExitStatus
    cause: Cause


class Attempt:
    """One attempt from its spawn or adoption to its verified end. `child` None: it died while nobody watched."""

    def __init__(
        self,
        paths: RunPaths,
        number: int,
        deadlines: DeadlinesConfig,
        now_s: float,
        child: Child | None,
        *,
        oom_kills_before: int | None = None,
        hang_confirmed: bool = False,
        host_lost: bool = False,
        learned: Learned | None = None,
    ) -> None:
        self.number = number
        self.child = child
        self.step = 0
        self.hang_confirmed = hang_confirmed
        self._host_lost = host_lost
        self._learned = learned
        self._paths = paths
        self._deadlines = deadlines
        self._watched = watch.begin(now_s)
        self._begun_s = now_s
        self._oom_before = oom_kills_before
        self._kill_at_s: float | None = None
        self._stacks_asked = False
        self._outside = OutsideLook(paths.stacks(number))
        self._status: ExitStatus | None = None if child else ExitStatus()
        self._dead_since_s = now_s
        self._drain_at_s = now_s
        self._undead_told = False

    @property
    def pid(self) -> int | None:
        """Its process, as long as that lives."""
        return self.child.identity.pid if self.child and self._status is None else None

    @property
    def is_leaving(self) -> bool:
        """It is being stopped, or is dead."""
        return self._kill_at_s is not None or self._status is not None

    # -- watching -------------------------------------------------------------------------------------------------

    def look(self, now_s: float, planned_s: float) -> watch.Judgement | None:
        """Judge its liveness; None while it is being stopped or is dead, which have their own limits."""
        if self.child is None or self._status is not None or self._kill_at_s is not None:
            return None
        page = read_liveness(self._paths.liveness(self.number))
        silent = self._may_need_witness(now_s)
        usage: Usage | None = self.child.usage() if silent else None
        reading = watch.Reading(now_s, planned_s, page, usage, stopped=silent and self.child.is_stopped())
        self._watched, judgement = watch.judge(self._deadlines, self._watched, reading, self._learned)
        self.step = max(self.step, judgement.step)
        self.hang_confirmed = self.hang_confirmed or judgement.verdict == "confirmed"
        return judgement

    def _may_need_witness(self, now_s: float) -> bool:
        """A scan of /proc each second is for the silent only."""
        shortest_s = min(watch.deadline_s(self._deadlines, phase) for phase in watch.EXCUSABLE)
        return now_s - self._watched.since_s > min(2.0, shortest_s / 2)

    # -- stopping -------------------------------------------------------------------------------------------------

    def stop(self, how: Literal["save", "leave", "kill"], now_s: float) -> None:
        """Begin to stop it, or do so more firmly than before."""
        if self.child is None or self._status is not None:
            return
        if how == "kill":
            kill_at_s = now_s + self._ask_for_stacks()
        else:
            if how == "leave":
                command = Leave(id=LEAVE_COMMAND, save=False, because="asked to leave")
                append_command(self._paths.commands(self.number), command)
            self.child.send(SIGTERM)
            kill_at_s = now_s + self._deadlines.grace_s
        self._kill_at_s = kill_at_s if self._kill_at_s is None else min(self._kill_at_s, kill_at_s)

    def _ask_for_stacks(self) -> float:
        """Returns how long to wait for them."""
        if self._stacks_asked:
            return 0.0
        self._stacks_asked = True
        return _STACKS_S if self.ask_for_stacks() else 0.0

    def ask_for_stacks(self) -> bool:
        """Have the stacks written into the stacks file without stopping anything: by its handler, and from outside."""
        if self.child is None or self._status is not None:
            return False
        by_itself = self.child.dump_stacks()
        return self._outside.begin(self.child.identity.pid) or by_itself

    def exited(self, now_s: float) -> None:
        """Its pidfd became readable."""
        if self.child is None or self._status is not None:
            return
        self._status = self.child.reap()
        self._dead_since_s = self._drain_at_s = now_s

    def due_s(self) -> float | None:
        """When `advance` is to be called next; None if only its end can move it."""
        return self._kill_at_s if self._status is None else self._drain_at_s

    def ask_again(self, now_s: float) -> None:
        """Its departure is not to be told yet; `advance` gives it again in a moment."""
        self._drain_at_s = now_s + _DRAIN_EVERY_S

    def advance(self, now_s: float) -> Departure | None:
        """Do the stage that is due; the departure, once nothing of it is left."""
        if self._status is None:
            if self.child is not None and self._kill_at_s is not None and now_s >= self._kill_at_s:
                wait_s = self._ask_for_stacks()
                self._kill_at_s = now_s + (wait_s or _DRAIN_EVERY_S)
                if not wait_s:
                    self.child.kill_all()
            return None
        if now_s < self._drain_at_s:
            return None
        if is_free(self._paths.child_lock):
            return Departure(self._status, self._classified(self._status))
        kill_leftovers(self._paths.child_lock, self.child.identity.pid if self.child else None)
        self._drain_at_s = now_s + _DRAIN_EVERY_S
        self._tell_undead(now_s)
        return None

    def _tell_undead(self, now_s: float) -> None:
        if now_s - self._dead_since_s > _UNDEAD_AFTER_S and not self._undead_told:
            self._undead_told = True
            _LOG.error("processes_survive_sigkill", attempt=self.number, pids=list(holders(self._paths.child_lock)))

    def _classified(self, status: ExitStatus) -> Cause:
        said = read_exit_file(self._paths.exit_file(self.number))
        known = status.code is not None or status.signum is not None
        oom_now = oom_kills()
        risen = oom_now - self._oom_before if oom_now is not None and self._oom_before is not None else 0
        return classify(
            Evidence(
                code=status.code if known or said is None else said.code,
                signum=status.signum,
                sent=frozenset(self.child.sent) if self.child else frozenset(),
                hang_confirmed=self.hang_confirmed,
                host_lost=self._host_lost,
                error=said.error if said else None,
                oom_kills=risen,
                xids=xids_since(self._begun_s),
                tail=output_tail(self._paths.output(self.number)),
                step=self.step,
            )
        )

    def close(self) -> None:
        """Release the descriptors; the process is not touched."""
        self._outside.end()
        if self.child is not None:
            self.child.close()
