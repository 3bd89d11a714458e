"""What is in deploy/ is valid where it is to be used, and knows the exit codes that the product has."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from orchestrator.config import resolve
from orchestrator.policy.decisions import EXIT_CODES
from tests.deploy.tools import DEPLOY, passes, tool

#: After these a person is needed: nothing may start the run again by itself.
_FINAL = {2, *(code for state, code in EXIT_CODES.items() if state in ("halted", "budget_used_up", "stopped"))}
_PREEMPTED = EXIT_CODES["preempted"]


def _documents(text: str) -> Iterator[dict[str, Any]]:
    yield from YAML(typ="safe", pure=True).load_all(text)


def test_the_unit_is_valid(tmp_path: Path) -> None:
    """As systemd reads it; only the program and the user are of this machine."""
    text = (DEPLOY / "systemd" / "longwatch@.service").read_text()
    unit = tmp_path / "longwatch@my-run.service"
    unit.write_text(text.replace("/opt/longwatch/.venv/bin/longwatch", "/bin/true").replace("User=longwatch", ""))
    assert passes(tool("systemd-analyze"), "verify", str(unit)) == ""


def test_the_unit_knows_the_exit_codes() -> None:
    """What needs a person is not restarted, and the supervisor alone is told to leave."""
    text = (DEPLOY / "systemd" / "longwatch@.service").read_text()
    settings = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    assert {int(code) for code in settings["RestartPreventExitStatus"].split()} == _FINAL
    assert (settings["Restart"], settings["KillMode"], settings["Type"]) == ("on-failure", "process", "notify")
    assert int(settings["WatchdogSec"]) > 60


def test_the_batch_script_is_clean_and_queues_again_for_one_code_only() -> None:
    """By shellcheck; the run of it is in test_slurm."""
    script = DEPLOY / "slurm" / "longwatch.sbatch"
    assert passes(tool("shellcheck"), str(script)) == ""
    assert re.search(rf"readonly preempted={_PREEMPTED}\n", script.read_text())


def test_the_container_file_is_clean() -> None:
    """By hadolint."""
    passes(tool("hadolint"), "--failure-threshold", "warning", str(DEPLOY / "container" / "Containerfile"))


@pytest.fixture(name="manifests", scope="module")
def _manifests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What kustomize makes of them."""
    built = tmp_path_factory.mktemp("kubernetes") / "all.yaml"
    built.write_text(passes(tool("kubectl"), "kustomize", str(DEPLOY / "kubernetes")))
    return built


def test_the_manifests_are_valid(manifests: Path) -> None:
    """Strictly, by the schemas of Kubernetes: no unknown key, no wrong type. (The monitor is of an operator.)"""
    said = passes(tool("kubernetes-validate"), "--strict", str(manifests))
    assert said.count("passed") == 3


def test_the_job_knows_the_exit_codes(manifests: Path) -> None:
    """A person for what needs one, nothing charged for a preemption or a lost node, one pod at a time."""
    (job,) = [one for one in _documents(manifests.read_text()) if one["kind"] == "Job"]
    rules = job["spec"]["podFailurePolicy"]["rules"]
    by_code = {rule["action"]: set(rule["onExitCodes"]["values"]) for rule in rules if "onExitCodes" in rule}
    assert by_code == {"FailJob": _FINAL, "Ignore": {_PREEMPTED}}
    assert job["spec"]["podReplacementPolicy"] == "Failed"
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_the_configuration_in_the_manifests_is_one(manifests: Path, tmp_path: Path) -> None:
    """The run.yaml and policy.yaml that the pod sees are accepted, and what the job names is what they name."""
    (config,) = [one for one in _documents(manifests.read_text()) if one["kind"] == "ConfigMap"]
    for name, text in config["data"].items():
        (tmp_path / name).write_text(text)
    run = resolve(tmp_path / "run.yaml", ())
    (job,) = [one for one in _documents(manifests.read_text()) if one["kind"] == "Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert {one["containerPort"] for one in container["ports"]} == {run.config.metrics.port}
    assert {one["name"] for one in container["env"]} == {run.config.store.key_env, run.config.store.secret_env}
    assert str(run.paths.root) in {one["mountPath"] for one in container["volumeMounts"]}
    assert json.dumps(container["args"]) == '["launch", "/config/run.yaml"]'


# -- compose ---------------------------------------------------------------------------------------------------------


@pytest.fixture(name="compose", scope="module")
def _compose() -> dict[str, Any]:
    """The file with its merges resolved."""
    loaded: dict[str, Any] = YAML(typ="safe", pure=True).load((_COMPOSE / "compose.yaml").read_text())
    return loaded


_COMPOSE = DEPLOY / "compose"


def test_the_services_fit_the_specification(compose: dict[str, Any]) -> None:
    """Of compose files: no unknown key, no wrong type."""
    specification = pytest.importorskip("compose_spec")
    specification.ComposeSpecification.model_validate({key: one for key, one in compose.items() if key[:2] != "x-"})


def test_the_services_are_pinned_private_and_have_what_they_mount(compose: dict[str, Any]) -> None:
    """No `latest`, no port beyond loopback, no mount that the repository does not have."""
    ours = {"run.yaml": "run.example.yaml", "../../data": "."}  # what a user brings
    for name, service in compose["services"].items():
        assert "build" in service or re.search(r":v?[0-9.]+$", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        for mount in service.get("volumes", ()):
            source = mount.partition(":")[0]
            if source.startswith("."):
                assert (_COMPOSE / ours.get(source.removeprefix("./"), source)).exists(), mount
            else:
                assert source in compose["volumes"], mount


def test_the_services_find_each_other(compose: dict[str, Any], tmp_path: Path) -> None:
    """The run's store and port, and what Prometheus scrapes and Grafana asks, are services and ports of this file."""
    shutil.copy(_COMPOSE / "run.example.yaml", tmp_path / "run.yaml")
    run = resolve(tmp_path / "run.yaml", ())
    assert run.config.store.endpoint_url == "http://store:8333"
    assert "-s3.port=8333" in compose["services"]["store"]["command"]
    environment = compose["services"]["run"]["environment"]
    assert {run.config.store.key_env, run.config.store.secret_env} == set(environment)
    shutil.copy(_COMPOSE / "prometheus.yml", tmp_path)
    shutil.copy(DEPLOY / "prometheus" / "longwatch.rules.yml", tmp_path)
    passes(tool("promtool"), "check", "config", str(tmp_path / "prometheus.yml"))
    scraped = YAML(typ="safe", pure=True).load((_COMPOSE / "prometheus.yml").read_text())
    assert scraped["scrape_configs"][0]["static_configs"][0]["targets"] == [f"run:{run.config.metrics.port}"]
