"""Which checkpoints may go, and how they go. `plan_retention` is pure; `prune` and `sweep` carry it out.

Kept are: the last good ones, the two newest that are good and verified, the nearest good one 100, 300, 1k, 3k and 10k
steps back, everything newer than the newest good one (it may still become good), the newest, step 0, every pin, every
condemned one (evidence, deleted by a person alone), and what is being restored. Data without a manifest never counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.recovery.catalog import Checkpoint
from trainer.contract import fence, verdicts
from trainer.contract.manifest import manifest_key, parse_commit_id
from trainer.contract.store import Store

BACK_STEPS = (100, 300, 1_000, 3_000, 10_000)  # a short interval would otherwise keep only minutes of the past
_VERIFIED_GOOD = 2


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


def prune(store: Store, commits: Iterable[str]) -> int:
    """Delete commits, oldest facts last; returns the bytes freed. Only the holder of the newest epoch may call this.

    The manifest goes first, so that there is no moment at which a checkpoint exists without its data. A commit that
    was pinned after the plan was made stays. Calling again after a failure goes on where it stopped (see `sweep`).
    """
    facts = verdicts.read_verdicts(store)
    freed = 0
    for commit in commits:
        if facts.of(commit).pinned:
            continue
        store.delete(manifest_key(commit))
        freed += _delete_data(store, commit)
    return freed


def sweep(store: Store, epoch: int) -> int:
    """Delete data of earlier epochs that has no manifest: saves that never came to their end, half-done prunes.

    What the fence of `epoch` builds on is left alone, even if its manifest has not been seen. Returns bytes freed.
    """
    base = fence.read_fence(store, epoch)
    known = {*fence.commits_present(store), *base.ancestry, base.base}
    orphans = {item.key.split("/")[1] for item in store.list("data/")} - known
    return sum(_delete_data(store, commit) for commit in sorted(orphans) if _epoch_of(commit) < epoch)


def _delete_data(store: Store, commit: str) -> int:
    freed = 0
    for item in store.list(f"data/{commit}/"):
        store.delete(item.key)
        freed += item.bytes
    for key in verdicts.facts_keys(commit):
        store.delete(key)
    return freed


def _epoch_of(commit: str) -> int:
    return parse_commit_id(commit).epoch
