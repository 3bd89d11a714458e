"""Support for tests that run the whole of Longwatch: a tiny corpus, a tiny model, the real command line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.journal import Batch, Journal
from orchestrator.process.child import kill_leftovers
from trainer.contract import arena
from trainer.contract.paths import KEEPER_ROLES, RunPaths

_VOCABULARY = 64
_SHARD_TOKENS = 12_000
#: Enough for a process start on a busy two-core machine; a run that takes longer is stuck.
DEADLINE_S = 150.0


def write_corpus(root: Path, num_shards: int = 8, seed: int = 7) -> Path:
    """Token shards with structure to learn: each token mostly follows from the one before it.

    The format is llm.c's (magic 20240520), which carries its own header; a manifest is derived from it.
    """
    rng = np.random.default_rng(seed)
    successor = rng.permutation(_VOCABULARY)
    root.mkdir(parents=True, exist_ok=True)
    for index in range(num_shards):
        noise = rng.random(_SHARD_TOKENS) < 0.15
        draws = rng.integers(0, _VOCABULARY, _SHARD_TOKENS)
        tokens = np.empty(_SHARD_TOKENS, dtype=np.uint16)
        current = int(draws[0])
        for position in range(_SHARD_TOKENS):
            current = int(draws[position]) if noise[position] else int(successor[current])
            tokens[position] = current
        header = np.zeros(256, dtype=np.int32)
        header[:3] = (20240520, 1, _SHARD_TOKENS)
        (root / f"shard-{index:03d}.bin").write_bytes(header.tobytes() + tokens.tobytes())
    return root


def tiny_config(corpus: Path, **changes: Any) -> dict[str, Any]:
    """A run.yaml for a model that takes a few milliseconds a step. `changes` replace whole top-level keys."""
    config: dict[str, Any] = {
        "version": 1,
        "name": "tiny",
        "steps": 120,
        "precision": "fp32",
        "model": {"layers": 2, "heads": 2, "width": 32},
        "optimizer": {"peak_lr": 3e-3},
        "schedule": {"kind": "constant", "warmup_steps": 10},
        "batch": {"sequences": 8, "sequence_tokens": 32},
        "data": {
            "train": str(corpus),
            "validation": str(corpus),
            "vocab_size": _VOCABULARY,
            "block_samples": 16,
            "window_blocks": 2,
        },
        "evaluate": {"every_steps": 20, "sequences": 16},
        # steps take a few milliseconds: saves are waited for, and none is passed over on its way to the store
        "checkpoint": {
            "every_steps": 10,
            "good_after_steps": 10,
            "keep_good": 3,
            "patience_s": 30,
            "keep_local": 50,
        },
        "store": {"url": "./store"},
        "deadlines": {"grace_s": 20, "orphan_s": 60},
        "monitor": {"details_every": 10},
        "metrics": {"port": None},
        # two cores have enough to do; the standby and the logbook have tests of their own
        "launch": {"threads": 1, "standby": False, "logbook_minutes": None},
    }
    return config | changes


@dataclass
class Run:
    """One run in its own directory, driven as a user would: by the command line."""

    root: Path
    config: dict[str, Any]
    policy: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        if self.policy is not None:
            (self.root / "policy.yaml").write_text(json.dumps(self.policy))
            self.config = {**self.config, "policy": "policy.yaml"}
        self.file.write_text(json.dumps(self.config))

    @property
    def file(self) -> Path:
        """run.yaml (JSON is YAML)."""
        return self.root / "run.yaml"

    @property
    def paths(self) -> RunPaths:
        """The run directory."""
        return RunPaths(self.root / "runs" / str(self.config["name"]))

    @property
    def store(self) -> Path:
        """The checkpoint store of a file:// run."""
        return self.root / "store" / str(self.config["name"])

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`longwatch launch run.yaml ARGUMENTS` in the background."""
        command = [sys.executable, "-m", "orchestrator.cli", "launch", str(self.file), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **self.environment}
        return subprocess.Popen(
            command, cwd=self.root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def launch(self, *arguments: str, expect: int = 0) -> str:
        """Launch and wait; returns what was printed.

        Raises:
            AssertionError: it ended with another code than expected; the message has the output.
        """
        process = self.start(*arguments)
        return self.wait(process, expect)

    def wait(self, process: subprocess.Popen[str], expect: int = 0) -> str:
        """Wait for a launch to end with a code."""
        try:
            output, _ = process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill_everything(process)
            output, _ = process.communicate()
            raise AssertionError(f"still running after {DEADLINE_S} s:\n{output}\n{self.trainer_output()}") from None
        assert process.returncode == expect, f"exit {process.returncode}\n{output}\n{self.trainer_output()}"
        return output

    def kill_everything(self, process: subprocess.Popen[str]) -> None:
        """SIGKILL the supervisor and the processes that it left."""
        process.kill()
        for role in KEEPER_ROLES:
            kill_leftovers(self.paths.keeper_lock(role))
        arena.remove(self.paths.arena)
        for attempt in self.attempts():
            pid = int(attempt["pid"] or 0)
            if pid and Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)

    def trainer_output(self) -> str:
        """Tails of what the attempts printed."""
        logs = sorted((self.paths.root / "logs").glob("attempt-*.out"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    def cli(self, *arguments: str) -> Any:
        """A read-only verb with --json, parsed."""
        command = [sys.executable, "-m", "orchestrator.cli", *arguments, str(self.paths.root), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def incidents(self) -> list[dict[str, Any]]:
        """What `longwatch incidents --json` says."""
        found: list[dict[str, Any]] = self.cli("incidents")["incidents"]
        return found

    def incident(self, cls: str) -> dict[str, Any]:
        """The one incident of a class; anything else is an error that shows what was found."""
        found = [incident for incident in self.incidents() if incident["class"] == cls]
        assert len(found) == 1, [(i["class"], i["why"]) for i in self.incidents()]
        return found[0]

    def attempts(self) -> list[dict[str, Any]]:
        """Rows of the attempts table."""
        if not self.paths.database.exists():
            return []
        with closing(Journal.read_only(self.paths.database)) as journal:
            return [dict(row) for row in journal.attempts()]

    def records(self, attempt: int, kind: str | None = None) -> list[dict[str, Any]]:
        """The records about an attempt, its own first; a line that is being written at the moment is not there yet.

        Of commits only those in the store.
        """
        rows = []
        for path in (self.paths.records(attempt), *(self.paths.keeper_records(role) for role in KEEPER_ROLES)):
            complete = path.read_text().rpartition("\n")[0] if path.exists() else ""
            rows += [row for row in map(json.loads, complete.splitlines()) if row["attempt"] == attempt]
        return [row for row in rows if kind in (None, row["kind"]) and row.get("tier") != "disk"]

    def surviving_steps(self) -> dict[int, dict[str, Any]]:
        """Step records of the surviving history: a later attempt's load below a step erases it."""
        steps: dict[int, dict[str, Any]] = {}
        for attempt in range(1, len(self.attempts()) + 1):
            for started in self.records(attempt, "started"):
                if not started["replay"]:
                    steps = {step: row for step, row in steps.items() if step <= started["step"]}
            steps.update({row["step"]: row for row in self.records(attempt, "step") if not row["replay"]})
        return steps

    def plan(self, attempt: int) -> dict[str, Any]:
        """The resume plan of an attempt."""
        plan: dict[str, Any] = json.loads(self.paths.plan(attempt).read_text())
        return plan

    def fault_counts(self) -> dict[str, Any]:
        """How often each configured fault fired, in the trainer and on the way to the store."""
        counts: dict[str, Any] = {}
        for path in (self.paths.fault_counts(), self.paths.fault_counts("uploader")):
            counts |= json.loads(path.read_text()) if path.exists() else {}
        return counts


def edit_state(run: Run, **changes: Any) -> None:
    """Change what the engine of a run that is not running remembers, as if it had so decided earlier."""
    with closing(Journal.open(run.paths.database)) as journal:
        _, raw = journal.newest_snapshot()
        assert raw is not None
        snapshot = json.loads(raw)
        assert changes.keys() <= snapshot["state"].keys()
        snapshot["state"].update(changes)
        journal.commit(Batch(snapshot=json.dumps(snapshot).encode()))


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Poll until something is so.

    Raises:
        AssertionError: it is not so by the deadline.
    """
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, f"{what}: not within {deadline_s} s"
        time.sleep(0.02)
