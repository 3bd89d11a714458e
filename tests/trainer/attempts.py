"""Support for tests of whole attempts: a tiny corpus, a run directory, attempts in this process or in their own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.keepers import keepers
from tests.stores import claimed
from trainer.attempt import Attempt
from trainer.contract.config import RunConfig
from trainer.contract.fence import commits_present
from trainer.contract.paths import KEEPER_ROLES, RunPaths
from trainer.contract.plan import ResumePlan
from trainer.contract.store import Store, open_store
from trainer.keeping.tier import LocalTier

VOCAB = 64
SHARD_TOKENS = 4000
#: Steps take a millisecond here: saves are waited for, and none is passed over on its way to the store.
SAVING = {"every_steps": 4, "patience_s": 30, "keep_local": 50}
DEADLINE_S = 90.0  # for a process; its start alone takes seconds on a busy machine


def write_corpus(root: Path, num_shards: int = 4, seed: int = 7) -> Path:
    """llm.c shards in which a token mostly follows from the one before."""
    rng = np.random.default_rng(seed)
    successor = rng.permutation(VOCAB)
    root.mkdir(parents=True, exist_ok=True)
    for index in range(num_shards):
        draws = rng.integers(0, VOCAB, SHARD_TOKENS)
        tokens = np.where(rng.random(SHARD_TOKENS) < 0.2, draws, successor[np.roll(draws, 1)]).astype(np.uint16)
        header = np.zeros(256, dtype=np.int32)
        header[:3] = (20240520, 1, SHARD_TOKENS)
        (root / f"shard-{index}.bin").write_bytes(header.tobytes() + tokens.tobytes())
    return root


@dataclass
class TinyRun:
    """One run directory. `changes` replace whole top-level keys of run.yaml."""

    root: Path
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.paths = RunPaths(self.root / "run")
        self.paths.create()
        corpus = self.root / "corpus"
        if not corpus.exists():
            write_corpus(corpus)
        self.config = RunConfig.model_validate(
            {
                "name": "tiny",
                "steps": 12,
                "precision": "fp32",
                "model": {"layers": 2, "heads": 2, "width": 32, "dropout": 0.1},
                "optimizer": {"peak_lr": 3e-3},
                "schedule": {"kind": "constant", "warmup_steps": 2},
                "batch": {"sequences": 8, "sequence_tokens": 32},
                "data": {
                    "train": str(corpus),
                    "validation": str(corpus),
                    "vocab_size": VOCAB,
                    "block_samples": 16,
                    "window_blocks": 2,
                },
                "evaluate": {"every_steps": 1000, "sequences": 16},
                "checkpoint": SAVING,
                "store": {"url": str(self.root / "store"), "timeout_s": 10},
                "deadlines": {"save": 60},
                "monitor": {"details_every": 5},
                "launch": {"threads": 1},
                **self.changes,
            }
        )
        self.paths.run_yaml.write_text(_as_json(self.config))

    @property
    def store(self) -> Store:
        """Where the checkpoints go."""
        return open_store(self.config.store, self.paths.root, self.config.name)

    def claim(self, epoch: int) -> None:
        """As a supervisor would, on everything that was saved so far."""
        known = (*commits_present(self.store), *commits_present(LocalTier(self.paths.local_tier).store))
        claimed(self.store, epoch, ancestry=known)

    def plan(self, attempt: int, **changes: Any) -> ResumePlan:
        """Write the plan of an attempt: fresh for the first, the newest commits for the others."""
        start: dict[str, Any] = {"fresh": True}
        if attempt > 1:
            start = {"candidates": tuple(reversed(commits_present(self.store)))}
        fields = {"run_id": self.config.name, "attempt": attempt, "epoch": attempt, **start, **changes}
        plan = ResumePlan.model_validate(fields)
        self.paths.plan(attempt).write_text(plan.model_dump_json())
        self.claim(plan.epoch)
        return plan

    def run(self, attempt: int = 1, *, keep_arena: bool = False, **changes: Any) -> int:
        """One attempt in this process; its exit code. The arena goes with it, unless it is to be kept."""
        self.plan(attempt, **changes)
        with keepers(self.paths, self.config, keep_arena=keep_arena), Attempt(self.paths, attempt) as entered:
            return int(entered.run())

    def spawn(self, attempt: int = 1, **changes: Any) -> subprocess.Popen[bytes]:
        """One attempt as a process of its own."""
        self.plan(attempt, **changes)
        command = [sys.executable, "-m", "trainer", "--run-dir", str(self.paths.root), "--attempt", str(attempt)]
        with self.paths.output(attempt).open("wb") as output:
            return subprocess.Popen(
                command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=subprocess.STDOUT
            )

    def finish(self, attempt: int = 1, **changes: Any) -> int:
        """The same, waited for."""
        with keepers(self.paths, self.config):
            process = self.spawn(attempt, **changes)
            try:
                return process.wait(DEADLINE_S)
            finally:
                process.kill()
                process.wait()

    def records(self, attempt: int, kind: str) -> list[dict[str, Any]]:
        """Records of one kind about an attempt, in order; of commits those in the store."""
        files = [self.paths.records(attempt), *(self.paths.keeper_records(role) for role in KEEPER_ROLES)]
        lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
        rows = [row for row in map(json.loads, lines) if (row["attempt"], row["kind"]) == (attempt, kind)]
        return [row for row in rows if row.get("tier") != "disk"]

    def losses(self, *attempts: int) -> dict[int, float]:
        """Step -> loss of the surviving history of these attempts."""
        found: dict[int, float] = {}
        for attempt in attempts:
            for started in self.records(attempt, "started"):
                found = {step: loss for step, loss in found.items() if step <= started["step"]}
            found |= {row["step"]: row["loss"] for row in self.records(attempt, "step")}
        return found

    def exit_file(self, attempt: int) -> dict[str, Any]:
        """How an attempt says that it ended."""
        found: dict[str, Any] = json.loads(self.paths.exit_file(attempt).read_text())
        return found

    def fault_counts(self) -> dict[str, int]:
        """Fault -> firings."""
        found: dict[str, int] = json.loads(self.paths.fault_counts().read_text())
        return found


def _as_json(config: RunConfig) -> str:
    return config.model_dump_json(by_alias=True)
