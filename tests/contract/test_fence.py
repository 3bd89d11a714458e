"""Fences and facts: one writer wins an epoch, what a stale one does is inert, bad outranks good. On every store."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract import fence, verdicts
from trainer.contract.backends import LocalBackend
from trainer.contract.fence import Fence, FenceError, FenceLostError
from trainer.contract.manifest import commit_id, manifest_key
from trainer.contract.store import ObjectExists, Store, StoreUnavailable


def make_fence(epoch: int, nonce: str = "n" * 16, base: str | None = None, ancestry: tuple[str, ...] = ()) -> Fence:
    """A fence of this host."""
    return Fence(run_id="run-1", epoch=epoch, nonce=nonce, host="h", pid=1, base=base, ancestry=ancestry)


def commit(store: Store, step: int, epoch: int) -> str:
    """Make a commit exist, as far as listings go."""
    name = commit_id(step, epoch, epoch)
    store.create(manifest_key(name), b"{}")
    return name


def test_claims(store: Store) -> None:
    """An epoch is claimed once; claiming it again with the same nonce is no error, with another it is."""
    assert fence.current_epoch(store) is None
    fence.claim(store, make_fence(1))
    fence.claim(store, make_fence(1))
    with pytest.raises(FenceLostError) as lost:
        fence.claim(store, make_fence(1, nonce="m" * 16))
    assert (lost.value.epoch, lost.value.newest) == (1, 1)
    fence.claim(store, make_fence(12))
    assert fence.current_epoch(store) == 12
    assert fence.read_fence(store, 12).nonce == "n" * 16


def test_one_of_many_claims_wins(store: Store) -> None:
    """Of six supervisors that claim one epoch at once, one gets it, and its fence is the one that is there."""

    def attempt(writer: int) -> bool:
        try:
            fence.claim(store, make_fence(7, nonce=f"writer-number-{writer:03d}"))
        except FenceLostError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(attempt, range(6)))
    assert won.count(True) == 1
    assert fence.read_fence(store, 7).nonce == f"writer-number-{won.index(True):03d}"


def test_an_old_writer_learns_that_it_is_old(store: Store) -> None:
    """After a newer claim only commits that it builds on are accepted, and no claim below the newest passes."""
    base, ancestor, other = (commit_id(step, 1, 1) for step in (20, 10, 30))
    fence.claim(store, make_fence(1))
    fence.ensure_accepted(store, other)
    fence.claim(store, make_fence(3, base=base, ancestry=(ancestor,)))
    for known in (base, ancestor, commit_id(40, 3, 3)):
        fence.ensure_accepted(store, known)
    with pytest.raises(FenceLostError):
        fence.ensure_accepted(store, other)
    with pytest.raises(FenceLostError):
        fence.claim(store, make_fence(2))


def test_a_rolled_back_branch_and_a_late_commit_are_inert(store: Store) -> None:
    """After a rollback to step 100 the steps beyond it do not count, nor does what their writer commits later."""
    fence.claim(store, make_fence(1))
    first, base, abandoned = commit(store, 0, 1), commit(store, 100, 1), commit(store, 200, 1)
    before = fence.lineage(store)
    assert before.commits == (first, base, abandoned)

    fence.claim(store, make_fence(2, base=base, ancestry=before.up_to(base)))
    late, ours = commit(store, 300, 1), commit(store, 150, 2)
    assert fence.lineage(store).commits == (first, base, ours)
    assert late in fence.commits_present(store)


def test_a_missing_base_means_its_nearest_ancestor(store: Store) -> None:
    """If the base was deleted, what it was built on still counts."""
    fence.claim(store, make_fence(1))
    first, base = commit(store, 0, 1), commit(store, 100, 1)
    fence.claim(store, make_fence(2, base=base, ancestry=(first,)))
    store.delete(manifest_key(base))
    assert fence.lineage(store).commits == (first,)


def test_without_a_fence_nothing_counts(store: Store) -> None:
    """A store that no run ever claimed has no lineage."""
    commit(store, 0, 1)
    assert fence.lineage(store) == fence.Lineage(None, ())


def test_a_damaged_fence_is_an_error(store: Store) -> None:
    """A fence that cannot be read is never taken for an empty one."""
    store.create(fence.fence_key(1), b'{"version": 1')
    with pytest.raises(FenceError, match=r"e1\.json is damaged"):
        fence.lineage(store)


@given(st.data())
def test_lineages_hold_one_commit_per_step_of_one_branch(data: st.DataObject) -> None:
    """Over any sequence of rollbacks the lineage is the newest epoch's commits on a prefix of the one before."""
    present: list[str] = []
    current: tuple[str, ...] = ()
    for epoch in range(1, data.draw(st.integers(1, 6)) + 1):
        base = data.draw(st.sampled_from(current)) if current else None
        ancestry = fence.Lineage(epoch - 1, current).up_to(base) if base else ()
        body = make_fence(epoch, base=base, ancestry=ancestry)
        begin = int(base.split("-")[0]) if base else 0
        new = [commit_id(begin + 10 * (i + 1), epoch, epoch) for i in range(data.draw(st.integers(0, 4)))]
        present += new
        chosen = fence.select_lineage(body, tuple(data.draw(st.permutations(present))))
        assert chosen == (*ancestry, *((base,) if base else ()), *new)
        steps = [name.split("-")[0] for name in chosen]
        assert steps == sorted(set(steps))
        current = chosen


def test_verdicts_are_written_once(store: Store) -> None:
    """The first reason of a fact stands; a second is no error and changes nothing."""
    name = commit_id(100, 1, 1)
    assert verdicts.write_verdict(store, name, "good", "100 healthy steps")
    assert not verdicts.write_verdict(store, name, "good", "again")
    assert b"100 healthy steps" in store.read(verdicts.verdict_key(name, "good"))


def test_bad_outranks_good(store: Store) -> None:
    """The ladder is committed, verified, good; bad is above all, whichever was written first."""
    names = [commit_id(step, 1, 1) for step in (1, 2, 3, 4)]
    verdicts.write_verdict(store, names[0], "bad", "CRC", incident=4)
    for name in names[:2]:
        verdicts.write_verdict(store, name, "good", "healthy")
    for name in names[:3]:
        verdicts.write_verdict(store, name, "verified", "read back")
    found = verdicts.read_verdicts(store)
    assert [found.of(name).state for name in names] == ["bad", "good", "verified", "committed"]
    assert found.of(names[1]).verified


def test_pins_can_be_taken_back(store: Store) -> None:
    """A pin is a fact beside the ladder and the only one that can be undone."""
    name = commit_id(100, 1, 1)
    verdicts.pin(store, name, "the one for the paper")
    assert verdicts.read_verdicts(store).of(name).pinned
    verdicts.unpin(store, name)
    assert not verdicts.read_verdicts(store).of(name).pinned


def test_a_fence_is_never_overwritten(store: Store) -> None:
    """Not even by going around `claim`."""
    fence.claim(store, make_fence(1))
    with pytest.raises(ObjectExists):
        store.create(fence.fence_key(1), b"mine")


def test_a_store_without_our_fence_is_not_ours(store: Store) -> None:
    """Emptied, or another one in its place: a writer waits, it does not go on as if nothing had been there."""
    name = commit_id(10, 2, 1)
    for epoch in (0, 1):
        with pytest.raises(StoreUnavailable, match="has claimed epoch 2"):
            fence.ensure_accepted(store, name)
        fence.claim(store, make_fence(epoch))
    fence.claim(store, make_fence(2))
    fence.ensure_accepted(store, name)


class _CutOnce(LocalBackend):
    """Its first read ends early, as a bad transfer does."""

    cut = False

    def read(self, key: str, start: int, end: int | None, timeout_s: float) -> bytes:
        data = super().read(key, start, end, timeout_s)
        if self.cut:
            return data
        self.cut = True
        return data[: len(data) // 2]


def test_a_torn_read_of_a_fence_is_no_damage(tmp_path: Path) -> None:
    """It is read again, so that a supervisor does not take a bad transfer for somebody else's fence and leave."""
    store = Store(_CutOnce(tmp_path), "file://cut", 5.0)
    fence.claim(store, make_fence(1))

    assert fence.read_fence(store, 1).nonce == "n" * 16
