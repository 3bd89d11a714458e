"""The supervisor's shell on real processes: spawn, stop, hang, orphan, takeover. Effects only; rules have their own."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control import CheckpointRequest, StatusRequest, StopRequest, ask
from orchestrator.core import Update
from orchestrator.errors import RunHeldError, RunSupersededError, SpawnError
from orchestrator.journal import Batch, Folded, Journal, Spawned
from orchestrator.policy.decisions import EndRun, StartAttempt, WriteVerdict
from orchestrator.policy.events import RunOpened
from orchestrator.process.child import SpawnSpec, spawn
from orchestrator.process.lock import is_free
from tests.orchestrator.restarting import RestartingCore, SmallRun
from tests.runs import wait_until
from trainer.contract.fence import Fence, claim, fence_key
from trainer.contract.plan import ResumePlan, read_plan
from trainer.contract.store import open_store


def _causes(run: SmallRun) -> list[str]:
    return [row["cause"] for row in run.rows("attempts")]


def _steps(run: SmallRun, attempt: int) -> list[int]:
    return [step for number, step in run.seen() if number == attempt]


def _counter(run: SmallRun, name: str) -> float:
    with run.journal() as journal:
        totals: dict[str, float] = json.loads(journal.meta("totals"))
    return totals.get(name, 0.0)


def _recorded(run: SmallRun, attempt: int = 1) -> int:
    """Lines the trainer has written so far."""
    path = run.paths.records(attempt)
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _openings(run: SmallRun) -> int:
    """How often a supervisor took the run and had it journaled."""
    return sum(event.kind == "run_opened" for event in run.journaled())


def _end(process: subprocess.Popen[str], signum: int) -> int:
    """Signal a supervisor and wait for it."""
    process.send_signal(signum)
    process.communicate(timeout=60)
    return process.returncode


def test_a_run_without_faults(tmp_path: Path) -> None:
    """Every step reaches the engine once, in order; every decision is done; nothing is left behind."""
    run = SmallRun(tmp_path, {"steps": 12})
    assert run.supervise() == 0
    assert run.seen() == [(1, step) for step in range(1, 13)]
    assert _causes(run) == ["finished"]
    assert {row["status"] for row in run.rows("decisions")} == {"done"}
    assert is_free(run.paths.child_lock)
    assert not run.paths.control_socket.exists()
    assert not run.paths.records_socket.exists()
    assert [row["step"] for row in run.rows("steps")] == list(range(1, 13))
    assert (run.root / "store/run/verdicts/000000000005-e1-1.good.json").exists()
    assert run.paths.root.stat().st_mode & 0o777 == 0o700


def test_a_killed_trainer_is_started_again_where_it_was(tmp_path: Path) -> None:
    """SIGKILL at step 8: the plan names the commit of step 5, and the next epoch builds on it."""
    run = SmallRun(tmp_path, {"steps": 12, "faults": {"8": "sigkill"}})
    assert run.supervise() == 0
    assert _causes(run) == ["killed", "finished"]
    assert _steps(run, 1) == list(range(1, 8))
    assert _steps(run, 2) == list(range(6, 13))
    assert read_plan(run.paths.plan(2)).candidates == ("000000000005-e1-1",)
    fence = Fence.model_validate_json((run.root / "store/run/fence/e2.json").read_bytes())
    assert fence.base == "000000000005-e1-1"
    assert run.rows("incidents")[0]["cause"] == "killed"
    assert run.rows("notifications")[0]["title"] == "crash"
    with run.journal() as journal:
        assert [row["step"] for row in journal.steps(surviving=True)] == list(range(1, 13))


def test_descendants_of_a_dead_trainer_are_ended_first(tmp_path: Path) -> None:
    """A grandchild in a session of its own holds the lock: it is killed before attempt 2 is spawned."""
    run = SmallRun(tmp_path, {"steps": 6, "faults": {"3": "grandchild"}})
    assert run.supervise() == 0
    assert _causes(run) == ["killed", "finished"]


@pytest.mark.parametrize("fault", ["hang", "sigstop"])
def test_a_hang_is_dumped_killed_and_named(tmp_path: Path, fault: str) -> None:
    """Suspected with evidence, confirmed and killed; one that is stopped writes no stacks but is killed too."""
    run = SmallRun(tmp_path, {"steps": 8, "faults": {"4": fault}}, {"train": 0.5, "grace_s": 1})
    assert run.supervise() == 0
    assert _causes(run) == ["hang", "finished"]
    kinds = [json.loads(row["json"])["kind"] for row in run.rows("decisions")]
    assert kinds.index("capture_evidence") < kinds.index("stop_attempt")
    evidence = run.paths.root / "incidents" / "attempt-1"
    assert (evidence / "records-1.jsonl").read_bytes().count(b"\n") == 4
    assert _counter(run, "hangs_total{suspected}") == 1
    assert _counter(run, "hangs_total{confirmed}") == 1
    if fault == "hang":
        assert "in fault" in (evidence / "stacks-1.txt").read_text()


def test_work_in_a_long_phase_is_no_hang(tmp_path: Path) -> None:
    """1.2 s of full load in `compile` with a deadline of 0.5 s: suspected, not killed."""
    deadlines = {"train": 30.0, "compile": 0.5}
    run = SmallRun(tmp_path, {"steps": 6, "faults": {"3": "spin:compile"}}, deadlines)
    assert run.supervise() == 0
    assert _causes(run) == ["finished"]
    assert _counter(run, "hangs_total{suspected}") == 1


def test_a_trainer_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    """The operator's stop comes to its end, and the cause says who killed."""
    run = SmallRun(tmp_path, {"steps": 100_000, "ignore_term": True}, {"grace_s": 0.3})
    process = run.start()
    wait_until(lambda: _recorded(run) > 3, "training")
    assert _end(process, signal.SIGINT) == 5
    (attempt,) = run.rows("attempts")
    assert (attempt["cause"], attempt["detail"]) == ("killed", "SIGKILL, sent by the supervisor")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 5)])
def test_signals_stop_the_run_with_a_checkpoint(tmp_path: Path, signum: int, code: int) -> None:
    """The machine's SIGTERM or SIGUSR1 is a preemption, SIGINT the operator; the same launch goes on."""
    run = SmallRun(tmp_path, {"steps": 200, "step_s": 0.02})
    process = run.start()
    wait_until(lambda: _recorded(run) > 3, "training")
    assert _end(process, signum) == code
    assert _causes(run) == ["preempted"]
    assert run.supervise() == 0
    assert _causes(run) == ["preempted", "finished"]
    assert [step for _, step in run.seen()] == list(range(1, 201)), "the checkpoint was of the last step"


def test_a_second_interrupt_does_not_wait_for_a_checkpoint(tmp_path: Path) -> None:
    """The mailbox says: leave without saving."""
    run = SmallRun(tmp_path, {"steps": 100_000, "step_s": 0.5, "commit_every": 1000})
    process = run.start()
    wait_until(lambda: _recorded(run) > 1, "training")
    process.send_signal(signal.SIGINT)
    wait_until(lambda: any(row["kind"] == "stop_attempt" for row in run.rows("decisions")), "the first")
    assert _end(process, signal.SIGINT) == 5
    assert _causes(run) in (["left"], ["preempted"])
    assert any(row["kind"] == "stop_attempt" for row in run.rows("decisions"))


def test_requests_over_the_control_socket(tmp_path: Path) -> None:
    """Status, a checkpoint now, and stop, as the command line asks them."""
    run = SmallRun(tmp_path, {"steps": 100_000, "commit_every": 100_000})
    process = run.start()
    wait_until(lambda: _recorded(run) > 3 and run.paths.control_socket.exists(), "training")
    status = ask(run.paths.control_socket, StatusRequest())
    assert status.pid == process.pid
    assert status.status is not None
    assert status.status["state"] == "running"
    ask(run.paths.control_socket, CheckpointRequest())
    wait_until(lambda: b'"kind":"commit"' in run.paths.records(1).read_bytes(), "the checkpoint")
    assert ask(run.paths.control_socket, StopRequest()).ok
    process.communicate(timeout=60)
    assert process.returncode == 5


def test_a_second_supervisor_is_told_who_has_the_run(tmp_path: Path) -> None:
    """It changes nothing, and the first goes on."""
    run = SmallRun(tmp_path, {"steps": 100_000})
    process = run.start()
    wait_until(lambda: _recorded(run) > 3, "training")
    with pytest.raises(RunHeldError, match=f"pid {process.pid} on"):
        run.supervise()
    assert process.poll() is None
    assert _end(process, signal.SIGTERM) == 75


def test_kill_of_the_supervisor_leaves_the_trainer_alone(tmp_path: Path) -> None:
    """kill -9, launch again, twice: one attempt, one process, every step once, counters that go on."""
    run = SmallRun(tmp_path, {"steps": 100, "step_s": 0.02})
    for opened in (1, 2):
        process = run.start()
        wait_until(lambda opened=opened: _openings(run) == opened and _recorded(run) > 5, "training")  # type: ignore[misc]
        assert _end(process, signal.SIGKILL) == -signal.SIGKILL
    assert run.supervise() == 0
    assert len({row["pid"] for row in run.rows("attempts")}) == 1
    assert _causes(run) == ["finished"], "its exit file says how it ended"
    assert run.seen() == [(1, step) for step in range(1, 101)]
    assert _counter(run, "steps_total{}") == 100
    assert _counter(run, "supervisor_starts_total{}") == 3
    assert _counter(run, "attempts_total{}") == 1


@pytest.mark.parametrize("delay_ms", range(0, 700, 100))
def test_kill_of_the_supervisor_at_any_moment(tmp_path: Path, delay_ms: int) -> None:
    """From its first instant to the end of the run, through a crash of the trainer: launched again it goes on."""
    run = SmallRun(tmp_path, {"steps": 16, "step_s": 0.02, "faults": {"8": "sigkill"}})
    process = run.start()
    wait_until(run.paths.database.exists, "a journal")
    killer = threading.Timer(delay_ms / 1000, process.kill)
    killer.start()
    process.communicate(timeout=60)
    killer.join()
    assert run.supervise() == 0
    assert _causes(run) in (["killed", "finished"], ["unknown", "finished"])
    assert _steps(run, 1) == list(range(1, 8))
    assert _steps(run, 2) == list(range(6, 17))
    assert {row["status"] for row in run.rows("decisions")} == {"done"}
    assert _counter(run, "steps_total{}") == 18
    assert is_free(run.paths.child_lock)


def test_a_trainer_that_died_while_nobody_watched(tmp_path: Path) -> None:
    """All its records come in first, then its end; without an exit file the cause is unknown."""
    run = SmallRun(tmp_path, {"steps": 30, "step_s": 0.02, "faults": {"9": "sigkill"}})
    process = run.start()
    wait_until(lambda: _recorded(run) > 2, "training")
    assert _end(process, signal.SIGKILL) == -signal.SIGKILL
    pid = run.rows("attempts")[0]["pid"]
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), "the trainer's death")
    assert run.supervise() == 0
    assert _causes(run) == ["unknown", "finished"]
    assert _steps(run, 1) == list(range(1, 9))


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_an_orphan_leaves_by_itself_and_is_found_gone(tmp_path: Path) -> None:
    """A trainer without a supervisor saves and leaves; the next launch reads that from its exit file."""
    run = SmallRun(tmp_path, {"steps": 400, "step_s": 0.01, "orphan_s": 0.3})
    process = run.start()
    wait_until(lambda: _recorded(run) > 5, "training")
    assert _end(process, signal.SIGKILL) == -signal.SIGKILL
    wait_until(lambda: run.paths.exit_file(1).exists(), "the orphan to leave")
    assert run.supervise() == 0
    assert _causes(run) == ["orphaned", "finished"]
    assert [step for _, step in run.seen()] == list(range(1, 401))


def _journaled_start(run: SmallRun) -> ResumePlan:
    """A journal as it is when the supervisor dies between the spawn's entry and the release."""
    core = RestartingCore()
    opened = RunOpened(at_s=1.0, run_id="run", config_digest="", policy_digest="", code_version="")
    decisions = tuple(core.fold(opened))
    run.paths.create()
    journal = Journal.open(run.paths.database)
    journal.commit(Batch(folded=[Folded(opened, decisions)], snapshot=core.snapshot()))
    (start,) = decisions
    assert isinstance(start, StartAttempt)
    journal.close()
    return start.plan


def test_a_child_that_was_never_released_is_started_again(tmp_path: Path) -> None:
    """It waits for ever on a pipe: it is ended, and the same attempt is spawned anew, exactly once."""
    run = SmallRun(tmp_path, {"steps": 6})
    plan = _journaled_start(run)
    child = spawn(SpawnSpec(run.paths, plan.attempt, ("sleep", "600")))
    journal = Journal.open(run.paths.database)
    identity = child.identity
    journal.record_spawn(Spawned(1, identity.pid, identity.boot_id, identity.starttime, 1.0, None))
    journal.close()
    assert run.supervise() == 0
    assert child.ended()
    child.reap()
    child.close()
    assert _causes(run) == ["finished"]
    assert run.rows("attempts")[0]["pid"] != identity.pid
    assert run.seen() == [(1, step) for step in range(1, 7)]


def test_an_end_that_was_decided_and_not_carried_out_is_history(tmp_path: Path) -> None:
    """The start it overtook is not carried out either; other pending decisions are."""
    run = SmallRun(tmp_path, {"steps": 6})
    _journaled_start(run)
    core = RestartingCore()
    core.state.phase, core.state.attempt = "stopped", 1
    journal = Journal.open(run.paths.database)
    verdict = WriteVerdict(commit="000000000001-e1-1", verdict="bad", why="test")
    end = EndRun(state="stopped", exit_code=5, because="stop")
    opened = RunOpened(at_s=2.0, run_id="run", config_digest="", policy_digest="", code_version="")
    journal.commit(Batch(folded=[Folded(opened, (verdict, end))], snapshot=core.snapshot()))
    journal.close()
    assert run.supervise() == 0
    assert [row["attempt"] for row in run.rows("attempts")] == [2]
    assert (run.root / "store/run/verdicts/000000000001-e1-1.bad.json").exists()
    assert {row["status"] for row in run.rows("decisions")} == {"done"}


def test_a_store_that_fails_is_tried_again(tmp_path: Path) -> None:
    """Nothing starts without its epoch, nothing ends because of a store: when it is back the run goes on."""
    store = tmp_path / "store"
    store.write_text("a file where a directory should be")
    run = SmallRun(tmp_path, {"steps": 5})

    def mend(update: Update) -> None:
        if store.is_file() and _counted(update) > 3:
            store.unlink()

    ticks: list[Update] = []

    def _counted(update: Update) -> int:
        ticks.append(update)
        return len(ticks)

    assert run.supervise(mend) == 0
    assert _causes(run) == ["finished"]
    assert _counter(run, "store_retries_total{}") >= 1


def test_an_epoch_that_somebody_else_holds_stops_us(tmp_path: Path) -> None:
    """Nothing is started beside another writer."""
    run = SmallRun(tmp_path, {"steps": 5})
    store = open_store(run.config.store, tmp_path, "run")
    store.make_place()
    claim(store, Fence(run_id="run", epoch=1, nonce="x" * 16, host="other", pid=1))
    with pytest.raises(RunSupersededError, match="nothing was started"):
        run.supervise()
    assert run.rows("attempts") == []
    assert b'"other"' in store.read(fence_key(1))


def test_a_trainer_that_cannot_be_executed_is_an_error_at_once(tmp_path: Path) -> None:
    """Not a crash loop."""
    run = SmallRun(tmp_path, {}, changes={"launch": {"command": ["no-such-trainer"]}})
    with pytest.raises(SpawnError) as error:
        run.supervise()
    assert error.value.exit_code == 2


def test_a_run_that_is_over_stays_over(tmp_path: Path) -> None:
    """Launching again says how it ended and starts nothing; a person can have it go on."""
    faults = {str(step): "raise:boom" for step in range(2, 8)}
    run = SmallRun(tmp_path, {"steps": 6, "faults": faults, "every_attempt": True})
    assert run.supervise() == 3
    attempts = len(run.rows("attempts"))
    assert run.supervise() == 3
    assert len(run.rows("attempts")) == attempts
    healed = SmallRun(tmp_path, {"steps": 6})
    assert healed.supervise(resume_because="fixed") == 0
    assert _causes(healed) == ["error"] * attempts + ["finished"]


def test_displays_are_told_what_happened(tmp_path: Path) -> None:
    """Events, decisions and status, in the order in which they were journaled."""
    updates: list[Update] = []
    run = SmallRun(tmp_path, {"steps": 6}, changes={"metrics": {"port": 0}})
    assert run.supervise(updates.append) == 0
    kinds = [folded.event.kind for update in updates for folded in update.folded]
    with run.journal() as journal:
        assert kinds[0] == "run_opened"
        assert [kind for kind in kinds if kind != "ticked"].count("record_received") == len(run.seen()) + 3
        assert journal.meta("metrics_url") == updates[0].metrics_url
    assert updates[0].metrics_url is not None
    assert updates[-1].status.state == "finished"
    assert any(folded.decisions for update in updates for folded in update.folded)


def test_the_supervisor_needs_no_torch() -> None:
    """A CUDA fault can't take it down, and it starts in a fraction of a second."""
    code = (
        "import sys, orchestrator.supervisor, orchestrator.control, monitors.exporter; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_secrets_stay_out_of_everything_on_disk(tmp_path: Path) -> None:
    """launch.env reaches the trainer and no file of the run."""
    changes: dict[str, Any] = {"launch": {**SmallRun(tmp_path, {"steps": 4}).config.launch.model_dump(), "env": {}}}
    changes["launch"]["env"] = {"TOKEN": "canary-5f1c"}
    run = SmallRun(tmp_path, {"steps": 4}, changes=changes)
    assert run.supervise() == 0
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if b"canary-5f1c" in path.read_bytes()]
