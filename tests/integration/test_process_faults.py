"""Crash, hang, preemption, store and supervisor failures on real processes: the run goes on and loses nothing."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.process.child import kill_leftovers
from orchestrator.process.lock import holders
from tests.runs import Run, tiny_config, wait_until
from trainer.contract import arena
from trainer.contract.paths import KEEPER_ROLES

pytestmark = pytest.mark.training


def _losses(run: Run) -> dict[int, float]:
    return {step: float(row["loss"]) for step, row in run.surviving_steps().items()}


def _final_tensors(run: Run) -> dict[str, str]:
    """CRC of every data object of the last commit: equal CRCs, equal weights, moments and random states."""
    manifests = sorted(run.store.glob("commits/*.json"))
    manifest = json.loads(manifests[-1].read_text())["manifest"]
    return {str(index): entry["crc32c"] for index, entry in enumerate(manifest["objects"])}


@pytest.mark.long
def test_sigkill_at_several_steps_changes_no_bit(tmp_path: Path, corpus: Path) -> None:
    """An undisturbed run and one killed three times end with the same losses and the same state, bit for bit."""
    kills = [{"kind": "sigkill", "steps": [step, step], "once": True} for step in (23, 51, 78)]
    config = tiny_config(corpus, steps=90)
    undisturbed = Run(tmp_path / "a", config)
    killed = Run(tmp_path / "b", {**config, "faults": kills})

    undisturbed.launch()
    killed.launch()

    assert [attempt["cause"] for attempt in killed.attempts()] == ["killed", "killed", "killed", "finished"]
    assert sum(count for count in killed.fault_counts().values()) == 3
    assert _losses(killed) == _losses(undisturbed)
    assert _final_tensors(killed) == _final_tensors(undisturbed)


@pytest.mark.parametrize("mode", ["gil_free", "gil_held", "sigstop"])
def test_hang_is_confirmed_killed_and_survived(tmp_path: Path, corpus: Path, mode: str) -> None:
    """A main loop that stands still for twice its deadline is killed, with its stacks kept, and the run finishes."""
    faults = [{"kind": "hang", "steps": [33, 33], "mode": mode}]
    deadlines = {"train": 1.5, "warm_up": 20, "grace_s": 1}
    run = Run(tmp_path, tiny_config(corpus, steps=50, faults=faults, deadlines=deadlines))

    run.launch()

    incident = run.incident("hang")
    assert incident["phase"] == "train"
    assert "restart" in incident["decision"]
    assert sorted(run.surviving_steps()) == list(range(1, 51))
    stacks = run.paths.stacks(1).read_text()
    assert "trainer/loop.py" in stacks  # from outside, also where the trainer's own handler cannot run


def test_sigterm_to_the_supervisor_saves_and_says_run_me_again(tmp_path: Path, corpus: Path) -> None:
    """Preemption: exit 75 with a checkpoint of the last step; the same launch goes on from there."""
    run = Run(tmp_path, tiny_config(corpus, steps=2000, evaluate={"every_steps": 1000, "sequences": 8}))
    process = run.start()
    wait_until(lambda: len(run.records(1, "step")) > 15, "training")

    process.send_signal(signal.SIGTERM)
    run.wait(process, expect=75)

    last = run.records(1, "step")[-1]["step"]
    assert run.records(1, "commit")[-1]["step"] == last
    assert run.cli("status")["state"] == "stopped"


def test_kill_of_the_supervisor_at_any_moment_then_the_same_launch(tmp_path: Path, corpus: Path) -> None:
    """The second supervisor takes the living trainer over and the run finishes with every step trained once."""
    run = Run(tmp_path, tiny_config(corpus, steps=400, faults=[{"kind": "slow", "factor": 0.01, "once": False}]))
    for wanted in (5, 60):
        process = run.start()
        wait_until(lambda wanted=wanted: len(run.records(1, "step")) > wanted, "training")  # type: ignore[misc]
        process.kill()
        process.communicate()

    run.launch()

    assert len(run.attempts()) == 1, "a healthy trainer was not left alone"
    assert sorted(run.surviving_steps()) == list(range(1, 401))


def test_two_supervisors_on_one_run_the_second_is_told_who_holds_it(tmp_path: Path, corpus: Path) -> None:
    """Exactly one writes; the other says who holds the run and changes nothing."""
    run = Run(tmp_path, tiny_config(corpus, steps=5000))
    process = run.start()
    wait_until(lambda: len(run.records(1, "step")) > 3, "training")

    output = run.launch(expect=1)

    assert str(process.pid) in output
    process.send_signal(signal.SIGINT)
    run.wait(process, expect=5)


def test_orphaned_trainer_saves_and_leaves(tmp_path: Path, corpus: Path) -> None:
    """A trainer whose supervisor never comes back checkpoints and leaves by itself."""
    run = Run(tmp_path, tiny_config(corpus, steps=100_000, deadlines={"orphan_s": 1.0}))
    process = run.start()
    wait_until(lambda: len(run.records(1, "step")) > 10, "training")
    pid = int(run.attempts()[0]["pid"])

    process.kill()
    process.communicate()

    wait_until(lambda: bool(run.records(1, "finished")), "the orphan to leave")
    assert run.records(1, "finished")[0]["reason"] == "orphaned"
    wait_until(lambda: not _alive(pid), "the orphan to be gone")
    run.kill_everything(process)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_store_errors_hold_up_no_training(tmp_path: Path, corpus: Path) -> None:
    """Uploads fail for a while: that is recorded, training goes on, the newest goes first once the store is back."""
    faults = [{"kind": "store_error", "steps": [15, 55], "once": False}]
    config = tiny_config(corpus, steps=90, faults=faults)
    config["checkpoint"]["keep_local"] = 2
    run = Run(tmp_path, config)

    run.launch()

    failed = run.records(1, "commit_failed")
    assert next(row["step"] for row in failed if not row["gone"]) == 20
    assert {row["step"] for row in failed if row["gone"]} >= {20, 30}, "passed over for newer ones"
    assert len(run.attempts()) == 1
    assert run.incident("checkpoint_overdue")["decision"] == ["notify"]
    assert run.records(1, "commit")[-1]["step"] == 90


def test_out_of_memory_is_a_crash_with_its_cause(tmp_path: Path, corpus: Path) -> None:
    """A real allocation failure is named and restarted once."""
    run = Run(tmp_path, tiny_config(corpus, steps=40, faults=[{"kind": "oom", "steps": [25, 25]}]))

    run.launch()

    assert run.incident("crash")["cause"] in ("host_oom", "cuda_oom", "error")
    assert sorted(run.surviving_steps()) == list(range(1, 41))


def test_corrupted_newest_checkpoint_is_condemned_and_an_older_one_taken(tmp_path: Path, corpus: Path) -> None:
    """One flipped byte in the newest checkpoint: found on load, written down; the one before is taken."""
    run = Run(tmp_path, tiny_config(corpus, steps=30, faults=[{"kind": "corrupt_checkpoint", "steps": [30, 30]}]))
    run.launch()

    run.launch("--set", "steps=60")

    started = run.records(2, "started")[0]
    assert started["step"] == 20
    assert [condemned["commit"].split("-")[0] for condemned in started["condemned"]] == ["000000000030"]
    states = {row["step"]: row["state"] for row in run.cli("checkpoints")["checkpoints"] if row["epoch"] == 1}
    assert states[30] == "bad"


def test_a_crash_loses_only_the_steps_since_the_last_snapshot(tmp_path: Path, corpus: Path) -> None:
    """The store takes nothing from step 10 on; a trainer that dies goes on from the snapshot in shared memory."""
    faults = [
        {"kind": "store_error", "steps": [10, 50], "once": False},
        {"kind": "sigkill", "steps": [36, 36]},
    ]
    run = Run(tmp_path, tiny_config(corpus, steps=60, faults=faults) | {"name": "tiny"})
    run.config["checkpoint"]["keep_local"] = 2
    run.file.write_text(json.dumps(run.config))

    run.launch()

    assert run.records(2, "started")[0]["step"] == 30
    assert not any(row["step"] == 30 for row in run.records(1, "commit")), "it never reached the store"
    log = run.paths.log(2).read_text()
    assert '"from_tier": "shared memory"' in log
    assert sorted(run.surviving_steps()) == list(range(1, 61))


def test_everything_killed_at_once_loses_only_the_steps_since_the_last_snapshot(tmp_path: Path, corpus: Path) -> None:
    """Supervisor, trainer, writer and uploader die together; what was only in shared memory is saved by the next."""
    faults = [{"kind": "slow", "factor": 0.02, "once": False}]
    run = Run(tmp_path, tiny_config(corpus, steps=100_000, faults=faults))
    process = run.start()
    wait_until(lambda: len(run.records(1, "snapshot")) > 2, "some saves")
    (writer,) = holders(run.paths.keeper_lock("writer"))
    os.kill(writer, signal.SIGSTOP)
    wait_until(lambda: arena.has_pending(run.paths.arena), "a snapshot that nobody takes")

    process.kill()
    os.kill(int(run.attempts()[0]["pid"]), signal.SIGKILL)
    for role in KEEPER_ROLES:
        kill_leftovers(run.paths.keeper_lock(role))
    process.communicate()
    newest = run.records(1, "snapshot")[-1]["step"]
    run.launch("--set", f"steps={newest + 30}", "--set", "faults=[]")

    assert run.records(2, "started")[0]["step"] == newest
    assert sorted(run.surviving_steps()) == list(range(1, newest + 31))


def test_torn_upload_is_finished_by_the_next_uploader(tmp_path: Path, corpus: Path) -> None:
    """The uploader dies between data and manifest: training does not notice, and the checkpoint comes all the same."""
    run = Run(tmp_path, tiny_config(corpus, steps=60, faults=[{"kind": "torn_write", "steps": [30, 30]}]))

    run.launch()

    assert run.fault_counts() == {"0-torn_write": 1}
    assert len(run.attempts()) == 1
    assert [row["step"] for row in run.records(1, "commit")] == [0, 10, 20, 30, 40, 50, 60]


def test_crash_loop_comes_to_its_end(tmp_path: Path, corpus: Path) -> None:
    """An error at the same step every time: wider rollback, then halt, and launching again changes nothing."""
    faults = [{"kind": "sigkill", "steps": [25, 40], "once": False}]
    policy: dict[str, Any] = {"version": 1, "on_no_progress": {"attempts": 2, "do": ["widen_rollback", "halt"]}}
    run = Run(tmp_path, tiny_config(corpus, steps=60, faults=faults), policy)

    run.launch(expect=3)
    attempts = len(run.attempts())
    output = run.launch(expect=3)

    assert attempts == 4
    assert len(run.attempts()) == attempts
    assert "longwatch resume" in output


def test_truncated_shard_is_named_before_training_starts(tmp_path: Path) -> None:
    """Exit 2 with the shard and the remedy; nothing is started, nothing is written to the store."""
    from tests.runs import write_corpus

    corpus = write_corpus(tmp_path / "corpus", num_shards=2)
    shard = corpus / "shard-001.bin"
    os.truncate(shard, shard.stat().st_size - 100)
    run = Run(tmp_path / "run", tiny_config(corpus))

    output = run.launch(expect=2)

    assert "shard-001.bin" in output
    assert not run.store.exists() or not list(run.store.glob("commits/*"))
