"""Writer and uploader as processes: killed, full disks, silent stores. Supervised as the supervisor does it."""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from orchestrator.launching import set_aside
from orchestrator.process.keepers import Keepers
from tests.stores import claimed
from tests.trainer.saving import Saving, full_state, trained
from trainer.checkpoint import Author, Snapshotter, load_checkpoint
from trainer.contract import arena
from trainer.contract.backends import LocalBackend
from trainer.contract.config import RunConfig, StoreConfig
from trainer.contract.fence import commits_present
from trainer.contract.manifest import commit_id
from trainer.contract.paths import KEEPER_ROLES, KeeperRole, RunPaths
from trainer.contract.store import Store, StoreDenied, open_store
from trainer.keeping.tier import Inventory, LocalTier
from trainer.keeping.uploader import Uploader
from trainer.reporter import Reporter

_DEADLINE_S = 60.0


class Bench:
    """A run directory with both processes, and a trainer's hand on the arena."""

    def __init__(self, root: Path, **changes: Any) -> None:
        self.paths = RunPaths(root / "run")
        self.paths.create()
        settings: dict[str, Any] = {
            "name": "r",
            "steps": 9999,
            "data": {"train": "x"},
            "store": {"url": str(root / "s")},
        }
        self.config = RunConfig.model_validate(settings | changes)
        self.paths.run_yaml.write_text(self.config.model_dump_json(by_alias=True))
        self.store = claimed(open_store(self.config.store, self.paths.root, "r"))
        self.tier = LocalTier(self.paths.local_tier)
        self.keepers = Keepers(self.paths, {}, silence_s=30.0)
        self.snapshotter = Snapshotter(self.paths.arena, Author("r", 1, 1, "c"), object_bytes=700)

    def snapshot(self, step: int) -> str:
        """Copy a state that differs from step to step."""
        return self.snapshotter.snapshot(_state(step), {}, step=step, position=step, tokens=step).commit

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Watch the processes until something is so."""
        end_s = time.monotonic() + _DEADLINE_S
        while not condition():
            assert time.monotonic() < end_s, f"{what}: not within {_DEADLINE_S} s\n{self.logs()}"
            self.keepers.watch(time.monotonic())
            time.sleep(0.01)

    def logs(self) -> str:
        """What the processes wrote."""
        files = [
            file for role in KEEPER_ROLES for file in (self.paths.keeper_log(role), self.paths.keeper_output(role))
        ]
        return "\n".join(file.read_text()[-2000:] for file in files if file.exists())

    def pid(self, role: KeeperRole) -> int:
        """The process of a role."""
        found = self.keepers.pid(role)
        assert found is not None
        return found

    def records(self, role: KeeperRole) -> list[dict[str, Any]]:
        """What a role reported."""
        file = self.paths.keeper_records(role)
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def close(self) -> None:
        """End everything."""
        self.snapshotter.close()
        self.keepers.stop(_DEADLINE_S)
        arena.remove(self.paths.arena)


def _state(step: int) -> dict[str, torch.Tensor]:
    return full_state(*trained(steps=step))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Started with the default settings."""
    made = Bench(tmp_path)
    made.keepers.start()
    yield made
    made.close()


def test_from_arena_to_store(bench: Bench) -> None:
    """A snapshot is on disk, then in the store, to the last bit; each place is told once, with the attempt's number."""
    commit = bench.snapshot(3)
    bench.until(lambda: commit in commits_present(bench.store), "the commit")
    bench.until(lambda: bench.records("uploader") != [], "its record")
    loaded = load_checkpoint(bench.store, commit)
    expected = _state(3)
    assert loaded.tensors.keys() == expected.keys()
    assert all(torch.equal(loaded.tensors[name], expected[name]) for name in expected)
    told = [(row["seq"], row["attempt"], row["kind"], row["tier"]) for row in bench.records("writer")]
    assert told == [(1, 1, "commit", "disk")]
    told = [(row["seq"], row["attempt"], row["kind"], row["tier"]) for row in bench.records("uploader")]
    assert told == [(1, 1, "commit", "store")]
    assert bench.tier.inventory().uploaded == (commit,)


@pytest.mark.parametrize("role", KEEPER_ROLES)
def test_killed_again_and_again(tmp_path: Path, role: KeeperRole) -> None:
    """SIGKILL at whatever it is doing: it is started again, every snapshot arrives, each is told, numbers rise."""
    bench = Bench(tmp_path, checkpoint={"keep_local": 9})
    bench.keepers.start()
    try:
        _kill_often(bench, role)
    finally:
        bench.close()


def _kill_often(bench: Bench, role: KeeperRole) -> None:
    commits = []
    for step in (2, 3, 4):
        bench.until(bench.snapshotter.ready, "a free slot")
        commits.append(bench.snapshot(step))
        old = bench.pid(role)
        os.kill(old, signal.SIGKILL)
        bench.until(lambda old=old: bench.keepers.pid(role) is None, "its death")  # type: ignore[misc]
        bench.until(lambda: bench.keepers.pid(role) is not None, "the next one")
    bench.until(lambda: set(commits) <= set(commits_present(bench.store)), "all commits")
    for commit in commits:
        assert load_checkpoint(bench.store, commit).manifest.commit == commit
    bench.keepers.stop(_DEADLINE_S)
    for other in KEEPER_ROLES:
        rows = bench.records(other)
        assert [row["seq"] for row in rows] == list(range(1, len(rows) + 1))
        assert {row["commit"] for row in rows} == set(commits)
    assert not list(bench.tier.scratch.glob("r0-*"))


def test_told_to_leave_they_finish_first(bench: Bench) -> None:
    """What was snapshotted before is in the store when both have ended, and the arena is gone."""
    commits = [bench.snapshot(step) for step in (2, 3)]
    bench.keepers.stop(_DEADLINE_S)
    assert commits_present(bench.store) == tuple(commits)
    assert not os.path.lexists(bench.paths.arena)
    assert list(bench.tier.scratch.iterdir()) == []


def test_a_run_that_is_set_aside_takes_its_keepers_with_it(bench: Bench) -> None:
    """They know the directory by its name, and would serve the run that begins in its place."""
    bench.snapshot(1)
    old = [keeper.process for keeper in bench.keepers._keepers.values()]
    memory = os.readlink(bench.paths.arena)
    bench.keepers.let_go()
    bench.snapshotter.close()
    set_aside(bench.paths)
    assert [process.wait(_DEADLINE_S) for process in old if process is not None] == [-signal.SIGKILL] * 2
    assert not os.path.exists(memory)


def test_keepers_of_a_directory_that_was_removed_leave(bench: Bench) -> None:
    """Whoever deletes a run directory and launches again gets no second writer from the past."""
    bench.until(lambda: all(bench.paths.keeper_liveness(role).exists() for role in KEEPER_ROLES), "both to listen")
    old = [keeper.process for keeper in bench.keepers._keepers.values()]
    bench.keepers.let_go()
    for role in KEEPER_ROLES:
        bench.paths.keeper_lock(role).unlink()
    assert [process.wait(_DEADLINE_S) for process in old if process is not None] == [0, 0]


def test_a_new_supervisor_ends_those_of_the_old(bench: Bench) -> None:
    """Two of a role never work at once: the old ones are killed before the new ones start."""
    old = [keeper.process for keeper in bench.keepers._keepers.values()]
    bench.keepers.let_go()
    bench.keepers = Keepers(bench.paths, {}, silence_s=30.0)
    bench.keepers.start()
    for process in old:
        assert process is not None
        assert process.wait(_DEADLINE_S) == -signal.SIGKILL
    commit = bench.snapshot(1)
    bench.until(lambda: commit in commits_present(bench.store), "the commit")


def test_a_silent_one_is_killed(tmp_path: Path) -> None:
    """Stopped by the kernel it shows no progress; it is killed and another does the work."""
    bench = Bench(tmp_path)
    bench.keepers = Keepers(bench.paths, {}, silence_s=1.0)
    bench.keepers.start()
    try:
        bench.until(lambda: bench.paths.keeper_liveness("writer").exists(), "the writer")
        stopped = bench.pid("writer")
        os.kill(stopped, signal.SIGSTOP)
        commit = bench.snapshot(1)
        bench.until(lambda: commit in commits_present(bench.store), "the commit")
        assert bench.pid("writer") != stopped
    finally:
        bench.close()


def test_a_damaged_local_copy_is_not_sent(tmp_path: Path) -> None:
    """A byte that changed on the local disk is found before the upload, and the checkpoint given up with the reason."""
    bench = Bench(tmp_path)
    commit = bench.snapshot(2)
    bench.keepers.start()
    try:
        bench.until(lambda: commit in commits_present(bench.store), "the first")
        bench.keepers.stop(_DEADLINE_S)
        (bench.tier.root / f"uploaded/{commit}.json").unlink()
        bench.store.delete(f"commits/{commit}.json")
        victim = next(iter(sorted((bench.tier.root / "data" / commit).iterdir())))
        raw = bytearray(victim.read_bytes())
        raw[len(raw) // 2] ^= 1
        victim.write_bytes(raw)
        bench.keepers.start()
        bench.until(lambda: any(row["kind"] == "commit_failed" for row in bench.records("uploader")), "the finding")
        (row,) = (row for row in bench.records("uploader") if row["kind"] == "commit_failed")
        assert row["gone"]
        assert "changed on the local disk" in row["error"]
        assert bench.tier.inventory().waiting == ()
        assert commits_present(bench.store) == ()
    finally:
        bench.close()


def test_a_store_that_is_away_gets_the_newest_first(tmp_path: Path) -> None:
    """While nothing can be stored the local disk is bounded, what is passed over is told, and what a recovery needs
    stays on it; the newest arrives when the file system is mounted again, and nothing was written in its place."""
    place, unmounted = tmp_path / "s", tmp_path / "unmounted"
    bench = Bench(tmp_path)
    place.rename(unmounted)
    needed = commit_id(1, 1, 1)
    bench.paths.needed_commits.write_text(json.dumps([needed]))
    bench.keepers.start()
    try:
        for step in range(1, 7):
            bench.until(bench.snapshotter.ready, "a free slot")
            newest = bench.snapshot(step)
            bench.until(lambda: not arena.has_pending(bench.paths.arena), "the disk")
        keep = bench.config.checkpoint.keep_local
        bench.until(lambda: len(bench.tier.inventory().waiting) <= keep + 2, "room to be made")
        assert needed in bench.tier.inventory().waiting
        assert not place.exists()
        unmounted.rename(place)
        bench.until(lambda: {newest, needed} <= {*commits_present(bench.store)}, "the newest and what is needed")
        gone = {row["step"] for role in KEEPER_ROLES for row in bench.records(role) if row.get("gone")}
        arrived = {int(commit[:12]) for commit in commits_present(bench.store)}
        assert {2, 3} <= gone
        assert gone.isdisjoint(arrived)
        assert commit_id(6, 1, 1) == newest
    finally:
        bench.close()


def test_a_description_that_is_not_understood_is_no_obstacle(bench: Bench) -> None:
    """Of another version of the program, say: it is given up, and the next snapshot is saved."""
    first = bench.snapshot(1)
    bench.until(lambda: first in commits_present(bench.store), "the first")
    opened = arena.Arena(bench.paths.arena, 100, 100)
    index = opened.free_slot()
    assert index is not None
    opened.complete(index, opened.begin(index), 10, b'{"of": "another version"}')
    opened.close()
    bench.until(lambda: not arena.has_pending(bench.paths.arena), "the slot to be given back")
    second = bench.snapshot(2)
    bench.until(lambda: second in commits_present(bench.store), "the next one")


class _Full(LocalBackend):
    """A disk on which nothing can be created any more, and things can be removed."""

    def create(self, key: str, data: bytes, timeout_s: float) -> None:
        """No space."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _NoFaults:
    """Nothing goes wrong on purpose."""

    def before_upload(self, attempt: int, step: int) -> None:
        """Nothing."""

    def after_upload(self, attempt: int, step: int, commit: str) -> None:
        """Nothing."""


def test_a_disk_that_takes_no_marks(tmp_path: Path) -> None:
    """The upload that will make room is done all the same; what is in the store and can't be marked so goes."""
    store = claimed(open_store(StoreConfig(url="file://./store"), tmp_path, "run-1"))
    paths = RunPaths(tmp_path / "run")
    paths.create()
    with Saving(store, paths.root) as saving, closing(Reporter.of_keeper(paths, "uploader")) as reporter:
        commit = saving.snapshot(_state(1))
        saving.persist()
        uploader = Uploader(
            paths, store, reporter, lambda: None, _NoFaults(), lambda: None, keep=2, clock=time.monotonic
        )
        uploader._tier.store.backend = _Full(paths.local_tier)
        assert uploader.turn()
        assert not uploader.turn()
    assert commits_present(store) == (commit,)
    assert saving.tier.inventory() == Inventory((), (), None)
    rows = [json.loads(line) for line in paths.keeper_records("uploader").read_text().splitlines()]
    assert [(row["kind"], row["commit"]) for row in rows] == [("commit", commit)]


class _NoHousekeeping(Store):
    """May write and read, but not look for what is unfinished."""

    def abort_unfinished(self, prefix: str) -> int:
        """Denied."""
        raise StoreDenied(self.url, "not allowed to list multipart uploads")


def test_housekeeping_that_is_denied_holds_up_no_upload(tmp_path: Path) -> None:
    """A minimal policy for a bucket often lacks just this permission."""
    store = claimed(_NoHousekeeping(LocalBackend(tmp_path / "store"), "test://", 1.0))
    paths = RunPaths(tmp_path / "run")
    paths.create()
    with Saving(store, paths.root) as saving, closing(Reporter.of_keeper(paths, "uploader")) as reporter:
        commit = saving.snapshot(_state(1))
        saving.persist()
        assert Uploader(
            paths, store, reporter, lambda: None, _NoFaults(), lambda: None, keep=2, clock=time.monotonic
        ).turn()
    assert commits_present(store) == (commit,)


def test_a_machine_that_starts_no_process(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that cannot be started again is tried again later, and the supervisor goes on meanwhile."""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/nowhere/python")
        os.kill(bench.pid("writer"), signal.SIGKILL)
        bench.until(lambda: bench.keepers.pid("writer") is None, "its death")
        with capture_logs() as said:
            bench.until(lambda: any(one["event"] == "keeper_not_started" for one in said), "a try that fails")
        assert bench.keepers.pid("writer") is None
    commit = bench.snapshot(1)
    bench.until(lambda: commit in commits_present(bench.store), "the commit")
