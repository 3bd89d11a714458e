"""Cut at any step and gone on from the newest checkpoint: every loss and the final state are those of an uncut run.

To the last bit, with dropout, in both precisions, across an LR overlay and the windows of the prevention ladder, from
every place where a checkpoint may lie.
"""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.attempts import SAVING, TinyRun
from trainer.checkpoint import load_checkpoint
from trainer.contract import arena
from trainer.contract.exit_codes import ExitCode
from trainer.contract.fence import commits_present

_STEPS = 8
_OVERLAY: dict[str, Any] = {"from_step": 3, "factor": 0.5, "hold_until_step": 5, "ramp_steps": 2}


#: Bands so narrow that they act within eight steps.
_RUNGS: dict[str, Any] = {
    "skip_update": {"window_steps": 4, "min_steps": 2, "max_skips": 2, "sigma": 0.1, "min_ratio": 1.0},
    "adaptive_clip": {"warm_up_steps": 2, "z": 0.05, "alpha": 0.5},
}


def _run(root: Path, precision: str, faults: list[dict[str, Any]], **more: Any) -> TinyRun:
    changes = {
        **more,
        "steps": _STEPS,
        "precision": precision,
        "checkpoint": {**SAVING, "every_steps": 2},
        "faults": faults,
    }
    return TinyRun(root, changes)


def _end(run: TinyRun) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and the rest of the last checkpoint's state, less what names the attempt."""
    loaded = load_checkpoint(run.store, commits_present(run.store)[-1])
    return loaded.tensors, {name: loaded.extra[name] for name in ("rng", "position", "tokens", "step", "scaler")}


def _assert_same(cut: TinyRun, whole: TinyRun, attempts: tuple[int, ...]) -> None:
    assert cut.losses(*attempts) == whole.losses(1)
    (one, rest_one), (two, rest_two) = _end(cut), _end(whole)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert rest_one == rest_two


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("overlaid", [False, True])
def test_cut_at_each_step_in_turn(tmp_path: Path, precision: str, overlaid: bool) -> None:
    """An attempt that ends with an exception at step k, for every k, and one that goes on from what is there."""
    plan: dict[str, Any] = {"overlays": (_OVERLAY,)} if overlaid else {}
    whole = _run(tmp_path / "whole", precision, [])
    assert whole.run(**plan) == ExitCode.FINISHED
    for step in range(1, _STEPS + 1):
        cut = _run(tmp_path / f"cut-{step}", precision, [{"kind": "oom", "steps": [step, step]}])
        assert cut.run(**plan) == ExitCode.ERROR
        assert cut.fault_counts() == {"0-oom": 1}
        assert cut.run(2, **plan) == ExitCode.FINISHED
        assert cut.records(2, "started")[0]["step"] == (step - 1) // 2 * 2
        _assert_same(cut, whole, (1, 2))


def _acted(run: TinyRun, *attempts: int) -> dict[int, Any]:
    """Step -> what the rungs did, of the surviving history."""
    rows = [row for attempt in attempts for row in run.records(attempt, "step")]
    return {row["step"]: row["prevention"] for row in rows}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rung", ["skip_update", "adaptive_clip"])
def test_cut_with_a_rung_that_acts(tmp_path: Path, precision: str, rung: str) -> None:
    """The window goes on where it was: the same updates are left out, the same gradients clipped as far."""
    rungs = {"prevention": {rung: _RUNGS[rung]}}
    whole = _run(tmp_path / "whole", precision, [], **rungs)
    assert whole.run() == ExitCode.FINISHED
    acted = _acted(whole, 1)
    names = {"skip_update": ("skipped", "norm"), "adaptive_clip": ("clipped_by", "adaptive_clip")}
    key, value = names[rung]
    acted_at = [step for step, done in acted.items() if done is not None and done[key] == value]
    assert acted_at[:2] == [3, 4]  # so that a cut after 4 goes on from a step that was itself one of them
    for step in (5, 8):
        cut = _run(tmp_path / f"cut-{step}", precision, [{"kind": "oom", "steps": [step, step]}], **rungs)
        assert cut.run() == ExitCode.ERROR
        assert cut.run(2) == ExitCode.FINISHED
        assert cut.records(2, "started")[0]["fresh_guards"] == []
        assert _acted(cut, 1, 2) == acted
        _assert_same(cut, whole, (1, 2))


def test_a_checkpoint_without_a_window_starts_it_anew(tmp_path: Path) -> None:
    """A rung that is turned on between two attempts: loaded all the same, and said in the record and in the log."""
    run = _run(tmp_path / "run", "fp32", [{"kind": "oom", "steps": [5, 5]}])
    assert run.run() == ExitCode.ERROR
    changed = _run(tmp_path / "run", "fp32", [], prevention=_RUNGS)
    assert changed.run(2) == ExitCode.FINISHED
    assert changed.records(2, "started")[0]["fresh_guards"] == ["skip_update", "adaptive_clip"]
    logged = [json.loads(line) for line in changed.paths.log(2).read_text().splitlines()]
    assert [row["rungs"] for row in logged if row["event"] == "guards_start_anew"] == [["skip_update", "adaptive_clip"]]


@pytest.mark.parametrize("place", ["shared memory", "local disk", "store"])
def test_from_every_place(tmp_path: Path, place: str) -> None:
    """Whatever copy is the nearest that is left, what is loaded is the same."""
    whole = _run(tmp_path / "whole", "fp32", [])
    assert whole.run() == ExitCode.FINISHED
    cut = _run(tmp_path / "cut", "fp32", [{"kind": "oom", "steps": [6, 6]}])
    assert cut.run(keep_arena=place == "shared memory") == ExitCode.ERROR
    if place == "store":
        shutil.rmtree(cut.paths.local_tier)
    assert cut.run(2) == ExitCode.FINISHED
    loaded = [row for row in map(json.loads, cut.paths.log(2).read_text().splitlines()) if row["event"] == "loaded"]
    assert [row["from_tier"] for row in loaded] == [place]
    _assert_same(cut, whole, (1, 2))


@pytest.mark.training
def test_killed_at_several_steps(tmp_path: Path) -> None:
    """SIGKILL instead of an exception, in processes of their own."""
    whole = _run(tmp_path / "whole", "bf16", [])
    assert whole.finish() == ExitCode.FINISHED
    kills = [{"kind": "sigkill", "steps": [step, step]} for step in (2, 5, 8)]
    cut = _run(tmp_path / "cut", "bf16", kills)
    assert [cut.finish(attempt) for attempt in (1, 2, 3, 4)] == [-signal.SIGKILL] * 3 + [ExitCode.FINISHED]
    _assert_same(cut, whole, (1, 2, 3, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cut_on_a_gpu(tmp_path: Path, precision: str) -> None:
    """The same there, with deterministic algorithms and copies into pinned shared memory."""
    whole = _run(tmp_path / "whole", precision, [], prevention=_RUNGS)
    assert whole.run() == ExitCode.FINISHED
    cut = _run(tmp_path / "cut", precision, [{"kind": "oom", "steps": [6, 6]}], prevention=_RUNGS)
    assert cut.run() == ExitCode.ERROR
    assert cut.run(2) == ExitCode.FINISHED
    _assert_same(cut, whole, (1, 2))
    assert not arena.has_pending(cut.paths.arena)
