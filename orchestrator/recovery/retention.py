"""Which checkpoints may go. Pure; `orchestrator.recovery.prune` carries it out.

Kept are: the last good ones, the two newest that are good and verified, the nearest good one 100, 300, 1k, 3k and 10k
steps back, one good one in every so much time as long as the rules of `checkpoint.keep_for` say, everything newer than
the newest good one (it may still become good), the newest, step 0, every pin, every condemned one (evidence, deleted by
a person alone), and what is being restored. Data without a manifest never counts.

Order is by step and lineage, never by a clock. A clock only thins: time is cut into spans of `every` seconds, and the
first good one of each span stands for it. That choice rests on nothing that was deleted and on nothing that is yet to
come, so what a later plan wants was never deleted by an earlier one. Ages are those of the supervisor's clock at the
commit and now; if a run moves to another machine they are as good as the two clocks agree. A commit whose time is not
known has no age: no rule of age keeps it, and none lets it go. One from the future is young.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from trainer.contract.durations import duration_text

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
    committed_at_s: float | None = None  # by the clock of the supervisor that journaled it; None: not known
    where: tuple[Literal["disk", "store"], ...] = ("store",)

    @property
    def good(self) -> bool:
        """Whether a training rollback may load it; step 0 is good by definition, and bad outranks good."""
        return self.state == "good" or (self.step == 0 and self.state != "bad")


@dataclass(frozen=True, slots=True)
class Spacing:
    """One good checkpoint in every `every_s` seconds stays until it is `for_s` seconds old."""

    every_s: float
    for_s: float

    def __str__(self) -> str:
        return f"one every {duration_text(self.every_s)} for {duration_text(self.for_s)}"


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
    keep_for: Iterable[Spacing] = (),
    now_s: float = 0.0,
    max_age_s: float | None = None,
) -> Retention:
    """Decide for every commit; the reasons say why one is kept.

    Args:
        checkpoints: all commits of the store.
        keep_good: how many of the newest good ones to keep; fewer than 2 counts as 2.
        restoring: commits that an attempt is loading or may load.
        back_steps: distances from the newest commit.
        drop_abandoned: whether commits outside the lineage go too; by default they are left alone.
        keep_for: rules of age, each on its own.
        now_s: the moment from which ages are counted, by the same clock as `committed_at_s`.
        max_age_s: beyond this age no distance and no rule of age keeps a commit; what must stay stays.
    """
    everything = sorted(checkpoints, key=lambda c: (c.step, c.epoch, c.attempt))
    lineage = [c for c in everything if c.in_lineage]
    good = [c for c in lineage if c.good]
    past = _kept_by_distance(good, lineage, back_steps) | _kept_by_age(good, tuple(keep_for), now_s)
    too_old = {c.id for c in good if max_age_s is not None and (_age_s(c, now_s) or 0.0) > max_age_s}
    keep = {name: reason for name, reason in past.items() if name not in too_old}
    keep |= _kept_of_lineage(lineage, good, max(2, keep_good)) | _kept_anywhere(everything, frozenset(restoring))
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


def _kept_of_lineage(lineage: list[Checkpoint], good: list[Checkpoint], keep_good: int) -> dict[str, str]:
    """What a recovery of today may need, and what may still become good."""
    if not lineage:
        return {}
    newest_good = good[-1].step if good else -1
    reasons = {lineage[-1].id: "the newest"}
    reasons |= {c.id: "may still become good" for c in lineage if c.step > newest_good}
    reasons |= {c.id: "good and verified" for c in [c for c in good if c.verified][-_VERIFIED_GOOD:]}
    return reasons | {c.id: f"one of the last {keep_good} good" for c in good[-keep_good:]}


def _kept_by_distance(good: list[Checkpoint], lineage: list[Checkpoint], back_steps: tuple[int, ...]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for distance in back_steps if good else ():
        nearest = _nearest(good, lineage[-1].step - distance)
        reasons.setdefault(nearest.id, f"nearest good one {distance} steps back")
    return reasons


def _kept_by_age(good: list[Checkpoint], keep_for: tuple[Spacing, ...], now_s: float) -> dict[str, str]:
    """The first of each span of time, in the order of steps, unless it is older than its rule says."""
    reasons: dict[str, str] = {}
    for rule in keep_for:
        spans: set[float] = set()
        for one in good:
            age_s = _age_s(one, now_s)
            if one.committed_at_s is None or age_s is None:
                continue
            span = one.committed_at_s // rule.every_s
            if span not in spans and age_s <= rule.for_s:
                reasons.setdefault(one.id, str(rule))
            spans.add(span)
    return reasons


def _age_s(checkpoint: Checkpoint, now_s: float) -> float | None:
    return None if checkpoint.committed_at_s is None else now_s - checkpoint.committed_at_s


def _nearest(good: list[Checkpoint], step: int) -> Checkpoint:
    """The one whose step is nearest; of two, the older."""
    return min(good, key=lambda c: (abs(c.step - step), c.step))
