"""What must hold in every simulated run, each held against what really happened, never against the engine's word."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING

from orchestrator.policy.decisions import EndRun
from orchestrator.policy.engine import Engine
from orchestrator.policy.events import AttemptExited, Event
from tests.simulation.data import Span
from trainer.contract import fence
from trainer.contract.manifest import parse_commit_id

if TYPE_CHECKING:
    from tests.simulation.trainer import Consumed, Trainer
    from tests.simulation.world import World

TRAINS_WITHIN_S = 600.0
_FREE = ("preempted", "orphaned", "left")
_ASKS_A_PERSON = {"immediate_nan", "plateau_then_nan", "initial_loss_off"}
_FATAL = {"config", "checkpoint", "data"}
Spent = tuple[int, int, int, str]


class Broken(AssertionError):  # noqa: N818  it says what the run is
    """A run broke what must hold; the message begins with what replays it."""


class Invariants:
    """The checks of one run."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._told: set[str] = set()
        self._pruned: set[str] = set()
        self._in_line: set[tuple[str, str]] = set()

    def require(self, holds: bool, what: str) -> None:
        """Raise what replays the run if something does not hold."""
        if not holds:
            raise Broken(f"{self._world.where()}: {what}")

    # -- while it goes on ---------------------------------------------------------------------------------------------

    def stored(self, commit: str) -> None:
        """The keeper has been told that the store has it."""
        self._told.add(commit)

    def pruned(self, commits: tuple[str, ...]) -> None:
        """The policy gave these up."""
        self._pruned.update(commits)

    def before(self, core: Engine, event: Event) -> Spent | None:
        """What was spent before an event that must cost nothing."""
        if not isinstance(event, AttemptExited) or event.cause not in _FREE:
            return None
        return _spent(core)

    def after(self, core: Engine, event: Event, before: Spent | None) -> None:
        """Preemptions are free."""
        if before is not None and isinstance(event, AttemptExited):
            self.require(_spent(core)[:3] == before[:3], f"an attempt that {event.cause} was charged to a budget")

    def spawned(self, trainer: Trainer, others: list[Trainer]) -> None:
        """Never two trainers."""
        alive = [other.attempt for other in others if other.alive]
        self.require(not alive, f"attempt {trainer.attempt} begins while {alive} live")

    def claimed(self) -> None:
        """What counts from here on is one line of checkpoints: each built on the last, by one writer at a time."""
        world = self._world
        counting = [name for name in _really_counting(world) if name in world.saves]
        newest_epoch = -1
        for older, newer in pairwise(counting):
            if (older, newer) in self._in_line:
                continue
            self._in_line.add((older, newer))
            self.require(_is_ancestor(world, older, newer), f"{newer} counts beside {older} and was not built on it")
            newest_epoch = max(newest_epoch, parse_commit_id(older).epoch)
            epoch = parse_commit_id(newer).epoch
            self.require(epoch >= newest_epoch, f"{newer} of an older epoch counts above {older}")

    def loaded(self, trainer: Trainer) -> None:
        """Never a state that the detectors had already called suspect, and that has really gone wrong."""
        if trainer.parent is None:
            return
        save, disease = self._world.saves[trainer.parent], self._world.diseases.now
        sick = disease is not None and disease.suspected and not save.healthy
        self.require(not sick, f"attempt {trainer.attempt} resumes on the diverged state {save.commit}")

    def superseded(self, why: str) -> None:
        """There is one supervisor, so nobody can have taken the run from it."""
        self.require(False, f"the supervisor takes itself for superseded: {why}")

    def replayed_core(self, remembered: bytes, restored: bytes) -> None:
        """A supervisor that died after a transaction left its whole memory in the journal."""
        self.require(remembered == restored, "the engine restored from the journal is not the one that was killed")

    def checkpoints(self) -> None:
        """What the store had acknowledged and nobody gave up is there; what the engine counts on can be loaded."""
        world = self._world
        there = {key.removeprefix("commits/").removesuffix(".json") for key in world.backend.truth("commits")}
        lost = self._told - self._pruned - there
        self.require(not lost, f"committed checkpoints are lost: {sorted(lost)}")
        if world.shell is None or not world.shell.alive:
            return
        for commit in world.shell.core.state.commits:
            found = commit.id in there or world.keeper.on_disk(commit.id) is not None
            self.require(found, f"the engine counts on {commit.id}, which is nowhere")

    def trains(self, since_s: float) -> None:
        """Some minutes after a fault that nothing else followed, it trains or has since then, or has rightly ended."""
        world = self._world
        trainer = world.trainer
        lives = (trainer is not None and trainer.training) or world.trained_at_s > since_s
        self.require(lives or world.resting(), f"stuck: no training {TRAINS_WITHIN_S:.0f} s after {world.last_fault}")

    def ended(self, end: EndRun) -> None:
        """A halt only on the policy's own terms; a failure never."""
        self.require(end.state != "failed", f"the run failed: {end.because}")
        if end.state in ("halted", "budget_used_up"):
            self.require(self._justified(end), f"an unjustified halt: {end.because}")

    def _justified(self, end: EndRun) -> bool:
        world = self._world
        shell = world.shell
        assert shell is not None
        incident = shell.core.state.incidents[-1] if shell.core.state.incidents else None
        if "restarts in" in end.because:
            budget, now_s = world.policy.budgets.process, world.clock.now_s
            return sum(now_s - at_s < budget.per for at_s in world.departures_s) > budget.restarts
        if "without a new durable step" in end.because:
            rule = world.policy.on_no_progress
            return world.departures_since_save >= rule.attempts * len(rule.do)
        if "twice the same failure" in end.because:
            return len(world.failures) > 1 and _same(*world.failures[-2:])
        halted = next((i for i in reversed(shell.core.state.incidents) if i.outcome == "halted"), incident)
        if halted is None:
            return False
        if halted.cause in _FATAL:
            return world.fatal_deaths > 0
        if halted.refused:
            return world.diseases.had.get(halted.cls, 0) > 0
        outbreaks = world.diseases.had.get(halted.cls, 0)
        ladder = halted.rungs - 1 if halted.cls not in _ASKS_A_PERSON else 0
        return outbreaks > 0 and (halted.rung >= ladder or "budget for rollbacks" in end.because)

    # -- at its end ---------------------------------------------------------------------------------------------------

    def finished(self, end: EndRun) -> None:
        """It is finished, and every sample of the surviving history was read once, but for what was left out."""
        world = self._world
        self.require((end.state, end.exit_code) == ("finished", 0), f"ended {end.state}, exit {end.exit_code}")
        self.checkpoints()
        self.claimed()
        assert world.shell is not None
        state = world.shell.core.state
        out = _merged([(skip.begin, skip.end) for skip in state.skips])
        step = position = 0
        for part, last, end_position in _surviving(world):
            self.require(part.first == step + 1, f"update {step + 1} is followed by {part.first}")
            self.require(
                part.chunk.begin == position, f"update {part.first} begins at {part.chunk.begin}, not {position}"
            )
            for jumped in part.chunk.jumped:
                known = _inside(jumped, out) or any(
                    jumped[0] >= q.from_position
                    and (jumped[0] // world.profile.layout.block_samples) % world.profile.layout.num_shards == q.shard
                    for q in state.quarantines
                )
                self.require(known, f"update {part.first} left {jumped} out, which no incident says")
            if not part.chunk.jumped:
                self.require(not _overlaps((part.chunk.begin, end_position), out), f"update {part.first} read a skip")
            step, position = last, end_position
        self.require(step == world.profile.total_steps, f"the surviving history ends at update {step}")
        self.require(state.position == position, f"the engine is at {state.position}, the data at {position}")


def _same(one: tuple[str, int], other: tuple[str, int]) -> bool:
    return one[0] == other[0] and abs(one[1] - other[1]) <= 1


def _spent(core: Engine) -> Spent:
    state = core.state
    return len(state.restarts_at_s), state.rollbacks_used, state.attempts_without_progress, state.phase


def _really_counting(world: World) -> tuple[str, ...]:
    """The lineage by what is really in the store, condemned ones aside: they are kept as evidence alone."""
    fences = world.backend.truth("fence")
    present = sorted(
        (key.removeprefix("commits/").removesuffix(".json") for key in world.backend.truth("commits")),
        key=parse_commit_id,
    )
    if not fences:
        return ()
    newest = fences[max(fences, key=lambda key: int(key.removeprefix("fence/e").removesuffix(".json")))]
    bad = {key.removeprefix("verdicts/").removesuffix(".bad.json") for key in world.backend.truth("verdicts")}
    counting = fence.select_lineage(fence.Fence.model_validate_json(newest), tuple(present))
    return tuple(name for name in counting if name not in bad)


def _is_ancestor(world: World, older: str, newer: str) -> bool:
    step, at = world.saves[older].step, world.saves[newer].parent
    while at is not None and at != older and world.saves[at].step >= step:
        at = world.saves[at].parent
    return at == older


def _surviving(world: World) -> list[tuple[Consumed, int, int]]:
    """Parts of the history that no later attempt has gone back behind: (part, its last update, where its data ends).

    What an attempt loaded is taken from the journal, what it then did from the world.
    """
    assert world.shell is not None
    loads = [
        (int(row["attempt"]), int(row["started_step"]))
        for row in world.shell.journal.attempts()
        if row["started_step"] is not None and not row["replay"]
    ]
    numbers = [number for number, _ in loads]
    lowest = [min(step for _, step in loads[at:]) for at in range(len(loads))] + [world.profile.total_steps]
    surviving = []
    for part in world.consumed:
        last = min(part.last, lowest[bisect_right(numbers, part.attempt)])
        if last < part.first:
            continue
        size = (part.chunk.end - part.chunk.begin) // part.chunk.steps
        surviving.append(
            (part, last, part.chunk.end if last == part.last else part.chunk.begin + (last - part.first + 1) * size)
        )
    return surviving


def _merged(spans: list[Span]) -> list[Span]:
    result: list[Span] = []
    for begin, end in sorted(spans):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


def _inside(span: Span, spans: list[Span]) -> bool:
    return any(begin <= span[0] and span[1] <= end for begin, end in spans)


def _overlaps(span: Span, spans: list[Span]) -> bool:
    return any(begin < span[1] and span[0] < end for begin, end in spans)
