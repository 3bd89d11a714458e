"""run.yaml with its policy: what is relative to what, what may change when a run goes on, what is kept."""

import json
from pathlib import Path

import pytest

from orchestrator.config import check_changes, resolve, resolve_again, write_resolved
from orchestrator.documents import ConfigError
from orchestrator.facts import facts_of
from orchestrator.policy.shipped import shipped_policy
from orchestrator.recovery.retention import Spacing
from trainer.contract.config import RunConfig

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def _run_yaml(directory: Path, extra: str = "") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "run.yaml"
    path.write_text(f"name: x\nsteps: 5000\ndata: {{train: tokens/train, validation: 's3://b/v'}}\n{extra}")
    return path


def _said(path: Path, *sets: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(path, sets)
    return [str(problem) for problem in caught.value.problems]


def test_paths_are_relative_to_the_file_and_become_absolute(tmp_path: Path) -> None:
    """Data, store, run directory and policy; URLs of other protocols stay."""
    run = resolve(_run_yaml(tmp_path / "a", "store: {url: 'file://./store'}\n"))

    base = tmp_path / "a"
    assert run.config.data.train == str(base / "tokens/train")
    assert run.config.data.validation == "s3://b/v"
    assert run.config.store.url == f"file://{base / 'store'}"
    assert run.paths.root == base / "runs/x"
    assert run.policy == shipped_policy()


def test_own_policy_comes_before_the_shipped_rules(tmp_path: Path) -> None:
    """A class the file leaves out still has an answer."""
    path = _run_yaml(tmp_path, "policy: mine.yaml\n")
    (tmp_path / "mine.yaml").write_text("version: 1\nmode: observe\nrules: [{on: crash, do: [halt]}]\n")

    policy = resolve(path).policy

    assert policy.mode == "observe"
    assert len(policy.rules) == 1 + len(shipped_policy().rules)


def test_problems_of_both_files_and_of_the_options_come_together(tmp_path: Path) -> None:
    """One look shows everything that has to be corrected."""
    path = _run_yaml(tmp_path, "policy: mine.yaml\nseeed: 3\n")
    (tmp_path / "mine.yaml").write_text("version: 1\nmode: obsrve\n")

    said = "\n".join(_said(path, "steps=x"))

    assert "run.yaml:5:1: seeed" in said
    assert "mine.yaml:2:1: mode" in said
    assert "--set steps" in said


def test_missing_policy_file_is_named_at_its_key(tmp_path: Path) -> None:
    """The place is the line in run.yaml that names it."""
    path = _run_yaml(tmp_path, "policy: nowhere.yaml\n")

    (problem,) = _said(path)

    assert "run.yaml:4:1: policy: there is no file" in problem


def test_secrets_cannot_be_set_on_the_command_line(tmp_path: Path) -> None:
    """Other users of a machine can read argv."""
    (problem,) = _said(_run_yaml(tmp_path), "launch.env.TOKEN=hunter2")

    assert "hunter2" not in problem


def test_secrets_are_masked_in_what_is_kept(tmp_path: Path) -> None:
    """The resolved copy in the run directory has no value of launch.env, and is private."""
    run = resolve(_run_yaml(tmp_path, "launch: {env: {TOKEN: hunter2}}\n"))

    write_resolved(run)

    kept = b"".join(file.read_bytes() for file in run.paths.root.rglob("*") if file.is_file())
    assert b"hunter2" not in kept
    assert run.paths.run_yaml.stat().st_mode & 0o077 == 0


def test_resolved_copy_is_what_the_trainer_reads_and_can_be_resolved_again(tmp_path: Path) -> None:
    """JSON that the trainer's model takes; and the source is found again with its overrides."""
    run = resolve(_run_yaml(tmp_path), ["steps=6000"])

    write_resolved(run)

    assert RunConfig.model_validate_json(run.paths.run_yaml.read_bytes()) == run.config
    assert resolve_again(run.paths).config.steps == 6000


def test_run_directory_without_its_source_says_what_to_do(tmp_path: Path) -> None:
    """A run directory that was moved away from its run.yaml."""
    run = resolve(_run_yaml(tmp_path))
    write_resolved(run)
    run.source.unlink()

    with pytest.raises(ConfigError, match=r"run\.yaml"):
        resolve_again(run.paths)


@pytest.mark.parametrize(
    ("assignment", "frozen"),
    [
        ("steps=9000", False),
        ("optimizer.peak_lr=0.001", False),
        ("batch.micro_sequences=8", False),
        ("batch.sequences=1024", False),
        ("model.z_loss=0.0001", False),
        ("model.width=1536", True),
        ("batch.sequence_tokens=64", True),
        ("data.seed=9", True),
        ("data.train=elsewhere", False),
        ("store.url=s3://b/p", True),
    ],
)
def test_what_may_change_when_a_run_goes_on(tmp_path: Path, assignment: str, frozen: bool) -> None:
    """What checkpoints and the order of the data depend on may not; the message says why."""
    path = _run_yaml(tmp_path)
    write_resolved(resolve(path))
    again = resolve(path, [assignment])

    if frozen:
        with pytest.raises(ConfigError, match="may not change when a run goes on"):
            check_changes(again)
    else:
        assert check_changes(again) == [assignment.split("=")[0]]


def test_nothing_has_changed_in_an_equal_run(tmp_path: Path) -> None:
    """The same launch again finds no change."""
    run = resolve(_run_yaml(tmp_path))
    write_resolved(run)

    assert check_changes(run) == []


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_lost_configuration_opens_no_frozen_key(tmp_path: Path, damage: str) -> None:
    """Without knowing what it was nothing can be said to be unchanged."""
    run = resolve(_run_yaml(tmp_path))
    write_resolved(run)
    if damage == "missing":
        run.paths.run_yaml.unlink()
    else:
        run.paths.run_yaml.write_bytes(run.paths.run_yaml.read_bytes()[:50])

    with pytest.raises(ConfigError, match="not known what has changed"):
        check_changes(run)


def test_digests_follow_the_content(tmp_path: Path) -> None:
    """Equal files have equal digests; a changed key changes the one it belongs to."""
    path = _run_yaml(tmp_path)

    one, same, other = resolve(path), resolve(path), resolve(path, ["steps=6000"])

    assert (one.config_digest, one.policy_digest) == (same.config_digest, same.policy_digest)
    assert one.config_digest != other.config_digest
    assert one.policy_digest == other.policy_digest


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_shipped_examples_are_valid(path: Path) -> None:
    """Every example resolves without a problem and reads back as JSON."""
    run = resolve(path)

    assert json.loads(run.config_json)["name"] == run.config.name


def test_demo_is_valid_and_plants_three_faults() -> None:
    """The demo's files are checked like the others."""
    run = resolve(EXAMPLES[0].parent / "demo" / "run.yaml")

    assert [fault.kind for fault in run.config.faults] == ["sigkill", "lr_bomb", "bad_shard"]


def test_rules_of_age_are_durations_and_survive_being_kept(tmp_path: Path) -> None:
    """Written as people do, in seconds inside, and the resolved copy reads back as the same."""
    rules = [{"every": "1h", "for": "1d"}, {"every": "1.5d", "for": "30d"}]
    run = resolve(_run_yaml(tmp_path, f"checkpoint: {json.dumps({'keep_for': rules})}\n"))

    again = RunConfig.model_validate_json(run.config_json)

    assert again.checkpoint == run.config.checkpoint
    assert facts_of(again).keep_for == (Spacing(3600.0, 86400.0), Spacing(129600.0, 2592000.0))


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"every": 60, "for": "1d"}, "a duration is a number with a unit"),
        ({"every": "2d", "for": "1d"}, "longer than `for`"),
        ({"every": "0s", "for": "1d"}, "greater than 0"),
        ({"every": "1h"}, "for"),
    ],
)
def test_rules_of_age_that_make_no_sense_are_refused(rule: dict[str, object], said: str, tmp_path: Path) -> None:
    """With their place in the file."""
    (problem,) = _said(_run_yaml(tmp_path, f"checkpoint: {json.dumps({'keep_for': [rule]})}\n"))
    assert "checkpoint.keep_for.0" in problem
    assert said in problem
