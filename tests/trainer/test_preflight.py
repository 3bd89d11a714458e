"""Preflight: everything that is wrong, at once, each with its remedy, before torch is even imported."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.trainer.attempts import TinyRun
from trainer.contract.exit_codes import ExitCode
from trainer.contract.paths import RunPaths
from trainer.contract.sizes import state_bytes
from trainer.preflight import Problem, check_file, disk_problems, main


def problems(run: TinyRun) -> list[Problem]:
    """What preflight finds in a run's configuration."""
    return check_file(run.paths.run_yaml).problems


def test_a_sound_run_has_no_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is said, the exit code is 0, and the store is left as it was."""
    run = TinyRun(tmp_path)
    assert main(["--config", str(run.paths.run_yaml)]) == ExitCode.FINISHED
    assert capsys.readouterr().out == ""
    assert run.store.list() == []


def test_preflight_never_imports_torch(tmp_path: Path) -> None:
    """It must answer in a fraction of a second."""
    run = TinyRun(tmp_path)
    code = f"""
import sys, trainer.preflight
assert trainer.preflight.main(["--config", {str(run.paths.run_yaml)!r}]) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_problem_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A truncated shard and a store below a file: both are told, with remedies, and the exit code is 2."""
    (tmp_path / "file").write_text("in the way")
    run = TinyRun(tmp_path, {"store": {"url": str(tmp_path / "file" / "store")}})
    shard = tmp_path / "corpus" / "shard-1.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert main(["--config", str(run.paths.run_yaml), "--json"]) == ExitCode.CONFIG
    found = json.loads(capsys.readouterr().out)["problems"]
    assert {row["where"] for row in found} == {"data", "store"}
    assert any("shard-1.bin" in row["what"] for row in found)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": {"layers": 1, "heads": 1, "width": 8, "vocab_size": 32}}, "model.vocab_size 32 is less than the 64"),
        ({"batch": {"sequences": 8, "sequence_tokens": 5000}}, "no shard holds even one sample"),
        ({"model": {"layers": 10_000, "heads": 1, "width": 65_536}}, "GB free"),
    ],
)
def test_what_does_not_fit_is_known_before(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    """Vocabulary, sample length and disk space are compared with what is there."""
    assert any(expected in str(problem) for problem in problems(TinyRun(tmp_path, changes)))


def test_checkpoints_of_a_run_that_goes_on_make_room_for_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they take is given back as they are replaced; two more must fit all the same."""
    run = TinyRun(tmp_path)
    one, run_dir = state_bytes(run.config), tmp_path / "elsewhere"

    def refused(free: int) -> bool:
        room = SimpleNamespace(f_bavail=free, f_frsize=1)
        monkeypatch.setattr("trainer.preflight.os.statvfs", lambda _: room)
        return bool(disk_problems(run.config, tmp_path, run_dir))

    assert not refused(100 * one)
    assert refused(3 * one)
    kept = RunPaths(run_dir).local_tier / "data"
    kept.mkdir(parents=True)
    with (kept / "one").open("wb") as file:
        file.truncate(100 * one)
    (tmp_path / "store").mkdir(exist_ok=True)
    assert not refused(3 * one)
    assert refused(one)


def test_missing_data_names_the_place(tmp_path: Path) -> None:
    """An empty directory is named together with what to do."""
    run = TinyRun(tmp_path)
    for shard in (tmp_path / "corpus").iterdir():
        shard.unlink()
    assert {problem.where for problem in problems(run)} == {"data"}
    assert all(str(tmp_path / "corpus") in problem.what for problem in problems(run))


@pytest.mark.parametrize("text", ["steps: [", "steps: ten", "no_such_key: 1", ""])
def test_what_is_no_configuration_is_said_so(tmp_path: Path, text: str) -> None:
    """Neither a traceback nor silence."""
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert check_file(file).problems[0].where == "config"
    assert check_file(tmp_path / "absent.yaml").problems[0].where == "config"
