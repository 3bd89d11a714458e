"""A run that exists, launched again: what is refused, what is said, and that nothing is lost by it."""

import json
from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.cli.app import run
from orchestrator.config import resolve, write_resolved
from orchestrator.launching import HaltedError, RunExistsError, prepare, set_aside
from orchestrator.policy.decisions import EndRun
from orchestrator.preflight import Data
from orchestrator.process.lock import RunLock
from tests.orchestrator.clirun import write_journal, write_run
from trainer.contract import fence
from trainer.contract.paths import RunPaths
from trainer.contract.store import open_store


@pytest.fixture(name="here")
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_frozen_key_that_changed_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run directory knows what the run was."""
    path = write_run(here)
    resolved = resolve(path)
    write_resolved(resolved)
    write_journal(resolved.paths, "stopped")

    assert run(["launch", str(path), "--set", "model.width=64"]) == 2
    assert "--set model.width: model.width: may not change" in capsys.readouterr().err


def test_halted_run_is_left_as_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 3 with the way on; not a byte of the journal changes."""
    path = write_run(here)
    resolved = resolve(path)
    write_resolved(resolved)
    write_journal(resolved.paths, "halted", end=EndRun(state="halted", exit_code=3, because="relapsed too often"))
    before = resolved.paths.database.read_bytes()

    assert run(["launch", str(path)]) == 3

    said = capsys.readouterr().err
    assert "relapsed too often" in said
    assert f"longwatch resume {resolved.paths.root} --because TEXT" in said
    assert resolved.paths.database.read_bytes() == before


def test_used_up_budget_has_its_own_exit_code(here: Path) -> None:
    """4, from the decision that ended the run."""
    resolved = resolve(write_run(here))
    write_journal(resolved.paths, "halted", end=EndRun(state="budget_used_up", exit_code=4, because="6 rollbacks"))

    with pytest.raises(HaltedError) as caught:
        prepare(resolved)

    assert caught.value.exit_code == 4


def test_run_in_the_store_is_never_started_from_scratch_silently(here: Path) -> None:
    """A run directory was lost: refused with the ways on; `--fresh` says that it is meant."""
    resolved = resolve(write_run(here))
    with closing(open_store(resolved.config.store, here, resolved.config.name)) as store:
        store.make_place()
        fence.claim(store, fence.Fence(run_id="tiny", epoch=3, nonce="n" * 16, host="h", pid=1, base=None))

    with pytest.raises(RunExistsError, match="--fresh"):
        prepare(resolved)
    ready = prepare(resolved, fresh=True)

    assert ready.fresh
    ready.store.close()


def test_fresh_sets_the_old_run_aside(here: Path) -> None:
    """Nothing is destroyed: the old directory keeps its content under another name, each time a new one."""
    paths = RunPaths(here / "runs" / "x")
    for number in (1, 2):
        paths.create()
        (paths.root / "run.db").write_text(str(number))

        aside = set_aside(paths)

        assert aside == here / "runs" / f"x.old-{number}"
        assert (aside / "run.db").read_text() == str(number)
    assert set_aside(paths) is None


def test_resume_needs_a_reason(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty reason is none."""
    resolved = resolve(write_run(here))
    write_resolved(resolved)
    write_journal(resolved.paths, "halted")

    assert run(["resume", str(resolved.paths.root), "--because", " "]) == 2
    assert "--because" in capsys.readouterr().err


def test_fewer_steps_than_are_done_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A typo in `steps` must not end a run for good."""
    made = resolve(write_run(here))
    write_resolved(made)
    write_journal(made.paths, state="stopped", step=50)

    assert run(["launch", "run.yaml", "--set", "steps=20"]) == 2
    assert "50 steps are done already" in capsys.readouterr().err


def _begun(here: Path) -> tuple[Path, Data]:
    """A run that was stopped, and what its launch knew of the data."""
    file = write_run(here)
    made = resolve(file)
    write_resolved(made)
    write_journal(made.paths, state="stopped")
    found = prepare(made).data
    assert found is not None
    made.paths.data_book.write_text(json.dumps(found.book))
    return file, found


def test_shards_that_changed_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every position in the data would mean another sample; what is allowed is said."""
    _begun(here)
    shard = here / "corpus" / "shard-000.bin"
    shard.rename(here / "corpus" / "shard-00x.bin")

    assert run(["launch", "run.yaml"]) == 2
    said = capsys.readouterr().err
    assert "shard-000.bin is missing" in said
    assert "not the shards that the run began with" in said
    assert "shards may be added" in said


def test_shards_that_were_added_get_the_next_numbers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever they sort in their directory; what was known keeps its numbers, and it is said what is new."""
    file, before = _begun(here)
    (here / "corpus" / "shard-000a.bin").write_bytes((here / "corpus" / "shard-000.bin").read_bytes())

    found = prepare(resolve(file)).data

    assert found is not None
    assert found.changes == ("source train has 1 more shards, which it reads from its next epoch on",)
    assert found.book["shards"][:-1] == before.book["shards"]
    assert found.book["shards"][-1]["shard"]["name"] == "shard-000a.bin"
    assert found.order != before.order
    assert run(["check", str(file)]) == 0
    assert "source train has 1 more shards" in capsys.readouterr().out


def test_data_that_moved_is_the_same_data(here: Path) -> None:
    """The order does not depend on where the shards lie."""
    file, before = _begun(here)
    (here / "corpus").rename(here / "elsewhere")

    found = prepare(resolve(file, ["data.train=elsewhere", "data.validation=elsewhere"])).data

    assert found is not None
    assert found.order == before.order
    assert found.changes == (f"source train has moved to {here / 'elsewhere'}",)


def test_other_data_waits_until_the_trainer_has_ended(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that lives reads what it began with."""
    _begun(here)
    child_lock = resolve(here / "run.yaml").paths.child_lock
    with RunLock(child_lock):
        assert run(["launch", "run.yaml", "--set", "data.train=elsewhere"]) == 2
    assert "a trainer still runs" in capsys.readouterr().err


def test_a_store_that_is_not_mounted_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a new one is made in its place; and a check says so too."""
    made = resolve(write_run(here))
    write_resolved(made)
    write_journal(made.paths, state="stopped", last_stored_step=5)

    for verb in ("check", "launch"):
        assert run([verb, "run.yaml"]) == 2
        assert "holds no checkpoint of this run, although step 5 was committed" in capsys.readouterr().err
    assert not (here / "store").exists()


def test_a_run_that_was_set_aside_is_not_taken_for_the_new_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its source runs elsewhere now."""
    made = resolve(write_run(here))
    write_resolved(made)
    write_journal(made.paths)
    aside = set_aside(made.paths)
    assert aside is not None

    assert run(["resume", str(aside), "--because", "x"]) == 2
    assert "was set aside or moved" in capsys.readouterr().err


def test_a_damaged_fence_is_named_with_its_remedy(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback, no library's page."""
    made = resolve(write_run(here))
    write_resolved(made)
    write_journal(made.paths)
    with closing(open_store(made.config.store, here, made.config.name)) as store:
        store.make_place()
        store.create(fence.fence_key(1), b"{")

    assert run(["checkpoints", str(made.paths.root)]) == 1
    said = capsys.readouterr().err
    assert "fence/e1.json is damaged; remove that object by hand" in said
    assert len(said.splitlines()) == 1


def test_a_journal_that_was_only_just_created_is_a_new_run(here: Path) -> None:
    """The supervisor was killed in its first milliseconds: nothing is there that could be lost."""
    made = resolve(write_run(here))
    made.paths.create()
    made.paths.database.touch()

    assert prepare(made).changed == ()
