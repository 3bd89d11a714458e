"""The command line: verbs, exit codes, clean JSON, clear errors. Runs that train are in tests/integration."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from importlib import import_module
from pathlib import Path

import pytest
import typer

from orchestrator.cli.app import MODULES, run
from orchestrator.cli.write import schema_of
from orchestrator.config import resolve, write_resolved
from tests.orchestrator.clirun import write_journal, write_run
from trainer.contract.paths import RunPaths

VERBS = (
    ["init"], ["check"], ["launch"], ["resume"], ["status"], ["stop"], ["checkpoint"], ["incidents"], ["checkpoints"],
    *(["checkpoints", verb] for verb in ("list", "verify", "pin", "unpin", "prune", "export")),
    ["ledger"], ["replay"], ["data", "prepare"], ["schema"], ["doctor"], ["drill"], ["explain"], ["watch"], ["logs"],
    ["incidents", "show"], ["report"],
)  # fmt: skip


@pytest.fixture(name="here")
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


def test_every_verb_is_found_in_its_module() -> None:
    """The table of modules is what they register, so that the help of all and the verb alone are the same thing."""
    for module, verbs in MODULES.items():
        app = typer.Typer()
        import_module(f"orchestrator.cli.{module}").register(app)
        names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
        assert (module, {*names, *(str(group.name) for group in app.registered_groups)}) == (module, set(verbs))


@pytest.mark.parametrize(
    ("verb", "heavy"),
    [
        ("launch", {"torch", "numpy", "fsspec", "s3fs", "botocore", "plotext"}),
        ("status", {"torch", "numpy", "fsspec", "s3fs", "botocore", "plotext", "orchestrator.supervisor"}),
    ],
)
def test_a_verb_loads_only_what_it_needs(verb: str, heavy: set[str]) -> None:
    """Modules count twice: at every start, and in the memory of a supervisor that lives for weeks."""
    code = f"import sys; from orchestrator.cli.app import app_for; app_for({verb!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(done.stdout.split())
    assert heavy & loaded == set()
    assert len(loaded) < 660


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
    assert run(["check", str(write_run(here))]) == 0
    assert str(here / "runs/tiny") in capsys.readouterr().out
    assert not (here / "runs").exists()


@pytest.mark.parametrize("verb", ["check", "launch"])
def test_mistakes_are_all_named_and_nothing_is_started(
    verb: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Typos in the file and on the command line: exit 2 and one line for each."""
    path = write_run(here, stepz=3, precision="b16")

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
        path = write_run(here, metrics={"port": port})
        os.truncate(here / "corpus" / "shard-001.bin", 2000)

        assert run(["launch", str(path)]) == 2

    said = capsys.readouterr().err
    assert f"metrics.port: port {port} on 127.0.0.1 cannot be taken" in said
    assert "shard-001.bin" in said
    assert not (here / "runs").exists()


# -- reading a run ----------------------------------------------------------------------------------------------------


def test_status_and_incidents_as_json_are_clean_and_complete(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON document each; a loss that is not finite is text, and suspicions are not incidents."""
    paths = RunPaths(here / "runs" / "a")
    write_journal(paths)

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
    write_journal(RunPaths(here / "runs" / "a"), "running")

    assert run(["status", "--json"]) == 0

    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["supervised"]) == ("stopped", False)
    assert "launch again" in status["because"]


def test_without_run_the_newest_below_here_is_meant(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Newest by its last write, wherever below the working directory; a name picks another."""
    for age_s, name in ((100, "old"), (0, "new"), (200, "older")):
        paths = RunPaths(here / "project" / "runs" / name)
        write_journal(paths)
        for file in paths.root.glob("run.db*"):
            moment = time.time() - age_s
            os.utime(file, (moment, moment))

    found = []
    for arguments in ([], ["old"], [str(here / "project/runs/older")]):
        assert run(["status", *arguments, "--json"]) == 0
        found.append(Path(json.loads(capsys.readouterr().out)["run_dir"]).name)

    assert found == ["new", "old", "older"]


@pytest.mark.parametrize("verb", ["status", "incidents", "checkpoints", "ledger", "stop", "checkpoint"])
def test_no_run_is_said_clearly(verb: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 with the way on, and nothing on stdout."""
    assert run([verb]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "longwatch launch" in captured.err


def test_stop_without_a_supervisor_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nobody to ask."""
    write_journal(RunPaths(here / "runs" / "a"))

    assert run(["stop"]) == 1
    assert "no supervisor is running" in capsys.readouterr().err


def test_checkpoints_of_an_empty_store(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None is an answer, not an error."""
    resolved = resolve(write_run(here))
    write_resolved(resolved)
    write_journal(resolved.paths)

    assert run(["checkpoints", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"checkpoints": []}


def test_json_is_clean_when_piped(here: Path) -> None:
    """As a program would call it: stdout is one JSON document, stderr is empty."""
    write_journal(RunPaths(here / "runs" / "a"))
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
    found = json.loads(capsys.readouterr().out)
    assert (found["incidents"], found["steps"]) == ([], 600)


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
