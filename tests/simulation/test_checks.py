"""Every check of the simulation can fail: a world that is broken on purpose is caught by the one meant for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from monitors.taxonomy import Finding, IncidentClass
from orchestrator.journal import Folded, StoredDecision
from orchestrator.policy.events import AttemptExited, FindingMade, StepsPassed
from tests.simulation.data import Walk
from tests.simulation.invariants import Broken
from tests.simulation.profile import PROFILES
from tests.simulation.shell import Shell
from tests.simulation.trainer import Trainer
from tests.simulation.world import World
from trainer.contract import fence
from trainer.contract.plan import ResumePlan
from trainer.contract.store import Store

_CLAIM_SEED = 1
_SETTLED_POINT = 33  # right after a transaction
_QUIET = replace(PROFILES[1], name="quiet", weeks=0.2, warmup_steps=100, every_s={"death": 20_000.0})
_RESTLESS = replace(_QUIET, name="restless", weeks=0.5, every_s={"disease": 9_000.0, "death": 1_500.0})
_SICK = replace(_QUIET, name="sick", weeks=0.5, every_s={"disease": 9_000.0, "death": 30_000.0})


def _losing_store() -> World:
    world = World(_QUIET, 1)
    world.backend.drop_commits = True
    return world


def _careless_claim() -> World:
    """A fence that lets everything count that is there: the rolled back branch too."""

    def claim(store: Store, plan: ResumePlan, nonce: str, journal_from: int | None) -> None:
        present = fence.commits_present(store)
        body = fence.Fence(run_id="sim", epoch=plan.epoch, nonce=nonce, host="h", pid=1, ancestry=present)
        fence.claim(store, body)

    world = World(_RESTLESS, _CLAIM_SEED)
    world.claim = claim
    return world


class _ReadsSkips(World):
    """Its trainers read what they were told to leave out."""

    def walk(self, plan: ResumePlan) -> Walk:
        return Walk(self.profile.layout, self.profile.batch, (), ())


class _ReadsTwice(World):
    """Its trainers resume a few samples before where the checkpoint stands."""

    def loaded(self, trainer: Trainer) -> None:
        trainer.position = max(0, trainer.position - 64)
        super().loaded(trainer)


class _Undead(World):
    """Its processes outlive their end."""

    def spawn(self, plan: ResumePlan) -> Trainer:
        for trainer in self.trainers:
            trainer.alive = True
        return super().spawn(plan)


class _Unattended(World):
    """Nobody starts a supervisor again."""

    def launch(self) -> None:
        if self.shell is None:
            super().launch()


class _ForgetfulShell(Shell):
    """It does not journal what the trainer has trained."""

    def _commit(self, folded: tuple[Folded, ...], *, snapshot: bool = False) -> list[StoredDecision]:
        kept = tuple(one for one in folded if not isinstance(one.event, StepsPassed))
        return super()._commit(kept, snapshot=snapshot)


class _Forgetful(World):
    def new_shell(self) -> Shell:
        return _ForgetfulShell(self)


def _killed(kind: type[World]) -> World:
    world = kind(_QUIET, 1)
    world.kill_at_point = _SETTLED_POINT
    return world


def _crying_wolf() -> World:
    """The detectors report what never happened, of a class that always halts."""
    world = World(_QUIET, 1)

    def cry() -> None:
        assert world.trainer is not None
        found = Finding("classified", 999, IncidentClass.PLATEAU_THEN_NAN, 10, 20, "nothing")
        world.tell(FindingMade(at_s=world.clock.wall_s, attempt=world.trainer.attempt, finding=found))

    world.clock.after(5_000.0, cry)
    return world


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_losing_store, "committed checkpoints are lost"),
        (_careless_claim, "was not built on it"),
        (lambda: _ReadsSkips(_SICK, 3), "read a skip"),
        (lambda: _ReadsTwice(_QUIET, 1), "begins at"),
        (lambda: _Undead(_QUIET, 1), "begins while"),
        (lambda: _killed(_Unattended), "stuck"),
        (lambda: _killed(_Forgetful), "is not the one that was killed"),
        (_crying_wolf, "an unjustified halt"),
    ],
    ids=["store", "fence", "skips", "twice", "undead", "unattended", "journal", "wolf"],
)
def test_a_broken_world_is_caught(make: Callable[[], World], said: str) -> None:
    """The check says what is wrong, and which profile and seed show it again."""
    world = make()

    with pytest.raises(Broken, match=said) as caught:
        world.run()
    assert f"profile '{world.profile.name}', seed {world.seed}" in str(caught.value)


def test_a_charged_preemption_is_caught() -> None:
    """A budget that is touched when an attempt leaves by itself."""
    world = World(_QUIET, 1)
    world.run()
    assert world.shell is not None
    event = AttemptExited(at_s=0.0, attempt=1, cause="preempted")
    before = world.check.before(world.shell.core, event)
    world.shell.core.state.rollbacks_used += 1

    with pytest.raises(Broken, match="was charged"):
        world.check.after(world.shell.core, event, before)


def test_unbroken_worlds_hold() -> None:
    """The same profiles and seeds without anything broken."""
    for profile, seed in ((_QUIET, 1), (_SICK, 3), (_RESTLESS, _CLAIM_SEED)):
        World(profile, seed).run()
