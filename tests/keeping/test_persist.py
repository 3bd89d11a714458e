"""From the arena to the disk and back from the nearest place: deaths, full disks, damage."""

import errno
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.stores import claimed
from tests.trainer.saving import COMMIT, STEP, Saving, full_state, trained
from trainer.checkpoint import CheckpointError, load_checkpoint
from trainer.checkpointing.load import ArenaTier, StoreTier, Tier
from trainer.contract.arena import ArenaReader
from trainer.contract.backends import LocalBackend
from trainer.contract.config import StoreConfig
from trainer.contract.fence import commits_present
from trainer.contract.store import Store, StoreUnavailable, open_store
from trainer.keeping.persist import SlotLostError, describe, persist, reserve


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store on disk, which is not the local tier."""
    return claimed(open_store(StoreConfig(url="file://./store"), tmp_path, "run-1"))


def _state() -> dict[str, Tensor]:
    return full_state(*trained())


class _Killed(BaseException):
    """Stands for SIGKILL: raised at some file operation and at every later one, so that no clean-up can do anything."""


class _Death:
    """Strikes at the n-th file operation of this thread. An audit hook, which Python calls before each of them."""

    _EVENTS = frozenset({"open", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.scandir", "os.listdir"})

    def __init__(self) -> None:
        self.at: int | None = None
        self.count = 0
        self._thread = 0
        sys.addaudithook(self._hook)

    def run(self, at: int, call: Callable[[], object]) -> bool:
        """Whether the call died before it came to its end."""
        self.at, self.count, self._thread = at, 0, threading.get_ident()
        try:
            call()
        except _Killed:
            return True
        finally:
            self.at = None
        return False

    def _hook(self, event: str, _: object) -> None:
        if self.at is not None and event in self._EVENTS and threading.get_ident() == self._thread:
            self.count += 1
            if self.count >= self.at:
                raise _Killed


_DEATH = _Death()  # hooks cannot be removed, so there is one


def test_a_writer_that_dies_anywhere_does_it_again(store: Store, tmp_path: Path) -> None:
    """Killed at each of its file operations in turn; the next one comes to the same checkpoint, and leaves nothing."""
    sizes: set[tuple[int, ...]] = set()
    for number in range(1, 400):
        with Saving(store, tmp_path / str(number)) as saving:
            saving.snapshot(_state())
            slot = saving.pending()[0]
            with ArenaReader(saving.root / "arena") as reader:
                said = describe(reader, slot)
                died = _DEATH.run(number, lambda: persist(reader, slot, said, saving.tier, lambda: None))  # noqa: B023
                sealed = persist(reader, slot, said, saving.tier, lambda: None)
            assert commits_present(saving.tier.store) == (COMMIT,)
            saving.tier.verify(sealed)
            assert list(saving.tier.scratch.iterdir()) == []
            sizes.add(tuple(entry.size for entry in sealed.manifest.objects))
            if not died:
                assert number > 20, "a save makes more operations than that"
                assert len(sizes) == 1
                return
    raise AssertionError("it never came to its end")


def test_what_is_on_disk_is_the_snapshot(store: Store, tmp_path: Path) -> None:
    """Loaded from the local disk alone, to the last bit, in files that the safetensors library itself reads."""
    with Saving(store, tmp_path) as saving:
        saving.snapshot(_state())
        saving.persist()
        loaded = load_checkpoint(saving.tier.store, COMMIT)
        for path in (saving.tier.root / "data" / COMMIT).iterdir():
            assert safetensors.torch.load_file(path).keys() <= loaded.tensors.keys()
    expected = _state()
    assert loaded.tensors.keys() == expected.keys()
    assert all(torch.equal(loaded.tensors[name], expected[name]) for name in expected)


def test_a_slot_that_is_overwritten_meanwhile_gives_no_checkpoint(store: Store, tmp_path: Path) -> None:
    """Should a trainer ever write where it must not: the mixture is noticed and nothing is kept."""
    with Saving(store, tmp_path) as saving:
        saving.snapshot(_state())
        slot = saving.pending()[0]
        with ArenaReader(saving.root / "arena") as reader:
            said = describe(reader, slot)
            reader.release(slot)
            saving.snapshot(_state(), STEP + 1)
            saving.snapshot(_state(), STEP + 2)
            with pytest.raises(SlotLostError):
                persist(reader, slot, said, saving.tier, lambda: None)
        assert saving.tier.store.list() == []


def test_a_full_disk_keeps_nothing_half(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space is found before the first byte is written; what is held in reserve is there when it is needed."""
    with Saving(store, tmp_path) as saving:
        saving.snapshot(_state())
        slot = saving.pending()[0]

        def full(descriptor: int, offset: int, length: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched, ArenaReader(saving.root / "arena") as reader:
            patched.setattr(os, "posix_fallocate", full)
            assert not reserve(saving.tier, 1000)
            with pytest.raises(OSError, match="No space"):
                persist(reader, slot, describe(reader, slot), saving.tier, lambda: None)
        assert saving.tier.store.list() == []
        assert list(saving.tier.scratch.iterdir()) == []
        assert reserve(saving.tier, 1000)
        assert sum(path.stat().st_blocks * 512 for path in saving.tier.scratch.iterdir()) >= 1000
        assert saving.persist().manifest.step == STEP


def _tiers(saving: Saving) -> tuple[Tier, ...]:
    return (ArenaTier(saving.root / "arena", saving.tier.store), StoreTier("local disk", saving.tier.store))


def _damage(directory: Path) -> None:
    for path in directory.iterdir():
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.unlink()
        path.write_bytes(raw)


def test_the_nearest_place_that_verifies(store: Store, tmp_path: Path) -> None:
    """Shared memory, then the disk, then the store; a damaged copy is passed by, and only if all are, it is said."""
    with Saving(store, tmp_path) as saving:
        saving.save(_state())
        local = saving.tier.root / "data" / COMMIT
        assert load_checkpoint(store, COMMIT, _tiers(saving)).tier == "shared memory"
        for step in (STEP + 1, STEP + 2):  # both slots are used again
            saving.snapshot(_state(), step)
        assert load_checkpoint(store, COMMIT, _tiers(saving)).tier == "local disk"
        _damage(local)
        loaded = load_checkpoint(store, COMMIT, _tiers(saving))
        assert loaded.tier == "store"
        assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in _state().items())
        _damage(tmp_path / "store/run-1/data" / COMMIT)
        with pytest.raises(CheckpointError, match="CRC32C"):
            load_checkpoint(store, COMMIT, _tiers(saving))


def test_damage_nearby_and_silence_far_away_condemn_nothing(store: Store, tmp_path: Path) -> None:
    """What is damaged here may be whole there, and nobody can tell while the store does not answer."""

    class Silent(LocalBackend):
        """A store that does not answer."""

        def read(self, key: str, start: int, end: int | None, timeout_s: float) -> bytes:
            """Never."""
            raise TimeoutError("silent server")

    silent = Store(Silent(tmp_path / "store/run-1"), "test://", 1.0)
    with Saving(store, tmp_path) as saving:
        saving.save(_state())
        for step in (STEP + 1, STEP + 2):
            saving.snapshot(_state(), step)
        assert load_checkpoint(silent, COMMIT, _tiers(saving)).tier == "local disk", "the store is not even asked"
        _damage(saving.tier.root / "data" / COMMIT)
        with pytest.raises(StoreUnavailable):
            load_checkpoint(silent, COMMIT, _tiers(saving))
