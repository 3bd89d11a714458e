"""What an undisturbed trainer that is given the final plan comes to: the measure of every run that was disturbed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.chaos.world import World
from tests.keepers import keepers
from tests.stores import claimed
from trainer.contract.config import RunConfig
from trainer.contract.manifest import Manifest, manifest_key, unseal
from trainer.contract.paths import RunPaths
from trainer.contract.plan import ResumePlan
from trainer.contract.store import Store, open_store

_WITHIN_S = 3600.0


def weights(store: Store, commit: str) -> list[tuple[int, int]]:
    """Size and CRC32C of each file of tensors: weights, moments and all."""
    manifest: Manifest = unseal(store.read(manifest_key(commit))).manifest
    return [(entry.size, entry.crc32c) for entry in manifest.objects]


def undisturbed(world: World, steps: int, root: Path) -> tuple[list[tuple[int, int]], dict[int, float]]:
    """Train so many steps in one attempt under the plan that the disturbed run ended with; its weights and losses."""
    paths = RunPaths(root / "run")
    paths.create()
    faults = [fault for fault in world.faults if not fault.get("once", True)]  # poison belongs to the data
    config: dict[str, Any] = {**world.config, "steps": steps, "faults": faults, "store": {"url": str(root / "store")}}
    config.pop("policy", None)
    config["run_dir"] = str(paths.root)
    parsed = RunConfig.model_validate(config)
    paths.run_yaml.write_text(parsed.model_dump_json(by_alias=True))
    paths.data_book.write_bytes(world.paths.data_book.read_bytes())
    plan = _final_plan(world).model_copy(
        update={"attempt": 1, "epoch": 1, "candidates": (), "fresh": True, "reanchor": False}
    )
    paths.plan(1).write_text(plan.model_dump_json())
    store = claimed(open_store(parsed.store, root, parsed.name))
    command = [sys.executable, "-m", "trainer", "--run-dir", str(paths.root), "--attempt", "1"]
    with keepers(paths, parsed), paths.output(1).open("wb") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=_WITHIN_S, check=False)
    assert done.returncode == 0, paths.output(1).read_text()[-3000:]
    rows = map(json.loads, paths.records(1).read_text().splitlines())
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}
    return weights(store, f"{steps:012d}-e1-1"), losses


def _final_plan(world: World) -> ResumePlan:
    """Of the last attempt, with what was applied to it while it ran."""
    newest = max(world.paths.root.glob("plans/attempt-*.json"), key=lambda path: int(path.stem.partition("-")[2]))
    plan = ResumePlan.model_validate_json(newest.read_text())
    for row in world.rows("SELECT json FROM decisions WHERE kind = 'send_command' ORDER BY id"):
        decision = json.loads(row["json"])
        if decision["attempt"] == plan.attempt and decision["command"]["kind"] == "apply_plan":
            plan = ResumePlan.model_validate({**plan.model_dump(), **decision["command"]["update"]})
    return plan
