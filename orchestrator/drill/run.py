"""The drill's own run: the user's configuration made short, with faults planted, in a place of its own.

Two launches: in the first the trainer is killed once; between them the newest checkpoint is damaged where it lies; in
the second the learning rate explodes for four steps. What must follow is judged in `orchestrator.drill.checks`.
"""

import dataclasses
import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.config import ResolvedRun
from orchestrator.launching import prepare, supervise
from orchestrator.policy.model import Policy
from orchestrator.policy.shipped import in_force
from trainer.contract import arena
from trainer.contract.config import RunConfig
from trainer.contract.fence import lineage
from trainer.contract.manifest import manifest_key, unseal
from trainer.contract.paths import RunPaths
from trainer.contract.store import Store, open_store

SAVE_EVERY, FIRST_STEPS, STEPS = 10, 60, 160
KILLED_AT, BOMB = 33, (90, 93)
MARGIN_STEPS, SKIPPED_BATCHES, HOLD_STEPS, RAMP_STEPS, FACTOR = 10, 12, 15, 20, 0.5
_BOMB_FACTOR = 300.0
_MOST_EVALUATED = 64
_POLICY: dict[str, Any] = {
    "version": 1,
    "detect": {"recover_steps": 10, "recover_steps_max": 20},
    "guards": {"max_skipped_share": 1.0, "max_discarded_share": 1.0, "relapse_steps": 60},
    "rules": [
        {
            "on": "unrecovered_spike",
            "when": {"validation_confirms": True},
            "ladder": [
                {
                    "roll_back": {"margin_steps": MARGIN_STEPS},
                    "skip_data": f"{SKIPPED_BATCHES} batches",
                    "lower_lr": {"factor": FACTOR, "hold_steps": HOLD_STEPS, "ramp_steps": RAMP_STEPS},
                },
                {"halt": {}},
            ],
        },
        {"on": "initial_loss_off", "do": ["record"]},
    ],
}


def drill_of(run: ResolvedRun) -> ResolvedRun:
    """The same model, data, batch, precision and store, for a few minutes, under a name of its own."""
    name = f"{run.config.name}-drill-{secrets.token_hex(3)}"
    place = run.paths.root.with_name(name)
    changes: dict[str, Any] = {
        "name": name,
        "steps": STEPS,
        "run_dir": str(place),
        "schedule": {"kind": "constant", "warmup_steps": 10},
        "evaluate": {"every_steps": 20, "sequences": min(_MOST_EVALUATED, run.config.evaluate.sequences)},
        "checkpoint": {
            "every_steps": SAVE_EVERY, "good_after_steps": 10, "keep_good": 3, "patience_s": 600.0,
            "keep_local": run.config.checkpoint.keep_local,
        },
        "metrics": {"port": None},
        "planned_changes": (),
        "faults": [
            {"kind": "sigkill", "steps": [KILLED_AT, KILLED_AT]},
            {"kind": "lr_bomb", "steps": list(BOMB), "factor": _BOMB_FACTOR},
        ],
        "policy": None,
    }  # fmt: skip
    values = run.config.model_dump(by_alias=True) | changes
    config = RunConfig.model_validate(values | {"launch": run.config.launch})
    policy = in_force(Policy.model_validate(_POLICY))
    return dataclasses.replace(
        run, config=config, policy=policy, policy_text=json.dumps(_POLICY), paths=RunPaths(place)
    )


def carry_out(drill: ResolvedRun, tell: Callable[[str], None]) -> tuple[int, int]:
    """Both launches; the exit codes.

    Raises:
        ConfigError, OrchestratorError, StoreError: as a launch does.
    """
    tell(f"training {FIRST_STEPS} steps, killed at step {KILLED_AT}")
    short = dataclasses.replace(drill, config=drill.config.model_copy(update={"steps": FIRST_STEPS}))
    first = _launch(short)
    with_store = open_store(drill.config.store, drill.source.parent, drill.config.name)
    damaged = damage_newest(drill.paths, with_store)
    with_store.close()
    tell(f"checkpoint {damaged} was damaged; training on to step {STEPS}, the learning rate explodes at step {BOMB[0]}")
    return first, _launch(drill)


def _launch(run: ResolvedRun) -> int:
    ready = prepare(run)
    try:
        return supervise(ready, lambda *_: None)
    finally:
        ready.store.close()


def damage_newest(paths: RunPaths, store: Store) -> str:
    """Take one object from the newest checkpoint, wherever a copy lies; its name."""
    commit = lineage(store).commits[-1]
    victim = unseal(store.read(manifest_key(commit))).manifest.objects[0].key
    store.delete(victim)
    (paths.local_tier / victim).unlink(missing_ok=True)
    arena.remove(paths.arena)
    return commit


def remove(drill: ResolvedRun) -> None:
    """Everything of the drill: its run directory, and what lies below its own prefix of the store."""
    assert "-drill-" in drill.config.name
    store = open_store(drill.config.store, drill.source.parent, drill.config.name)
    try:
        for prefix in ("commits", "verdicts", "pins", "journal", "alive", "data", "fence", "probe"):
            for item in store.list(prefix):
                store.delete(item.key)
        place = store.local_path("fence/x")
        if place is not None:
            shutil.rmtree(Path(place).parents[1], ignore_errors=True)
    finally:
        store.close()
    shutil.rmtree(drill.paths.root, ignore_errors=True)
