"""Fencing epochs: who writes from here on, and which commits still count (DESIGN 4). Torch-free.

A writer claims `fence/e<N>.json` by a create-only write. The fence names its base, the commit it continues from, and
that base's ancestors. The lineage is the newest epoch's commits, its base and those ancestors, so a branch that was
rolled back and a stale writer's late commit are inert, without any clock or lease.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError

from trainer.contract.manifest import COMMITS, CommitIdText, parse_commit_id
from trainer.contract.plan import Contract
from trainer.contract.store import ObjectExists, Store, StoreUnavailable

FENCES = "fence/"
_FENCE_KEY = re.compile(r"fence/e(\d{1,10})\.json")
_COMMIT_KEY = re.compile(r"commits/(\d{12}-e\d{1,10}-\d{1,10})\.json")


class FenceError(Exception):
    """A fence could not be claimed, or does not make sense."""


class FenceLostError(FenceError):
    """Another writer holds this epoch, or a later one exists."""

    def __init__(self, epoch: int, newest: int, holder: str = "another writer") -> None:
        self.epoch = epoch
        self.newest = newest
        super().__init__(
            f"epoch {epoch} is not ours: the store is at epoch {newest}, claimed by {holder}; stop this one, "
            "or go on here with what the other has done by `longwatch launch --take-over`"
        )


class Fence(Contract):
    """The body of a fence: who holds the epoch, and on what it builds."""

    version: Literal[1] = 1
    run_id: str
    epoch: int = Field(ge=0)
    nonce: str = Field(min_length=16, description="random; tells our own fence from another's after a lost response")
    host: str
    pid: int
    base: CommitIdText | None = Field(None, description="the commit this epoch continues from; None: a fresh start")
    ancestry: tuple[CommitIdText, ...] = Field((), description="what the base was built on, in any order")
    plan: dict[str, Any] = Field(default_factory=dict, description="the resume plan, as JSON")
    journal_from: int | None = Field(
        None, ge=1, description="the journal's first event under this epoch; what others write from there on is inert"
    )


@dataclass(frozen=True, slots=True)
class Lineage:
    """The commits that count, oldest first."""

    epoch: int | None
    commits: tuple[str, ...]

    def up_to(self, commit: str) -> tuple[str, ...]:
        """The ancestors of one of these commits: what a fence with this base gives as its ancestry."""
        step = parse_commit_id(commit).step
        return tuple(other for other in self.commits if parse_commit_id(other).step < step)


def fence_key(epoch: int) -> str:
    """Where an epoch's fence lies."""
    return f"{FENCES}e{epoch}.json"


def claim(store: Store, fence: Fence) -> None:
    """Claim the epoch that the fence names. Claiming again with the same body is no error.

    Raises:
        FenceLostError: the epoch is taken, or a later one exists.
        StoreError: the store could not be asked; nothing is known then.
    """
    newest = current_epoch(store)
    if newest is not None and newest > fence.epoch:
        raise FenceLostError(fence.epoch, newest, _holder(store, newest))
    try:
        store.create(fence_key(fence.epoch), fence.model_dump_json().encode())
    except ObjectExists as error:
        raise FenceLostError(fence.epoch, fence.epoch, _holder(store, fence.epoch)) from error


def _holder(store: Store, epoch: int) -> str:
    try:
        fence = read_fence(store, epoch)
    except FenceError:
        return "another writer"
    return f"{fence.host}, pid {fence.pid}"


def ensure_accepted(store: Store, commit: str) -> None:
    """Called by a writer around each commit: does what counts from here on include it?

    A later epoch accepts the commits that it names as its base and ancestors, which may still be on their way.

    Raises:
        FenceLostError: a later epoch was claimed that does not build on this commit.
        StoreUnavailable: the commit's own fence is gone, so this is not the store that the run writes to.
    """
    epoch, newest = parse_commit_id(commit).epoch, current_epoch(store)
    ensure_ours(store, epoch, newest)
    if newest is not None and newest > epoch:
        claimed = read_fence(store, newest)
        if commit not in (claimed.base, *claimed.ancestry):
            raise FenceLostError(epoch, newest)


def ensure_ours(store: Store, epoch: int, newest: int | None) -> None:
    """An epoch that was claimed is in the store for good; a store without it is another, or was emptied.

    Raises:
        StoreUnavailable: the newest epoch there is an older one, or none.
    """
    if newest is None or newest < epoch:
        has = "no epoch at all" if newest is None else f"no epoch after {newest}"
        why = f"it has {has}, although this run has claimed epoch {epoch}; is the right one there, and mounted?"
        raise StoreUnavailable(store.url, why, fence_key(epoch))


def current_epoch(store: Store) -> int | None:
    """The newest epoch that was ever claimed, None if none was."""
    found = (_FENCE_KEY.fullmatch(item.key) for item in store.list(FENCES))
    return max((int(match[1]) for match in found if match), default=None)


def read_fence(store: Store, epoch: int) -> Fence:
    """The body of an epoch's fence. What a first reading finds wrong is read again: a bad transfer is no damage.

    Raises:
        FenceError: it is damaged.
    """
    with suppress(ValidationError):
        return _read_once(store, epoch)
    try:
        return _read_once(store, epoch)
    except ValidationError as error:
        why = f"{store.url}: {fence_key(epoch)} is damaged"
        raise FenceError(f"{why}; remove that object by hand (checkpoints are not touched by that)") from error


def _read_once(store: Store, epoch: int) -> Fence:
    return Fence.model_validate_json(store.read(fence_key(epoch)))


def commits_present(store: Store) -> tuple[str, ...]:
    """Every commit in the store, of whatever branch, oldest step first. One listing; nothing is opened."""
    found = (_COMMIT_KEY.fullmatch(item.key) for item in store.list(COMMITS))
    return tuple(sorted((match[1] for match in found if match), key=parse_commit_id))


def lineage(store: Store) -> Lineage:
    """The commits that count now. Without any fence nothing was ever written by a run, and nothing counts.

    A base that is gone simply drops out: its nearest ancestor that exists is then the newest of the old ones.
    """
    epoch = current_epoch(store)
    if epoch is None:
        return Lineage(None, ())
    return Lineage(epoch, select_lineage(read_fence(store, epoch), commits_present(store)))


def select_lineage(fence: Fence, present: tuple[str, ...]) -> tuple[str, ...]:
    """Of the commits that exist, those that count under this fence, oldest first. Pure."""
    inherited = {*fence.ancestry, fence.base}
    kept = (commit for commit in present if commit in inherited or parse_commit_id(commit).epoch == fence.epoch)
    return tuple(sorted(kept, key=parse_commit_id))
