"""What can be known to be wrong before training starts: data, store and disk (asked of the trainer), and the port.

The trainer's own check runs in a process of its own, because it knows the data formats and this package does not.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from orchestrator.config import ResolvedRun
from orchestrator.documents import Document, Problem
from orchestrator.errors import OrchestratorError
from orchestrator.schema_paths import KeyPath
from trainer.contract.config import MetricsConfig
from trainer.contract.plan import OrderSpec

#: Beyond the store's own deadline: reading manifests and the sizes of shards, on a slow disk.
_EXTRA_S = 300.0
_KEYS: dict[str, KeyPath] = {"data": ("data",), "store": ("store",), "disk": ("run_dir",)}


class PreflightError(OrchestratorError):
    """The check itself could not be made."""

    exit_code = 1

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"the check before the start could not be made: {why}; run `longwatch doctor`")


class Data(BaseModel):
    """The trainer's own account of the training data: its book of shards, the order asked for, what is new in words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    book: dict[str, Any]
    order: OrderSpec
    changes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What the look before the start has shown."""

    problems: tuple[Problem, ...]
    data: Data | None = None


def preflight(run: ResolvedRun, *, port: bool = True, goes_on: bool = False) -> Found:
    """Every problem that can be found without starting, placed in run.yaml; and an account of the training data.

    Args:
        run: what is to be run.
        port: also look whether the port for metrics is free.
        goes_on: the run exists, so its data is compared with what it has read so far.

    Raises:
        PreflightError: the check could not be made, so nothing is known.
    """
    problems = port_problems(run.config.metrics, run.document) if port else []
    if run.config.launch.command is not None:
        return Found(tuple(problems))  # somebody else's trainer knows its own data
    with tempfile.TemporaryDirectory(prefix="longwatch-") as directory:
        file = Path(directory) / "run.yaml"
        file.write_bytes(run.config_json)
        command = [sys.executable, "-m", "trainer.preflight", "--config", str(file), "--json"]
        asked = _ask([*command, "--book", str(run.paths.data_book)] if goes_on else command, run)
    return Found((*problems, *asked.problems), asked.data)


def port_problems(metrics: MetricsConfig, document: Document) -> list[Problem]:
    """The port for /metrics, if something else has it."""
    if not metrics.port:
        return []
    family = socket.AF_INET6 if ":" in metrics.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((metrics.host, metrics.port))
        except OSError as error:
            message = (
                f"port {metrics.port} on {metrics.host} cannot be taken ({error.strerror}); "
                "free it, set metrics.port to 0 for any free one, or to null for none"
            )
            return [document.problem(("metrics", "port"), message)]
    return []


def _environment(run: ResolvedRun) -> dict[str, str]:
    """What the trainer will have."""
    added = run.config.launch.env.items()
    return {**os.environ, **{name: secret.get_secret_value() for name, secret in added}}


def _ask(command: list[str], run: ResolvedRun) -> Found:
    limit_s = run.config.store.timeout_s + _EXTRA_S
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, check=False, env=_environment(run)
        )
        answer = json.loads(done.stdout)
        problems = (
            run.document.problem(
                _KEYS.get(row["where"], ()), f"{row['what']}; {row['remedy']}" if row["remedy"] else str(row["what"])
            )
            for row in answer["problems"]
        )
        data = None if answer["data"] is None else Data.model_validate(answer["data"])
        return Found(tuple(problems), data)
    except subprocess.TimeoutExpired as error:
        raise PreflightError(f"no answer within {limit_s:.0f} s") from error
    except (ValueError, KeyError, TypeError) as error:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise PreflightError(f"exit code {done.returncode}: {last}") from error
