"""Is the trainer alive? A pure judgement of one liveness reading after another; the shell takes the readings.

Silence is the time since the main loop last wrote its page. Beyond its phase's deadline it is suspected, and evidence
is captured; beyond twice the deadline it is confirmed, unless a second witness speaks for it: in phases in which a
single long operation is normal, processor time or bytes moved. In training and evaluation there is no such excuse: a
collective that hangs spins at full load (research: BLOOM's evaluation hung for hours at 100 %). A process that a signal
has stopped is suspected, and killed only at four times its deadline. Time in which this supervisor itself stood still
is not counted, since both were probably stopped. Seconds, CLOCK_MONOTONIC.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.process.child import Usage
from orchestrator.process.learned import Learned
from trainer.contract.config import DeadlinesConfig
from trainer.contract.liveness import Liveness, Phase

#: One long operation without a sign of the main loop is normal here, so load and traffic count as signs.
EXCUSABLE = frozenset({Phase.SPAWN, Phase.IMPORT, Phase.LOAD, Phase.COMPILE, Phase.SAVE, Phase.LEAVE})
_EXCUSED_UP_TO = 4  # deadlines: work without end is a hang too
_HINT_UP_TO = 4  # deadlines: how much more time the trainer may ask for
_BUSY_SHARE = 0.05  # of one core: above what idle helper threads use
_BUSY_BYTES_PER_S = 65536.0  # above what logging writes
_OVERSLEPT_S = 2.0  # later than planned by this: the supervisor was stopped or starved, not busy

Verdict = Literal["healthy", "suspected", "confirmed"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What is seen at one moment. `planned_s` is when this look was due: the rest is our own standing still."""

    now_s: float
    planned_s: float
    page: Liveness | None
    usage: Usage | None
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class Watched:
    """What is remembered between two looks."""

    looked_s: float
    since_s: float
    sequence: int = 0
    excused_s: float = 0.0
    usage: Usage | None = None
    busy_s: float | None = None
    verdict: Verdict = "healthy"


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict now; `changed` only when it has become worse since the last look."""

    verdict: Verdict
    changed: bool
    phase: Phase
    step: int
    silent_s: float


def begin(now_s: float) -> Watched:
    """Start watching a process of which nothing was seen yet."""
    return Watched(looked_s=now_s, since_s=now_s)


def deadline_s(deadlines: DeadlinesConfig, phase: Phase, hint_s: float = 0.0, learned: Learned | None = None) -> float:
    """Longest silence of a phase, perhaps as this run has shown it; a hint may stretch it, not without bound."""
    limits: Mapping[Phase, float] = {
        Phase.SPAWN: deadlines.spawn,
        Phase.IMPORT: deadlines.import_,
        Phase.LOAD: deadlines.load,
        Phase.COMPILE: deadlines.compile,
        Phase.WARM_UP: deadlines.warm_up,
        Phase.TRAIN: deadlines.train,
        Phase.EVALUATE: deadlines.evaluate,
        Phase.SAVE: deadlines.save,
        Phase.LEAVE: deadlines.leave,
    }
    limit_s = learned.limit_s(deadlines, phase, limits[phase]) if learned is not None else limits[phase]
    return max(limit_s, min(hint_s, _HINT_UP_TO * limits[phase]))


def judge(
    deadlines: DeadlinesConfig, before: Watched, reading: Reading, learned: Learned | None = None
) -> tuple[Watched, Judgement]:
    """One look: what is remembered from now on, and the verdict."""
    page = reading.page
    phase = page.phase if page else Phase.SPAWN
    limit_s = deadline_s(deadlines, phase, page.deadline_hint_s if page else 0.0, learned)
    current = _brought_up_to(before, reading)
    silent_s = max(0.0, reading.now_s - current.since_s - current.excused_s)
    verdict: Verdict = "healthy"
    if silent_s > limit_s:
        verdict = "suspected"
        if current.verdict == "confirmed" or (
            current.verdict == "suspected"  # never at the first look: evidence is captured before anything is killed
            and silent_s > 2 * limit_s
            and not _excused(current, reading, phase, limit_s, silent_s)
        ):
            verdict = "confirmed"
    changed = verdict not in ("healthy", current.verdict)
    return replace(current, verdict=verdict), Judgement(verdict, changed, phase, page.step if page else 0, silent_s)


def _brought_up_to(before: Watched, reading: Reading) -> Watched:
    page = reading.page
    if page is not None and page.sequence != before.sequence:
        # first seen now: what the supervisor overslept before this look may still hide between page and now
        since_s = page.phase_started_s if before.sequence else max(page.phase_started_s, before.since_s)
        fresh = Watched(looked_s=reading.now_s, since_s=since_s, sequence=page.sequence, usage=reading.usage)
        return replace(fresh, excused_s=_overslept(reading, since_s))
    busy = _is_busy(before, reading)
    return replace(
        before,
        looked_s=reading.now_s,
        excused_s=before.excused_s + _overslept(reading, before.since_s),
        usage=reading.usage or before.usage,
        busy_s=reading.now_s if busy else before.busy_s,
    )


def _overslept(reading: Reading, since_s: float) -> float:
    late_s = reading.now_s - max(reading.planned_s, since_s)
    return late_s if late_s > _OVERSLEPT_S else 0.0


def _is_busy(before: Watched, reading: Reading) -> bool:
    elapsed_s = reading.now_s - before.looked_s
    if before.usage is None or reading.usage is None or elapsed_s <= 0:
        return False
    cpu_share = (reading.usage.cpu_s - before.usage.cpu_s) / elapsed_s
    bytes_per_s = (reading.usage.io_bytes - before.usage.io_bytes) / elapsed_s
    return cpu_share >= _BUSY_SHARE or bytes_per_s >= _BUSY_BYTES_PER_S


def _excused(current: Watched, reading: Reading, phase: Phase, limit_s: float, silent_s: float) -> bool:
    if silent_s > _EXCUSED_UP_TO * limit_s:
        return False
    if reading.stopped:  # by a signal or a debugger: whoever did it will want it back
        return True
    if phase not in EXCUSABLE or current.busy_s is None:
        return False
    return reading.now_s - current.busy_s <= limit_s / 2
