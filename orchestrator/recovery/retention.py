"""Which checkpoints may go. Pure; `orchestrator.recovery.prune` carries it out.

Kept are: the last good ones, the two newest that are good and verified, the nearest good one 100, 300, 1k, 3k and 10k
steps back, everything newer than the newest good one (it may still become good), the newest, step 0, every pin, every
condemned one (evidence, deleted by a person alone), and what is being restored. Data without a manifest never counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

BACK_STEPS = (100, 300, 1_000, 3_000, 10_000)  # a short interval would otherwise keep only minutes of the past
_VERIFIED_GOOD = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One commit, as `longwatch checkpoints` shows it."""

    id: str
    step: int
    epoch: int
    attempt: int
    state: Literal["committed", "verified", "good", "bad"]
    verified: bool
    pinned: bool
    in_lineage: bool
    bytes: int

    @property
    def good(self) -> bool:
        """Whether a training rollback may load it; step 0 is good by definition, and bad outranks good."""
        return self.state == "good" or (self.step == 0 and self.state != "bad")


@dataclass(frozen=True, slots=True)
class Retention:
    """Every commit that was looked at, with what becomes of it."""

    keep: dict[str, str]
    delete: tuple[str, ...]


def plan_retention(
    checkpoints: Iterable[Checkpoint],
    *,
    keep_good: int,
    restoring: Iterable[str] = (),
    back_steps: tuple[int, ...] = BACK_STEPS,
    drop_abandoned: bool = False,
) -> Retention:
    """Decide for every commit; the reasons say why one is kept.

    Args:
        checkpoints: all commits of the store.
        keep_good: how many of the newest good ones to keep; fewer than 2 counts as 2.
        restoring: commits that an attempt is loading or may load.
        back_steps: distances from the newest commit.
        drop_abandoned: whether commits outside the lineage go too; by default they are left alone.
    """
    everything = sorted(checkpoints, key=lambda c: (c.step, c.epoch, c.attempt))
    lineage = [c for c in everything if c.in_lineage]
    keep = _kept_anywhere(everything, frozenset(restoring)) | _kept_of_lineage(lineage, max(2, keep_good), back_steps)
    if not drop_abandoned:
        keep = {c.id: "not of this lineage" for c in everything if not c.in_lineage} | keep
    return Retention(keep, tuple(c.id for c in everything if c.id not in keep))


def _kept_anywhere(everything: list[Checkpoint], restoring: frozenset[str]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for checkpoint in everything:
        if checkpoint.pinned:
            reasons[checkpoint.id] = "pinned"
        elif checkpoint.id in restoring:
            reasons[checkpoint.id] = "being restored"
        elif checkpoint.state == "bad":
            reasons[checkpoint.id] = "condemned: kept as evidence"
        elif checkpoint.step == 0:
            reasons[checkpoint.id] = "step 0"
    return reasons


def _kept_of_lineage(lineage: list[Checkpoint], keep_good: int, back_steps: tuple[int, ...]) -> dict[str, str]:
    if not lineage:
        return {}
    good = [c for c in lineage if c.good]
    newest_good = good[-1].step if good else -1
    reasons = {c.id: f"one of the last {keep_good} good" for c in good[-keep_good:]}
    reasons |= {c.id: "good and verified" for c in [c for c in good if c.verified][-_VERIFIED_GOOD:]}
    for distance in back_steps:
        if nearest := _nearest(good, lineage[-1].step - distance):
            reasons.setdefault(nearest.id, f"nearest good one {distance} steps back")
    reasons |= {c.id: "may still become good" for c in lineage if c.step > newest_good}
    reasons.setdefault(lineage[-1].id, "the newest")
    return reasons


def _nearest(good: list[Checkpoint], step: int) -> Checkpoint | None:
    """The one whose step is nearest; of two, the older."""
    return min(good, key=lambda c: (abs(c.step - step), c.step), default=None)
