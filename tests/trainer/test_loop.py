"""The loop: what a step says of itself, and what happens at a boundary. Attempts run in this process."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.attempts import SAVING, TinyRun
from trainer.checkpoint import load_checkpoint
from trainer.contract.commands import ApplyPlan, CheckpointNow, EvaluateNow, Leave, append_command
from trainer.contract.exit_codes import ExitCode
from trainer.contract.fence import commits_present
from trainer.contract.plan import PlanUpdate
from trainer.schedule import lr_at


def test_a_run_from_first_to_last_step(tmp_path: Path) -> None:
    """Step 0 and the last step are committed, ranges tile, the learning rate is the schedule's, phases follow."""
    run = TinyRun(tmp_path)
    assert run.run() == ExitCode.FINISHED
    steps = run.records(1, "step")
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert steps[0]["data"]["begin"] == 0
    assert all(one["data"]["end"] == two["data"]["begin"] for one, two in itertools.pairwise(steps))
    for row in steps:
        planned = lr_at(row["step"] - 1, run.config.schedule, run.config.optimizer.peak_lr, run.config.steps)
        assert row["lr"] == row["lr_planned"] == planned
        sequences = sum(count for count, _ in row["shards"].values())
        total = sum(losses for _, losses in row["shards"].values())
        assert sequences == 8
        assert total / sequences == pytest.approx(row["loss"], rel=1e-5)
        assert row["worst"][1] >= row["loss"]
    assert [row["step"] for row in run.records(1, "commit")] == [0, 4, 8, 12]
    assert [row["step"] for row in run.records(1, "activation")] == [5, 10]
    assert [row["step"] for row in run.records(1, "eval")] == [12]
    assert [row["reason"] for row in run.records(1, "finished")] == ["finished"]
    told = (row["phase"] for row in run.records(1, "phase") if row["phase"] != "save")
    phases = [phase for phase, _ in itertools.groupby(told)]
    assert phases == ["warm_up", "train", "evaluate", "train", "leave"]
    assert run.exit_file(1) == {"code": 0, "reason": "finished", "error": None}


def test_overlays_lower_the_rate_from_the_first_step_after_the_load(tmp_path: Path) -> None:
    """An overlay that begins later is re-anchored to the loaded step and proved by the records."""
    run = TinyRun(tmp_path)
    assert run.run() == ExitCode.FINISHED
    target = commits_present(run.store)[1]
    overlay = {"from_step": 9, "factor": 0.5, "hold_until_step": 8, "ramp_steps": 2}
    assert run.run(2, candidates=(target,), overlays=(overlay,), reanchor=True) == ExitCode.FINISHED
    factors = [row["lr"] / run.config.optimizer.peak_lr for row in run.records(2, "step")]
    assert factors == pytest.approx([0.5] * 4 + [0.75] + [1.0] * 3)


def test_a_damaged_candidate_is_condemned_and_the_next_one_loaded(tmp_path: Path) -> None:
    """The newest commit was corrupted after its save: the older one is loaded, the started record says why."""
    fault = {"kind": "corrupt_checkpoint", "steps": [12, 12]}
    run = TinyRun(tmp_path, {"faults": [fault]})
    assert run.run() == ExitCode.FINISHED
    assert run.run(2) == ExitCode.FINISHED
    (started,) = run.records(2, "started")
    assert started["step"] == 8
    assert [row["commit"] for row in started["condemned"]] == ["000000000012-e1-1"]
    assert "CRC32C" in started["condemned"][0]["why"]
    assert started["probe_loss"] == started["probe_expected"]


def test_no_candidate_left_is_its_own_exit_code(tmp_path: Path) -> None:
    """Nothing that verifies: 66, and nothing was changed."""
    run = TinyRun(tmp_path)
    assert run.run(2, candidates=("000000000004-e1-1",)) == ExitCode.CHECKPOINT
    assert run.exit_file(2)["error"]["type"] == "NoCandidateError"
    assert not run.paths.records(2).read_text().count('"kind":"step"')


def test_non_finite_updates_are_neither_applied_nor_committed(tmp_path: Path) -> None:
    """A NaN at the step of a checkpoint: the update is left out, the save is refused and said so."""
    run = TinyRun(tmp_path, {"faults": [{"kind": "nan_grad", "steps": [8, 8]}]})
    assert run.run() == ExitCode.FINISHED
    assert [row["step"] for row in run.records(1, "step") if row["skipped"]] == [8]
    assert [row["step"] for row in run.records(1, "commit_failed")] == [8]
    assert [row["step"] for row in run.records(1, "commit")] == [0, 4, 12]
    loaded = load_checkpoint(run.store, "000000000012-e1-1")
    assert all(tensor.isfinite().all() for tensor in loaded.tensors.values())
    assert loaded.extra["skipped_updates"] == 1


def test_a_state_that_is_not_finite_is_never_committed(tmp_path: Path) -> None:
    """Weights beyond what a float holds: no later checkpoint exists, the end is an error."""
    overflow = {"kind": "scale_qk", "steps": [6, 6], "factor": 1e38}
    run = TinyRun(tmp_path, {"faults": [overflow, overflow]})
    assert run.run() == ExitCode.STORE
    assert {row["step"] for row in run.records(1, "commit")} == {0, 4}
    assert run.exit_file(1)["error"]["type"] == "SaveFailedError"


def test_commands_are_answered(tmp_path: Path) -> None:
    """Evaluate, checkpoint and a new plan are each answered by a record, then the wish to leave is met."""
    run = TinyRun(tmp_path, {"checkpoint": {**SAVING, "every_steps": 1000}})
    mailbox = run.paths.commands(1)
    overlay: dict[str, Any] = {"from_step": 0, "factor": 0.25, "hold_until_step": 100}
    append_command(mailbox, EvaluateNow(id=1))
    append_command(mailbox, ApplyPlan(id=2, update=PlanUpdate.model_validate({"overlays": (overlay,)})))
    assert run.run() == ExitCode.FINISHED
    assert [(row["command"], row["step"]) for row in run.records(1, "eval")] == [(1, 0), (None, 12)]
    assert [(row["command"], row["step"], row["position"]) for row in run.records(1, "plan_applied")] == [(2, 0, 0)]
    assert run.records(1, "step")[-1]["lr"] == 0.25 * run.config.optimizer.peak_lr


@pytest.mark.parametrize(("save", "code", "reason"), [(True, 75, "preempted"), (False, 76, "left")])
def test_leaving_on_command(tmp_path: Path, save: bool, code: int, reason: str) -> None:
    """With a checkpoint it is a preemption, without one it is just gone; nobody trains on."""
    run = TinyRun(tmp_path)
    append_command(run.paths.commands(1), CheckpointNow(id=1))
    append_command(run.paths.commands(1), Leave(id=2, save=save))
    assert run.run() == code
    assert run.records(1, "step") == []
    assert [row["reason"] for row in run.records(1, "finished")] == [reason]


def test_a_replay_commits_nothing(tmp_path: Path) -> None:
    """It runs to its step with every detail, flags its records and leaves the store as it was."""
    run = TinyRun(tmp_path)
    assert run.run() == ExitCode.FINISHED
    commits = commits_present(run.store)
    assert run.run(2, candidates=(commits[1],), replay={"to_step": 9, "capture": True}) == ExitCode.REPLAY_DONE
    rows = run.records(2, "step")
    assert [row["step"] for row in rows] == [5, 6, 7, 8, 9]
    assert all(row["replay"] and row["grad_norms"] for row in rows)
    assert commits_present(run.store) == commits
    assert {step: run.losses(1)[step] for step in range(5, 10)} == {row["step"]: row["loss"] for row in rows}


def test_a_planted_bomb_is_planned_and_an_override_is_not(tmp_path: Path) -> None:
    """The bomb sits inside the planned schedule; the override is visible as a mismatch. Both are counted."""
    faults = [
        {"kind": "lr_bomb", "steps": [5, 6], "factor": 10.0},
        {"kind": "lr_override", "steps": [9, 9], "factor": 0.5},
    ]
    run = TinyRun(tmp_path, {"faults": faults})
    assert run.run() == ExitCode.FINISHED
    rows, peak = run.records(1, "step"), run.config.optimizer.peak_lr
    assert [row["step"] for row in rows if row["lr_planned"] == pytest.approx(10 * peak)] == [5, 6]
    assert [row["step"] for row in rows if row["lr"] != row["lr_planned"]] == [9]
    assert run.fault_counts() == {"0-lr_bomb": 2, "1-lr_override": 1}
    assert [(row["fault"], row["step"], row["count"]) for row in run.records(1, "fault")] == [
        ("lr_bomb", 5, 1),
        ("lr_bomb", 6, 2),
        ("lr_override", 9, 1),
    ]


def test_a_bad_shard_is_told_by_its_losses(tmp_path: Path) -> None:
    """Once the rest is learnt, sequences of the garbage shard alone have high losses."""
    run = TinyRun(tmp_path, {"steps": 80, "faults": [{"kind": "bad_shard", "shard": 2, "once": False}]})
    assert run.run() == ExitCode.FINISHED
    late: dict[str, list[float]] = {}
    for row in run.records(1, "step")[50:]:
        for shard, (count, total) in row["shards"].items():
            late.setdefault(shard, []).append(total / count)
    means = {shard: sum(losses) / len(losses) for shard, losses in late.items()}
    assert max(means, key=means.__getitem__) == "2"


def test_a_store_that_fails_is_a_record_and_training_goes_on(tmp_path: Path) -> None:
    """The upload fails once, which is said, and is tried again."""
    run = TinyRun(tmp_path, {"faults": [{"kind": "store_error", "steps": [8, 8]}]})
    assert run.run() == ExitCode.FINISHED
    assert [(row["step"], row["gone"]) for row in run.records(1, "commit_failed")] == [(8, False)]
    assert sorted(row["step"] for row in run.records(1, "commit")) == [0, 4, 8, 12]


def test_dropped_moments_are_dropped_at_the_load(tmp_path: Path) -> None:
    """The fault fires in its attempt, once, and the loss after the load differs from the undisturbed one."""
    run = TinyRun(tmp_path, {"faults": [{"kind": "drop_optimizer_state", "attempt": 2}]})
    assert run.run() == ExitCode.FINISHED
    assert run.run(2, candidates=(commits_present(run.store)[1],)) == ExitCode.FINISHED
    assert run.fault_counts() == {"0-drop_optimizer_state": 1}
    first, second = run.losses(1), {row["step"]: row["loss"] for row in run.records(2, "step")}
    assert second[5] == first[5]
    assert second[7] != first[7]


def test_out_of_memory_is_told_as_such(tmp_path: Path) -> None:
    """A refused allocation ends the attempt with an error record of its type."""
    run = TinyRun(tmp_path, {"faults": [{"kind": "oom", "steps": [3, 3]}]})
    assert run.run() == ExitCode.ERROR
    (error,) = run.records(1, "error")
    assert error["type"] == "OutOfMemoryError"
    assert error["step"] == 2
    assert error["where"] == "process.py:exhaust_memory"
    assert run.run(2) == ExitCode.FINISHED


def test_resumed_in_process_is_bit_identical(tmp_path: Path) -> None:
    """Left at a boundary and resumed, with dropout: the same losses and the same final state to the last bit."""
    whole = TinyRun(tmp_path / "whole")
    assert whole.run() == ExitCode.FINISHED
    cut = TinyRun(tmp_path / "cut", {"faults": [{"kind": "oom", "steps": [7, 7]}]})
    assert cut.run() == ExitCode.ERROR
    assert cut.run(2) == ExitCode.FINISHED
    assert cut.losses(1, 2) == whole.losses(1)
    one = load_checkpoint(whole.store, "000000000012-e1-1").tensors
    two = load_checkpoint(cut.store, "000000000012-e2-2").tensors
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
