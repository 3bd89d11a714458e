"""`longwatch checkpoints`, on checkpoints that were really saved."""

import io
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.cli.app import run
from orchestrator.journal import Folded, Journal
from orchestrator.policy.decisions import PruneCheckpoints
from orchestrator.policy.engine import Engine
from orchestrator.policy.events import CheckpointsPruned, Ticked
from orchestrator.policy.model import Policy
from orchestrator.policy.state import Commit, RunFacts
from orchestrator.process.lock import RunLock
from orchestrator.recovery.catalog import list_checkpoints
from tests.orchestrator.clirun import write_journal
from tests.orchestrator.stored import StoredRun, step_of
from tests.trainer import saving
from trainer.contract.manifest import commit_id
from trainer.contract.verdicts import pin, verdict_key

_HOUR_S = 3600.0


@pytest.fixture(name="stored")
def _stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoredRun:
    """Steps 0 to 60 of attempt 1, an hour apart; attempt 2 went on from step 50 and has saved step 55."""
    monkeypatch.chdir(tmp_path)
    made = StoredRun(tmp_path)
    made.claim(1)
    begun_s = time.time() - 10 * _HOUR_S
    for index, step in enumerate(range(0, 70, 10)):
        made.save(step, at_s=begun_s + index * _HOUR_S)
    made.claim(2, base=commit_id(50, 1, 1), ancestry=tuple(commit_id(step, 1, 1) for step in range(0, 50, 10)))
    made.save(55, 2, good=False, at_s=time.time())
    return made


def _json(capsys: pytest.CaptureFixture[str], *arguments: str, expect: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["checkpoints", *arguments, "--json"]) == expect
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def _steps(stored: StoredRun) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(stored.store)]


# -- list -------------------------------------------------------------------------------------------------------------


def test_list_says_what_is_known_of_each(stored: StoredRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Age by the journal, standing by the store, and whether the run still stands on it; names are never cut short."""
    pin(stored.store, commit_id(20, 1, 1), "kept")

    assert run(["checkpoints", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}

    assert lines["20"].split()[1:3] == ["8", "h"]
    assert lines["20"].split()[4:] == ["good,", "pinned", "store", commit_id(20, 1, 1)]
    assert "rolled back" in lines["60"]
    assert "committed" in lines["55"]
    assert [row["step"] for row in _json(capsys)["checkpoints"]] == [0, 10, 20, 30, 40, 50, 55, 60]


def test_list_shows_what_waits_on_the_disk(stored: StoredRun, capsys: pytest.CaptureFixture[str]) -> None:
    """A save that has not come to the store yet, and one that is in both places."""
    with saving.Saving(stored.store, stored.here / "more", epoch=2) as ours:
        for step in (70, 80):
            ours.snapshot({"model.w": torch.ones(100)}, step)
            ours.persist()
        ours.upload(commit_id(70, 2, 2))
        stored.paths.local_tier.symlink_to(ours.tier.root)

        rows = {row["step"]: row for row in _json(capsys)["checkpoints"]}

    assert [rows[step]["where"] for step in (60, 70, 80)] == [["store"], ["disk", "store"], ["disk"]]
    assert (rows[80]["state"], rows[80]["in_lineage"], rows[80]["bytes"]) == ("committed", True, rows[70]["bytes"])
    assert run(["checkpoints", "pin", "80", "--because", "x"]) == 2
    assert "no checkpoint '80' in the store" in capsys.readouterr().err


def test_times_of_commits_outlive_snapshots(stored: StoredRun, capsys: pytest.CaptureFixture[str]) -> None:
    """What the journal forgets at snapshots is not when a checkpoint was made; what it never knew is not made up."""
    for _ in range(3):
        stored.journal(Folded(Ticked(at_s=2.0)), snapshot=b"{}")
    with closing(Journal.open(stored.paths.database)) as journal:
        assert len(list(journal.events())) < 11

    rows = _json(capsys, "list")["checkpoints"]

    assert all(row["committed_at_s"] > 0 for row in rows)
    stored.paths.database.unlink()
    StoredRun(stored.here)
    assert {row["committed_at_s"] for row in _json(capsys, "list")["checkpoints"]} == {None}


# -- verify, pin ------------------------------------------------------------------------------------------------------


def test_verified_is_what_was_read(stored: StoredRun, capsys: pytest.CaptureFixture[str]) -> None:
    """One by its step, then all; each is marked, a good one stays good."""
    assert _json(capsys, "verify", "55")["verified"][0]["ok"]
    states = {row["step"]: (row["state"], row["verified"]) for row in _json(capsys)["checkpoints"]}
    assert states[55] == ("verified", True)
    assert states[10] == ("good", False)

    assert run(["checkpoints", "verify", "--all", str(stored.paths.root)]) == 0
    assert all(row["verified"] for row in _json(capsys)["checkpoints"])


def test_damage_is_told_and_condemned_only_on_request(stored: StoredRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 1 with the object's name; the verdict is a person's to ask for, and bad outranks good."""
    stored.damage(commit_id(30, 1, 1))

    assert run(["checkpoints", "verify", "--all"]) == 1
    said = capsys.readouterr()
    assert said.out.count("damaged") == 1
    assert "does not match its CRC32C" in said.out
    assert "--condemn" in said.err
    assert {row["state"] for row in _json(capsys)["checkpoints"] if row["step"] == 30} == {"good"}

    assert not _json(capsys, "verify", "30", "--condemn", expect=1)["verified"][0]["ok"]
    (row,) = [row for row in _json(capsys)["checkpoints"] if row["step"] == 30]
    assert (row["state"], row["verified"]) == ("bad", False)


def test_pins_come_and_go(stored: StoredRun, capsys: pytest.CaptureFixture[str]) -> None:
    """A step means the one that the run stands on; the first reason stands."""
    assert run(["checkpoints", "pin", "40", "--because", "end of phase 1"]) == 0
    assert run(["checkpoints", "pin", "40", "--because", "again"]) == 0
    assert "pinned already" in capsys.readouterr().out
    assert [row["step"] for row in _json(capsys)["checkpoints"] if row["pinned"]] == [40]

    assert run(["checkpoints", "unpin", commit_id(40, 1, 1)]) == 0
    assert not any(row["pinned"] for row in _json(capsys)["checkpoints"])


@pytest.mark.parametrize(
    "arguments", [["list"], ["verify", "--all"], ["prune", "--yes"], ["pin", "40", "--because", "x"]]
)
def test_a_store_that_is_away_is_not_an_empty_one(
    stored: StoredRun, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """An unmounted file system: every verb says so, and nothing looks healthy."""
    write_journal(stored.paths, "stopped", last_stored_step=55)
    (stored.here / "store").rename(stored.here / "elsewhere")
    assert run(["checkpoints", *arguments]) == 1
    assert "although step 55 was committed; bring it back (is it mounted?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pin", "41", "--because", "x"], "there is no checkpoint '41'"),
        (["verify"], "--all"),
        (["verify", "10", "runs/tiny", "--all"], "--all"),
        (["prune", "--max-age", "30"], "a number with a unit"),
    ],
)
def test_usage_is_checked(
    stored: StoredRun, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2 with the remedy, and nothing is changed."""
    assert run(["checkpoints", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert len(_steps(stored)) == 8


# -- prune ------------------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_and_touches_nothing(stored: StoredRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Also beside a supervisor."""
    with RunLock(stored.paths.lock):
        assert run(["checkpoints", "prune", "--keep-good", "2", "--max-age", "1h", "--dry-run"]) == 0

    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "delete" in lines["10"]
    assert "step 0" in lines["0"]
    assert "not of this lineage" in lines["60"]
    assert len(_steps(stored)) == 8


def test_a_program_is_never_asked(stored: StoredRun, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON without --yes would tell of deletions that nobody has confirmed."""
    assert run(["checkpoints", "prune", "--json"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "--yes" in said.err


def test_pruning_keeps_what_may_be_needed(stored: StoredRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Last good ones, what the next attempt loads, pins, step 0 and the newest stay, whatever is asked for."""
    pin(stored.store, commit_id(10, 1, 1), "kept")

    said = _json(capsys, "prune", "--keep-good", "2", "--max-age", "1s", "--rolled-back", "--yes")

    assert [step_of(name) for name in said["delete"]] == [20, 30, 60]
    assert said["keep"][commit_id(50, 1, 1)] == "being restored"
    assert _steps(stored) == [0, 10, 40, 50, 55]
    assert {item.key.split("/")[1] for item in stored.store.list("data/")} == {
        checkpoint.id for checkpoint in list_checkpoints(stored.store)
    }


def test_nothing_is_deleted_without_a_yes(
    stored: StoredRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The question is no part of the result."""
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))

    assert run(["checkpoints", "prune", "--keep-good", "2", "--max-age", "1h"]) == 1

    captured = capsys.readouterr()
    assert "for good?" in captured.err
    assert "for good?" not in captured.out
    assert len(_steps(stored)) == 8


@pytest.mark.parametrize("lock", ["lock", "child_lock", "uploader_lock"])
def test_a_run_that_runs_is_left_alone(stored: StoredRun, lock: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its supervisor prunes by itself; a trainer without one still writes."""
    paths = stored.paths
    locks = {"lock": paths.lock, "child_lock": paths.child_lock, "uploader_lock": paths.keeper_lock("uploader")}
    with RunLock(locks[lock]):
        assert run(["checkpoints", "prune", "--max-age", "1h", "--yes"]) == 1

    assert "held by" in capsys.readouterr().err
    assert len(_steps(stored)) == 8


def test_a_run_that_went_on_elsewhere_is_left_alone(stored: StoredRun, capsys: pytest.CaptureFixture[str]) -> None:
    """A newer epoch than this journal knows belongs to another supervisor."""
    other = StoredRun(stored.here, run_dir="elsewhere")
    other.claim(3, base=commit_id(55, 2, 2))

    assert run(["checkpoints", "prune", str(stored.paths.root), "--max-age", "1h", "--yes"]) == 1
    assert "epoch 2 is not ours" in capsys.readouterr().err
    assert len(_steps(stored)) == 8


def test_the_engine_is_told_before_the_first_one_goes(stored: StoredRun) -> None:
    """Even if deleting fails half-way, nothing is rolled back to what may be gone; the next pruning ends it."""
    in_the_way = stored.store.local_path(verdict_key(commit_id(10, 1, 1), "bad"))
    assert in_the_way is not None
    in_the_way.mkdir()
    prune = ["checkpoints", "prune", "--keep-good", "2", "--max-age", "1h", "--yes"]
    assert run(prune) == 1
    assert _steps(stored) == [0, 20, 30, 40, 50, 55, 60]

    with closing(Journal.read_only(stored.paths.database)) as journal:
        (event,) = [event for event in journal.events() if isinstance(event, CheckpointsPruned)]
    in_the_way.rmdir()
    stored.claim(3, base=commit_id(55, 2, 2), ancestry=tuple(commit_id(step, 1, 1) for step in (0, 20, 30, 40, 50)))
    assert run(prune) == 0
    assert not [item for item in stored.store.list() if commit_id(10, 1, 1) in item.key]
    engine = Engine(Policy(version=1), RunFacts(run_id="tiny", total_steps=9, warmup_steps=0, batch_samples=1))
    for step in (0, 10, 20, 50):
        engine.state.commits.append(Commit(id=commit_id(step, 1, 1), step=step, position=step, tokens=step))
    assert engine.fold(event) == []
    assert [commit.step for commit in engine.state.commits] == [0, 50]
    assert not any(isinstance(one, PruneCheckpoints) for one in engine.fold(Ticked(at_s=1.0)))
