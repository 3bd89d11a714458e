"""The machine is lost, or only seems so: another one, with nothing but run.yaml and the store, goes on with the run."""

import os
import signal
from pathlib import Path

import pytest

from orchestrator.process.child import session_members
from orchestrator.process.lock import holders
from tests.runs import Run, tiny_config, wait_until
from trainer.contract import fence
from trainer.contract.config import StoreConfig
from trainer.contract.manifest import parse_commit_id
from trainer.contract.paths import KEEPER_ROLES
from trainer.contract.store import open_store

pytestmark = pytest.mark.training
_STEPS = 100


def _machine(root: Path, store: Path, corpus: Path) -> Run:
    return Run(root, tiny_config(corpus, steps=_STEPS, store={"url": str(store)}))


def _until_some_commits(store: Path) -> None:
    wait_until(lambda: len(list((store / "tiny" / "commits").glob("*.json"))) > 3, "some commits in the store")


def _losses(run: Run) -> dict[int, float]:
    return {step: row["loss"] for step, row in run.surviving_steps().items()}


def test_another_machine_goes_on(tmp_path: Path, corpus: Path) -> None:
    """Killed with its keepers, gone with its disk: the same losses to the last bit, every sample accounted for."""
    undisturbed = _machine(tmp_path / "a", tmp_path / "store-a", corpus)
    undisturbed.launch()
    lost = _machine(tmp_path / "b", tmp_path / "store-b", corpus)
    process = lost.start()
    _until_some_commits(tmp_path / "store-b")
    lost.kill_everything(process)
    process.communicate()

    moved = _machine(tmp_path / "c", tmp_path / "store-b", corpus)
    said = moved.launch("--take-over")

    assert "was built from the journal" in said
    assert _losses(moved) == _losses(undisturbed)
    assert [attempt["cause"] for attempt in moved.attempts()] == ["host_lost", "finished"]
    crash = moved.incident("crash")
    assert (crash["cause"], crash["outcome"]) == ("host_lost", "worked")
    assert moved.cli("ledger", "--check")["ok"]


@pytest.mark.long
def test_a_machine_that_was_only_asleep_commits_nothing(tmp_path: Path, corpus: Path) -> None:
    """All its processes stand still, another takes over, they wake: what they write is inert, and they end."""
    asleep = _machine(tmp_path / "a", tmp_path / "store", corpus)
    process = asleep.start()
    _until_some_commits(tmp_path / "store")
    locks = [asleep.paths.child_lock, *(asleep.paths.keeper_lock(role) for role in KEEPER_ROLES)]
    pids = {process.pid, *(pid for lock in locks for pid in holders(lock))}
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    awake = _machine(tmp_path / "b", tmp_path / "store", corpus)
    awake.launch("--take-over")
    for pid in pids:
        os.kill(pid, signal.SIGCONT)

    asleep.wait(process, expect=1)

    opened = open_store(StoreConfig(url=str(tmp_path / "store")), tmp_path, "tiny")
    lineage = fence.lineage(opened)
    opened.close()
    assert parse_commit_id(lineage.commits[-1]).step == _STEPS
    assert sorted(step for step in _losses(awake)) == list(range(1, _STEPS + 1))
    assert awake.cli("ledger", "--check")["ok"]
    assert not any(list(session_members(pid)) for pid in pids if pid != process.pid)
