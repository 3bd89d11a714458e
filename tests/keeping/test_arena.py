"""The arena: whoever dies, a slot is complete or visibly not, and nothing that waits for the disk is overwritten."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract import arena
from trainer.contract.arena import Arena, ArenaError, ArenaReader, Slot


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Where a run directory names its arena."""
    yield tmp_path / "arena"
    arena.remove(tmp_path / "arena")


def _fill(made: Arena, payload: bytes, description: bytes = b"{}") -> int:
    index = made.free_slot()
    assert index is not None
    number = made.begin(index)
    begin = made.offset(index)
    made.buffer[begin : begin + len(payload)] = payload
    made.complete(index, number, len(payload), description)
    return index


def _pending(path: Path) -> list[Slot]:
    with ArenaReader(path) as reader:
        return sorted((slot for slot in reader.slots() if slot.is_pending), key=lambda slot: slot.number)


def test_a_snapshot_outlives_who_made_it(path: Path) -> None:
    """The file lies in shared memory behind a link, private to the user; payload and description come back."""
    made = Arena(path, 10_000, 100)
    _fill(made, b"x" * 9_999, b'{"step":1}')
    made.close()
    assert path.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    (slot,) = _pending(path)
    with ArenaReader(path) as reader:
        assert reader.description(slot) == b'{"step":1}'
        assert reader.read(slot, 0, 20_000) == b"x" * 9_999
        assert reader.read(slot, 9_990, 100) == b"x" * 9


def test_what_waits_is_never_overwritten(path: Path) -> None:
    """Two snapshots fill the arena; only a released slot is given out again, the older one first."""
    made = Arena(path, 100, 100)
    assert [_fill(made, b"one"), _fill(made, b"two")] == [0, 1]
    assert made.free_slot() is None
    first, second = _pending(path)
    with ArenaReader(path) as reader:
        reader.release(second)
        assert made.free_slot() == 1
        reader.release(first)
        assert made.free_slot() == 0, "the newest snapshot stays as long as it can"
        assert _fill(made, b"three") == 0
        assert not reader.holds(first)
        assert reader.holds(second)
        assert reader.description(first) is None
    made.close()


def test_a_death_while_writing_leaves_no_snapshot(path: Path) -> None:
    """A slot that was begun and not completed is neither pending nor in anybody's way."""
    made = Arena(path, 100, 100)
    _fill(made, b"whole")
    made.begin(1)
    made.close()
    assert [slot.index for slot in _pending(path)] == [0]
    again = Arena(path, 100, 100)
    assert again.free_slot() == 1
    assert _fill(again, b"next") == 1
    assert [slot.number for slot in _pending(path)] == [1, 3]
    again.close()


def test_an_arena_that_is_too_small(path: Path) -> None:
    """It is made anew, larger, unless a snapshot in it would be lost."""
    made = Arena(path, 100, 100)
    _fill(made, b"whole")
    assert not made.fits(5000, 100)
    made.close()
    with pytest.raises(ArenaError, match="not on disk yet"):
        Arena(path, 5000, 100)
    with ArenaReader(path) as reader:
        reader.release(_pending(path)[0])
    larger = Arena(path, 5000, 100)
    assert larger.fits(5000, 100)
    larger.close()


def test_too_little_shared_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run directory's disk serves instead, found out before or while the space is taken."""
    monkeypatch.setattr(arena, "_MARGIN_BYTES", 1 << 60)
    Arena(path, 100, 100).close()
    assert path.is_file()
    assert not path.is_symlink()
    monkeypatch.setattr(arena, "_MARGIN_BYTES", 0)
    arena.remove(path)
    allocate, calls = os.posix_fallocate, []

    def full_at_first(descriptor: int, offset: int, length: int) -> None:
        calls.append(length)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", full_at_first)
    made = Arena(path, 100, 100)
    assert len(calls) == 2
    assert not path.is_symlink()
    _fill(made, b"on disk")
    made.close()
    assert len(_pending(path)) == 1


def test_no_arena_and_no_arena_of_ours(path: Path) -> None:
    """A missing one has nothing pending; a foreign file is an error that says so, and for a trainer no obstacle."""
    assert not arena.has_pending(path)
    arena.remove(path)
    path.write_bytes(os.urandom(20_000))
    with pytest.raises(ArenaError, match="no snapshot arena"):
        ArenaReader(path)
    Arena(path, 100, 100).close()
    assert not arena.has_pending(path)


@given(steps=st.lists(st.sampled_from(["snapshot", "release", "die"]), max_size=30))
def test_any_history(tmp_path_factory: pytest.TempPathFactory, steps: list[str]) -> None:
    """Every completed snapshot is pending until it is released, in its order, whatever happens between."""
    path = tmp_path_factory.mktemp("arena") / "arena"
    made, expected, number = Arena(path, 64, 64), list[int](), 0
    try:
        for step in steps:
            if step == "snapshot" and made.free_slot() is not None:
                _fill(made, b"payload")
                number += 1
                expected.append(number)
            elif step == "release" and expected:
                with ArenaReader(path) as reader:
                    reader.release(_pending(path)[0])
                expected.pop(0)
            elif step == "die" and (index := made.free_slot()) is not None:
                made.begin(index)
                number += 1
                made.close()
                made = Arena(path, 64, 64)
            assert [slot.number for slot in _pending(path)] == expected
            assert len(expected) == 2 or made.free_slot() is not None
    finally:
        made.close()
        arena.remove(path)
