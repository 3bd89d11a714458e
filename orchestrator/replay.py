"""`longwatch replay`: a recorded run through the same core that runs live, with every effect left out.

The engine folds the trace's records as it would a living run's, in a mode that decides and writes down but touches
nothing, so the trace goes on as it was recorded after a decision to roll back.
"""

from pathlib import Path
from typing import Any

from monitors.trace import read_trace
from orchestrator.policy.engine import Engine
from orchestrator.policy.events import AttemptSpawned, RecordReceived, RunOpened
from orchestrator.policy.model import Policy
from orchestrator.policy.state import Incident, RunFacts


def replay_trace(path: Path, policy: Policy) -> tuple[list[Incident], int]:
    """Fold a trace.

    Returns:
        The incidents in order of detection, and the number of steps that the trace spans.

    Raises:
        monitors.trace.TraceError: the file is not a trace; the error names line and column.
    """
    records = read_trace(path)
    last = max((record.step for record in records), default=0)
    facts = RunFacts(run_id=path.stem, total_steps=max(1, last), warmup_steps=0, batch_samples=1, trace=True)
    engine = Engine(policy, facts)
    engine.fold(RunOpened(at_s=0.0, run_id=path.stem, config_digest="", policy_digest="", code_version=""))
    engine.fold(AttemptSpawned(at_s=0.0, attempt=1, pid=1))
    for record in records:
        engine.fold(RecordReceived(at_s=float(record.step), record=record))
    first = min((record.step for record in records), default=1)
    return [i for i in engine.incidents() if i.state not in ("suspected", "dismissed")], last - first + 1


def as_json(incidents: list[Incident], steps: int) -> dict[str, Any]:
    """The published form: `{"incidents": [...], "steps": N}`."""
    return {"incidents": [i.model_dump(mode="json", by_alias=True) for i in incidents], "steps": steps}
