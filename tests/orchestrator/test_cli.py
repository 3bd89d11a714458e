"""The command line: verbs, exit codes, clean JSON, clear errors. Runs that train are in tests/integration."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from monitors.taxonomy import IncidentClass
from orchestrator.cli.app import run
from orchestrator.cli.write import schema_of
from orchestrator.config import resolve, write_resolved
from orchestrator.journal import Batch, Folded, Journal
from orchestrator.launching import HaltedError, RunExistsError, prepare, set_aside
from orchestrator.policy.decisions import EndRun
from orchestrator.policy.events import Ticked
from orchestrator.policy.state import Incident, RunStatus
from tests.runs import tiny_config, write_corpus
from trainer.contract import fence
from trainer.contract.paths import RunPaths
from trainer.contract.store import open_store

VERBS = (
    ["init"], ["check"], ["launch"], ["resume"], ["status"], ["stop"], ["checkpoint"], ["incidents"], ["checkpoints"],
    ["replay"], ["data", "prepare"], ["schema"], ["doctor"],
)  # fmt: skip


@pytest.fixture(name="here")
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _write_run(directory: Path, **changes: Any) -> Path:
    """A tiny run.yaml with data that is there."""
    directory.mkdir(parents=True, exist_ok=True)
    corpus = directory / "corpus"
    if not corpus.exists():
        write_corpus(corpus, num_shards=2)
    path = directory / "run.yaml"
    path.write_text(json.dumps(tiny_config(corpus, **changes)))
    return path


def _journal(paths: RunPaths, state: str = "running", step: int = 7, end: EndRun | None = None) -> None:
    """A journal as a supervisor leaves it: a status, one incident and one suspicion."""
    paths.create()
    status = RunStatus.model_validate(
        {
            "state": state, "step": step, "total_steps": 100, "attempt": 1, "loss": float("nan"), "lr": 1e-3,
            "tokens": 10, "tokens_per_s": None, "validation": None, "last_good_step": None, "last_commit_step": None,
            "rollbacks_left": 6, "restarts_left": 10, "open_incidents": 0, "incidents": 1, "lr_factor": 1.0,
            "quarantined_shards": [],
        }
    )  # fmt: skip
    common: dict[str, Any] = {"cls": IncidentClass.CRASH, "onset_step": 5, "detected_step": 5, "why": "it was killed"}
    incidents = {
        1: Incident(id=1, decision=["restart"], state="closed", end_step=5, outcome="worked", cause="killed", **common),
        2: Incident(id=2, state="suspected", **common),
    }
    decisions = (end,) if end else ()
    with closing(Journal.open(paths.database)) as journal:
        journal.commit(
            Batch(
                folded=[Folded(Ticked(at_s=1.0), decisions)],
                incidents={number: one.model_dump_json(by_alias=True) for number, one in incidents.items()},
                meta={"status": status.model_dump_json()},
            )
        )


# -- help, usage, schema, init ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_of_every_verb_shows_an_example(verb: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Whoever asks for help wants to see how it is written."""
    assert run([*verb, "--help"]) == 0
    assert f"Example: longwatch {' '.join(verb)}" in " ".join(capfd.readouterr().out.split())


@pytest.mark.parametrize("arguments", [["lanuch"], ["launch"], ["status", "--jsn"], ["schema", "runs"], ["resume"]])
def test_usage_errors_exit_2(arguments: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown verbs and options, missing arguments; nothing on stdout."""
    assert run(arguments) == 2
    assert capsys.readouterr().out == ""


def test_command_starts_fast_and_without_torch() -> None:
    """A fraction of a second to the version, with torch left alone."""
    code = "import sys; from orchestrator.cli.app import run; run(['--version']); sys.exit('torch' in sys.modules)"

    begun_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)

    assert done.returncode == 0
    assert done.stdout.startswith("longwatch ")
    assert time.monotonic() - begun_s < 5.0  # a fraction of that on an idle machine; importing torch alone takes longer


@pytest.mark.parametrize("what", ["run", "policy"])
def test_schema_is_json_with_a_description(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Editors read it as it is."""
    assert run(["schema", what]) == 0

    schema = json.loads(capsys.readouterr().out)
    assert schema == schema_of("run" if what == "run" else "policy")
    assert schema["additionalProperties"] is False


def test_init_writes_valid_files_with_schemas_for_editors(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both files resolve, their modelines point at schemas that are there, and a second init leaves them alone."""
    assert run(["init", "project"]) == 0

    project = here / "project"
    resolved = resolve(project / "run.yaml")
    assert resolved.config.policy == str(project / "policy.yaml")
    for name in ("run.yaml", "policy.yaml"):
        modeline = (project / name).read_text().splitlines()[0]
        assert modeline.startswith("# yaml-language-server: $schema=")
        assert json.loads((project / modeline.split("=")[1]).read_text())["type"] == "object"
    (project / "run.yaml").write_text("mine")
    assert run(["init", "project"]) == 2
    assert (project / "run.yaml").read_text() == "mine"
    assert "is left alone" in capsys.readouterr().err


# -- check and launch, before anything starts -------------------------------------------------------------------------


def test_check_says_ok_and_where_things_go(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A good run passes data, store, disk and port."""
    assert run(["check", str(_write_run(here))]) == 0
    assert str(here / "runs/tiny") in capsys.readouterr().out
    assert not (here / "runs").exists()


@pytest.mark.parametrize("verb", ["check", "launch"])
def test_mistakes_are_all_named_and_nothing_is_started(
    verb: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Typos in the file and on the command line: exit 2 and one line for each."""
    path = _write_run(here, stepz=3, precision="b16")

    assert run([verb, str(path), "--set", "model.layers=x"]) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 3
    assert "stepz: unknown key; did you mean 'steps'?" in captured.err
    assert not (here / "runs").exists()


def test_missing_shard_and_busy_port_are_named_before_the_start(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the trainer's own check finds stands beside what ours does; exit 2, and no run directory is made."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        path = _write_run(here, metrics={"port": port})
        os.truncate(here / "corpus" / "shard-001.bin", 2000)

        assert run(["launch", str(path)]) == 2

    said = capsys.readouterr().err
    assert f"metrics.port: port {port} on 127.0.0.1 cannot be taken" in said
    assert "shard-001.bin" in said
    assert not (here / "runs").exists()


def test_frozen_key_that_changed_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run directory knows what the run was."""
    path = _write_run(here)
    resolved = resolve(path)
    write_resolved(resolved)
    _journal(resolved.paths, "stopped")

    assert run(["launch", str(path), "--set", "model.width=64"]) == 2
    assert "--set model.width: model.width: may not change" in capsys.readouterr().err


def test_halted_run_is_left_as_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 3 with the way on; not a byte of the journal changes."""
    path = _write_run(here)
    resolved = resolve(path)
    write_resolved(resolved)
    _journal(resolved.paths, "halted", end=EndRun(state="halted", exit_code=3, because="relapsed too often"))
    before = resolved.paths.database.read_bytes()

    assert run(["launch", str(path)]) == 3

    said = capsys.readouterr().err
    assert "relapsed too often" in said
    assert f"longwatch resume {resolved.paths.root} --because TEXT" in said
    assert resolved.paths.database.read_bytes() == before


def test_used_up_budget_has_its_own_exit_code(here: Path) -> None:
    """4, from the decision that ended the run."""
    resolved = resolve(_write_run(here))
    _journal(resolved.paths, "halted", end=EndRun(state="budget_used_up", exit_code=4, because="6 rollbacks"))

    with pytest.raises(HaltedError) as caught:
        prepare(resolved)

    assert caught.value.exit_code == 4


def test_run_in_the_store_is_never_started_from_scratch_silently(here: Path) -> None:
    """A run directory was lost: refused with the ways on; `--fresh` says that it is meant."""
    resolved = resolve(_write_run(here))
    with closing(open_store(resolved.config.store, here, resolved.config.name)) as store:
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
    resolved = resolve(_write_run(here))
    write_resolved(resolved)
    _journal(resolved.paths, "halted")

    assert run(["resume", str(resolved.paths.root), "--because", " "]) == 2
    assert "--because" in capsys.readouterr().err


# -- reading a run ----------------------------------------------------------------------------------------------------


def test_status_and_incidents_as_json_are_clean_and_complete(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON document each; a loss that is not finite is text, and suspicions are not incidents."""
    paths = RunPaths(here / "runs" / "a")
    _journal(paths)

    assert run(["status", str(paths.root), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert run(["incidents", str(paths.root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert (status["run_dir"], status["step"], status["loss"]) == (str(paths.root), 7, "NaN")
    (incident,) = found["incidents"]
    assert incident["class"] == "crash"
    assert {"onset_step", "detected_step", "end_step", "decision", "why", "cost"} <= incident.keys()


def test_run_whose_supervisor_vanished_is_stopped(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A power cut leaves a journal that says running; nobody holds the locks, so it is not."""
    _journal(RunPaths(here / "runs" / "a"), "running")

    assert run(["status", "--json"]) == 0

    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["supervised"]) == ("stopped", False)
    assert "launch again" in status["because"]


def test_without_run_the_newest_below_here_is_meant(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Newest by its last write, wherever below the working directory; a name picks another."""
    for age_s, name in ((100, "old"), (0, "new"), (200, "older")):
        paths = RunPaths(here / "project" / "runs" / name)
        _journal(paths)
        for file in paths.root.glob("run.db*"):
            moment = time.time() - age_s
            os.utime(file, (moment, moment))

    found = []
    for arguments in ([], ["old"], [str(here / "project/runs/older")]):
        assert run(["status", *arguments, "--json"]) == 0
        found.append(Path(json.loads(capsys.readouterr().out)["run_dir"]).name)

    assert found == ["new", "old", "older"]


@pytest.mark.parametrize("verb", ["status", "incidents", "checkpoints", "stop", "checkpoint"])
def test_no_run_is_said_clearly(verb: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 with the way on, and nothing on stdout."""
    assert run([verb]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "longwatch launch" in captured.err


def test_stop_without_a_supervisor_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nobody to ask."""
    _journal(RunPaths(here / "runs" / "a"))

    assert run(["stop"]) == 1
    assert "no supervisor is running" in capsys.readouterr().err


def test_checkpoints_of_an_empty_store(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None is an answer, not an error."""
    resolved = resolve(_write_run(here))
    write_resolved(resolved)
    _journal(resolved.paths)

    assert run(["checkpoints", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"checkpoints": []}


def test_json_is_clean_when_piped(here: Path) -> None:
    """As a program would call it: stdout is one JSON document, stderr is empty."""
    _journal(RunPaths(here / "runs" / "a"))
    command = [sys.executable, "-m", "orchestrator.cli", "incidents", "--json"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=here)

    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["incidents"]) == 1


# -- replay and data --------------------------------------------------------------------------------------------------


def _write_trace(path: Path, losses: list[str]) -> Path:
    path.write_text("step,loss\n" + "".join(f"{step},{loss}\n" for step, loss in enumerate(losses, 1)))
    return path


def test_replay_of_a_healthy_trace_finds_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A smooth curve: no incident, and the number of its steps."""
    trace = _write_trace(here / "t.csv", [f"{2 + 3 / (1 + step / 50):.4f}" for step in range(600)])

    assert run(["replay", str(trace), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"incidents": [], "steps": 600}


def test_replay_sees_what_went_wrong_and_says_what_it_would_have_done(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that jumps and stays: the class, its steps, the ordered actions, and why."""
    healthy = [2 + 3 / (1 + step / 50) + 0.01 * (-1) ** step for step in range(700)]
    trace = _write_trace(
        here / "t.csv", [f"{loss + (4 if step > 400 else 0):.4f}" for step, loss in enumerate(healthy)]
    )

    assert run(["replay", str(trace), "--json"]) == 0

    incident = json.loads(capsys.readouterr().out)["incidents"][0]
    assert {"class", "onset_step", "detected_step", "end_step", "decision", "why"} <= incident.keys()
    assert incident["class"] == "unrecovered_spike"
    assert 400 <= incident["onset_step"] <= incident["detected_step"]
    assert {"roll_back", "skip_data", "lower_lr"} <= set(incident["decision"])
    assert incident["why"]


@pytest.mark.parametrize(("content", "said"), [("step,los\n1,2\n", "loss"), ("step,loss\n1,x\n", "2")])
def test_replay_of_what_is_no_trace_exits_2(
    content: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is named, with what is wrong in it."""
    (here / "t.csv").write_text(content)

    assert run(["replay", "t.csv"]) == 2
    captured = capsys.readouterr()
    assert "t.csv" in captured.err
    assert said in captured.err


def test_data_prepare_hands_its_words_and_its_exit_code_over(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Shards with a manifest from text; a source that is not there is exit 2."""
    (here / "a.txt").write_text("all work and no play " * 500)

    assert run(["data", "prepare", "a.txt", "--out", "tokens"]) == 0
    assert json.loads((here / "tokens" / "manifest.json").read_text())["vocab_size"] == 257
    assert run(["data", "prepare", "nowhere.txt", "--out", "other"]) == 2
    assert "nowhere.txt" in capfd.readouterr().err


def test_broken_pipe_is_no_traceback(here: Path) -> None:
    """`longwatch schema run | head -1`."""
    command = f"{sys.executable} -m orchestrator.cli schema run | head -1"

    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)

    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr
