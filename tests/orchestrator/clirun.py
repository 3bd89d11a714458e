"""A run.yaml and a journal as the command line finds them, without training anything."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from monitors.taxonomy import IncidentClass
from orchestrator.journal import Batch, Folded, Journal
from orchestrator.policy.decisions import EndRun
from orchestrator.policy.events import Ticked
from orchestrator.policy.state import Incident, RunStatus
from tests.runs import tiny_config, write_corpus
from trainer.contract.paths import RunPaths


def write_run(directory: Path, **changes: Any) -> Path:
    """A tiny run.yaml with data that is there."""
    directory.mkdir(parents=True, exist_ok=True)
    corpus = directory / "corpus"
    if not corpus.exists():
        write_corpus(corpus, num_shards=2)
    path = directory / "run.yaml"
    path.write_text(json.dumps(tiny_config(corpus, **changes)))
    return path


def write_journal(
    paths: RunPaths,
    state: str = "running",
    step: int = 7,
    end: EndRun | None = None,
    last_stored_step: int | None = None,
) -> None:
    """A journal as a supervisor leaves it: a status, one incident and one suspicion."""
    paths.create()
    status = RunStatus.model_validate(
        {
            "state": state, "step": step, "total_steps": 100, "attempt": 1, "loss": float("nan"), "lr": 1e-3,
            "tokens": 10, "tokens_per_s": None, "validation": None, "last_good_step": None,
            "last_commit_step": last_stored_step, "last_stored_step": last_stored_step,
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
