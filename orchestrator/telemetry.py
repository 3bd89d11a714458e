"""Between the engine and the metrics: what a fold has changed, counted once each, also over restarts."""

import json
import time
from contextlib import ExitStack

import structlog

from monitors.exporter import Exporter, ExporterError
from monitors.metrics import Metrics, RunGauges
from monitors.records import Record
from orchestrator.journal import StoredDecision
from orchestrator.policy.state import Incident, RunStatus
from orchestrator.process.learned import Learned
from orchestrator.process.lock import is_held
from orchestrator.process.watch import deadline_s
from trainer.contract.config import DeadlinesConfig, MetricsConfig
from trainer.contract.liveness import Phase
from trainer.contract.paths import RunPaths

_LEARNED_PHASES = (Phase.TRAIN, Phase.EVALUATE, Phase.SAVE)
_LOG = structlog.get_logger(__name__)
_MAY_CHANGE = 64  # the newest incidents; the engine looks at no older ones either


class Telemetry:
    """Remembers what was counted already. `metrics` is what Prometheus reads."""

    def __init__(self, metrics: Metrics, deadlines: DeadlinesConfig) -> None:
        self.metrics = metrics
        self.learned = Learned()
        self._deadlines = deadlines
        self._incidents: dict[int, str] = {}
        self._actions: dict[int, int] = {}

    def restore(self, totals: dict[str, float], incidents: list[Incident], step: int) -> None:
        """Go on from a journal: these incidents were written and counted."""
        self.metrics.restore(totals, step)
        for incident in incidents:
            self._incidents[incident.id] = _text(incident)
            self._actions[incident.id] = len(incident.decision)

    def observe(self, record: Record) -> None:
        """A record came in."""
        self.metrics.observe(record)
        self.learned.observe(record)

    def totals(self) -> str:
        """All counters as JSON."""
        return json.dumps(self.metrics.totals())

    def changed(self, incidents: list[Incident]) -> dict[int, str]:
        """Incidents that differ from what was written last, as JSON; new ones and new actions are counted."""
        changed: dict[int, str] = {}
        for incident in incidents[-_MAY_CHANGE:]:
            text = _text(incident)
            if self._incidents.get(incident.id) == text:
                continue
            if incident.id not in self._incidents:
                self.metrics.count("incidents_total", incident.cls)
            for action in incident.decision[self._actions.get(incident.id, 0) :]:
                self.metrics.count("actions_total", action)
            self._actions[incident.id] = max(len(incident.decision), self._actions.get(incident.id, 0))
            changed[incident.id] = self._incidents[incident.id] = text
        return changed

    def decided(self, stored: list[StoredDecision]) -> None:
        """Count new decisions."""
        for one in stored:
            self.metrics.count("decisions_total", one.decision.kind)

    def show(self, status: RunStatus, *, trainer_up: bool) -> None:
        """Bring the gauges up to date."""
        for phase in _LEARNED_PHASES:
            self.metrics.set("deadline_seconds", deadline_s(self._deadlines, phase, learned=self.learned), phase)
        self.metrics.show(
            RunGauges(
                state=status.state,
                step=status.step,
                planned_steps=status.total_steps,
                attempt=status.attempt,
                lineage_tokens=status.tokens,
                trainer_up=trainer_up,
                open_incidents=status.open_incidents,
                restarts_left=status.restarts_left,
                rollbacks_left=status.rollbacks_left,
                quarantined_shards=len(status.quarantined_shards),
                lr_factor=status.lr_factor,
                last_commit_step=status.last_commit_step,
                last_good_step=status.last_good_step,
                at_s=time.time(),
            )
        )


def serve(stack: ExitStack, metrics: Metrics, config: MetricsConfig, paths: RunPaths) -> Exporter | None:
    """Serve /metrics while the stack holds; None where none are wanted.

    A trainer that lives is rather supervised without metrics than not at all.

    Raises:
        ExporterError: the port is in use.
    """
    if config.port is None:
        return None
    try:
        return stack.enter_context(Exporter(metrics, config.host, config.port))
    except ExporterError as error:
        if not is_held(paths.child_lock):
            raise
        _LOG.error("metrics_not_served", error=str(error))
        return None


def _text(incident: Incident) -> str:
    return incident.model_dump_json(by_alias=True)
