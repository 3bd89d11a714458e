"""Deleting checkpoints, cut off at any moment: whatever has a manifest has all its data."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.recovery.catalog import list_checkpoints, verify
from orchestrator.recovery.prune import prune, sweep
from trainer.contract import fence
from trainer.contract.backends import LocalBackend
from trainer.contract.manifest import (
    Manifest,
    ObjectEntry,
    commit_id,
    crc32c,
    data_key,
    manifest_key,
    parse_commit_id,
    seal,
)
from trainer.contract.store import Store, StoreError
from trainer.contract.verdicts import pin, write_verdict

_STEPS = (0, 10, 20, 30)


class _Dying(LocalBackend):
    """The process is gone after so many deletions."""

    left = 10**6

    def delete(self, key: str, timeout_s: float) -> None:
        """Delete, or be gone."""
        if self.left == 0:
            raise OSError("killed")
        self.left -= 1
        super().delete(key, timeout_s)


def _commit(store: Store, step: int) -> str:
    """A checkpoint of two objects."""
    name = commit_id(step, 1, 1)
    parsed = parse_commit_id(name)
    entries = []
    for number in range(2):
        raw, key = f"{step}-{number}".encode(), data_key(name, f"r0-{number}")
        store.create(key, raw)
        entries.append(ObjectEntry(key=key, size=len(raw), crc32c=crc32c(raw)))
    manifest = Manifest(
        run_id="r", commit=name, step=step, epoch=parsed.epoch, attempt=parsed.attempt, tokens=0, position=0,
        nonce="0" * 32, objects=tuple(entries), tensors=(),
    )  # fmt: skip
    store.create(manifest_key(name), seal(manifest).raw)
    write_verdict(store, name, "good", "healthy")
    return name


def _claim(store: Store, epoch: int) -> None:
    store.make_place()
    present = fence.commits_present(store)
    body = fence.Fence(
        run_id="r", epoch=epoch, nonce=f"{epoch:016d}", host="h", pid=1,
        base=present[-1] if present else None, ancestry=present[:-1],
    )  # fmt: skip
    fence.claim(store, body)


@settings(max_examples=25, deadline=None)
@given(st.permutations(_STEPS), st.integers(1, 4), st.integers(0, 26))
def test_cut_off_anywhere_nothing_is_half_there(order: list[int], count: int, deletions: int) -> None:
    """Any commits in any order, dead after any deletion: every commit that is listed is whole, and the next pruning
    and sweep take what was left, to the last object."""
    with tempfile.TemporaryDirectory() as directory:
        backend = _Dying(Path(directory))
        store = Store(backend, "file://x", 10.0)
        _claim(store, 1)
        names = {step: _commit(store, step) for step in _STEPS}
        doomed = [names[step] for step in order[:count]]
        backend.left = deletions
        cut_off = False
        try:
            prune(store, doomed)
        except StoreError:
            cut_off = True

        present = list_checkpoints(store)
        assert all(verify(store, one.id).ok and one.good for one in present)
        assert {one.id for one in present} >= set(names.values()) - set(doomed)

        backend.left = 10**6
        assert cut_off == (deletions < 7 * count)  # a manifest, four facts and two objects each
        _claim(store, 2)
        prune(store, [one.id for one in present if one.id in doomed])
        sweep(store, 2)
        left = {item.key for item in store.list() if any(name in item.key for name in doomed)}
        assert left == set()
        assert prune(store, doomed) == 0


def test_what_may_not_be_deleted_stops_everything(tmp_path: Path) -> None:
    """A store that refuses is an error, not a plan carried out in part without a word."""
    backend = _Dying(tmp_path)
    store = Store(backend, "file://x", 10.0)
    _claim(store, 1)
    name = _commit(store, 0)
    backend.left = 0

    with pytest.raises(StoreError):
        prune(store, [name])
    assert verify(store, name).ok


class _Pinning(LocalBackend):
    """A person pins a checkpoint while another one is being deleted."""

    pinned: str | None = None

    def delete(self, key: str, timeout_s: float) -> None:
        """Delete, and let the person act."""
        super().delete(key, timeout_s)
        if self.pinned is not None:
            name, self.pinned = self.pinned, None
            pin(Store(LocalBackend(self.root), "file://x", 10.0), name, "wanted")


def test_a_pin_that_comes_late_holds(tmp_path: Path) -> None:
    """What is pinned while retention is at work, and was not deleted yet, stays."""
    backend = _Pinning(tmp_path)
    store = Store(backend, "file://x", 10.0)
    _claim(store, 1)
    first, second = _commit(store, 0), _commit(store, 10)
    backend.pinned = second
    prune(store, [first, second])
    assert [one.id for one in list_checkpoints(store)] == [second]
    assert verify(store, second).ok


def test_a_sweep_leaves_what_is_none_of_ours(tmp_path: Path) -> None:
    """Foreign files below `data/` are neither deleted nor in the way."""
    store = Store(LocalBackend(tmp_path), "file://x", 10.0)
    _claim(store, 1)
    store.create("data/notes.txt", b"1")
    store.create("data/old/part", b"1")
    store.create(data_key(commit_id(40, 1, 1), "r0-0"), b"123")
    _claim(store, 2)
    assert sweep(store, 2) == 3
    assert [item.key for item in store.list("data/")] == ["data/notes.txt", "data/old/part"]
