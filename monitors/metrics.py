"""Every metric of Longwatch in one table, and how records and the run's state become their values.

Prefix `longwatch_`, base units, `_total` for counters, and no label whose values are not listed here: every
combination exists from the start, at 0, so that the first incident of a run raises a counter instead of creating one
(a counter that appears with 1 never alerts). Counters count work done, replays and lost work included; gauges follow
the lineage. What is unknown is NaN, never 0. The totals of all counters can be saved and restored.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, assert_never

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics

from monitors.records import (
    LAYER_GROUPS,
    ActivationRecord,
    CommitFailedRecord,
    CommitRecord,
    ErrorRecord,
    EvalRecord,
    FaultRecord,
    FinishedRecord,
    PhaseRecord,
    PlanAppliedRecord,
    Record,
    SnapshotRecord,
    StartedRecord,
    StepRecord,
)
from monitors.taxonomy import IncidentClass

PREFIX = "longwatch_"
RUN_STATES = ("starting", "running", "recovering", "stopped", "halted", "finished", "failed")
#: The supervisor's vocabularies; a test holds them equal to its tables.
EXIT_CAUSES = (
    "hang", "finished", "preempted", "left", "replay_done", "orphaned", "config", "data", "data_unreachable",
    "checkpoint", "disk_full", "store", "cuda_oom", "host_oom", "nccl", "gpu", "gpu_needs_reset", "native_crash",
    "killed", "user_error", "host_lost", "error", "unknown",
)  # fmt: skip
DECISION_KINDS = (
    "start_attempt", "stop_attempt", "send_command", "write_verdict", "prune_checkpoints", "notify",
    "capture_evidence", "end_run",
)  # fmt: skip
ACTIONS = (
    "record", "notify", "capture", "evaluate", "diagnose", "checkpoint", "lower_lr", "roll_back", "skip_data",
    "quarantine_shards", "reseed", "restart", "widen_rollback", "halt",
)  # fmt: skip
FAULTS = (
    "nan_loss", "nan_grad", "lr_bomb", "lr_override", "bad_shard", "leak_targets", "zero_layer", "saturate_layer",
    "drop_optimizer_state", "bit_flip", "corrupt_checkpoint", "hang", "sigkill", "slow", "torn_write", "store_error",
    "oom", "loss_drift", "scale_qk", "grad_bomb",
)  # fmt: skip
#: Gauges that say when something happened; the alerts on their age must survive a restart of the supervisor.
_LASTING = (
    "last_step_timestamp_seconds", "last_local_commit_timestamp_seconds", "last_commit_timestamp_seconds",
    "last_good_timestamp_seconds",
)  # fmt: skip
KEEPERS = ("writer", "uploader")
OUTCOMES = ("on_disk", "committed", "failed")
#: Rungs of the trainer's prevention ladder; `gave_in` is an update that was applied although its norm was out.
RUNGS = ("clip_norm", "adaptive_clip", "skip_norm", "skip_non_finite", "gave_in")
_GROUP = {"layer_group": LAYER_GROUPS}

Labels = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the table. `labels` maps each label to all values it can ever have."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: Labels = field(default_factory=dict)


TABLE: tuple[Metric, ...] = (
    # the run
    Metric("state", "gauge", "1 for the state the run is in, 0 for the others.", {"state": RUN_STATES}),
    Metric("step", "gauge", "Updates done in the surviving lineage; goes back at a rollback."),
    Metric("planned_steps", "gauge", "Updates planned."),
    Metric("attempt", "gauge", "Number of the current attempt."),
    Metric("lineage_tokens", "gauge", "Tokens trained on in the surviving lineage."),
    Metric("trainer_up", "gauge", "1 while a trainer process lives."),
    Metric("open_incidents", "gauge", "Incidents going on or not yet judged."),
    Metric("restarts_left", "gauge", "Restarts that the process budget still allows."),
    Metric("rollbacks_left", "gauge", "Rollbacks that the training budget still allows."),
    Metric("quarantined_shards", "gauge", "Shards that are not read any more."),
    Metric("supervisor_loop_timestamp_seconds", "gauge", "When the supervisor's loop last turned; a watchdog."),
    Metric("supervisor_starts_total", "counter", "How often a supervisor took the run."),
    # training
    Metric("loss", "gauge", "Loss in nats a token.", {"split": ("train", "validation")}),
    Metric("grad_norm", "gauge", "Global L2 norm of the gradient before clipping."),
    Metric("group_grad_norm", "gauge", "L2 norm of the gradient of a layer group.", _GROUP),
    Metric("learning_rate", "gauge", "Learning rate of the last update."),
    Metric("lr_factor", "gauge", "Factor on the planned schedule by overlays; 1 is none."),
    Metric("update_ratio", "gauge", "Size of the update over size of the weights.", _GROUP),
    Metric("activation_rms", "gauge", "RMS of block outputs.", _GROUP),
    Metric("activation_max", "gauge", "Largest absolute block output.", _GROUP),
    Metric("activation_dead_ratio", "gauge", "Share of MLP units that never fire.", _GROUP),
    Metric("activation_saturated_ratio", "gauge", "Share of MLP units that are saturated.", _GROUP),
    Metric("attention_logit_max", "gauge", "Largest attention logit.", _GROUP),
    Metric("second_moment_ratio", "gauge", "RMS of squared gradient over Adam's second moment.", _GROUP),
    Metric("log_z", "gauge", "Mean log partition function of the output."),
    Metric("loss_scale", "gauge", "fp16 loss scale."),
    Metric("tokens_per_second", "gauge", "Tokens of the last step over its time."),
    Metric("last_step_timestamp_seconds", "gauge", "When the last update was done."),
    Metric("steps_total", "counter", "Updates done, work that was lost later and replays included."),
    Metric("tokens_total", "counter", "Tokens trained on, work that was lost later and replays included."),
    Metric("step_seconds_total", "counter", "Time spent in steps.", {"part": ("data", "compute", "other")}),
    Metric("clipped_steps_total", "counter", "Updates whose gradient was clipped."),
    Metric("skipped_steps_total", "counter", "Updates not applied: not finite, or left out for their norm."),
    Metric("prevention_total", "counter", "Updates on which a rung of the prevention ladder acted.", {"rung": RUNGS}),
    Metric("nonfinite_total", "counter", "Steps with a non-finite signal.", {"signal": ("loss", "grad_norm")}),
    Metric("evaluations_total", "counter", "Evaluations done."),
    Metric("evaluation_seconds_total", "counter", "Time spent in evaluations."),
    # checkpoints
    Metric("last_commit_step", "gauge", "Step of the newest checkpoint of the lineage."),
    Metric("last_local_commit_timestamp_seconds", "gauge", "When the newest checkpoint was on the node's own disk."),
    Metric("last_commit_timestamp_seconds", "gauge", "When the newest checkpoint was in the store."),
    Metric("last_good_step", "gauge", "Step of the newest good checkpoint of the lineage."),
    Metric("last_good_timestamp_seconds", "gauge", "When a checkpoint last became good."),
    Metric("checkpoints_total", "counter", "Saves by how far they came.", {"outcome": OUTCOMES}),
    Metric("keeper_restarts_total", "counter", "Writer and uploader processes that died.", {"role": KEEPERS}),
    Metric("checkpoint_bytes_total", "counter", "Bytes committed."),
    Metric("checkpoint_seconds_total", "counter", "Time from snapshot to commit, beside training."),
    Metric("checkpoint_stall_seconds_total", "counter", "Time that training stood still for snapshots."),
    Metric("condemned_checkpoints_total", "counter", "Checkpoints that failed their verification on load."),
    Metric("store_retries_total", "counter", "Store calls that failed and are tried again."),
    # incidents and processes
    Metric("incidents_total", "counter", "Incidents by class.", {"class": tuple(IncidentClass)}),
    Metric("actions_total", "counter", "Actions of the policy that incidents led to.", {"action": ACTIONS}),
    Metric("decisions_total", "counter", "Decisions by kind.", {"decision": DECISION_KINDS}),
    Metric("notifications_total", "counter", "Notifications.", {"level": ("info", "warning", "page")}),
    Metric("attempts_total", "counter", "Trainer processes that were released to run."),
    Metric("attempt_starts_total", "counter", "Starts of attempts by way.", {"way": ("cold", "standby")}),
    Metric("attempt_exits_total", "counter", "Ends of attempts by cause.", {"cause": EXIT_CAUSES}),
    Metric(
        "deadline_seconds", "gauge", "Silence after which a phase is suspected, as learned from this run.",
        {"phase": ("train", "evaluate", "save")},
    ),
    Metric("hangs_total", "counter", "Deadlines passed once and twice.", {"stage": ("suspected", "confirmed")}),
    Metric("lost_steps_total", "counter", "Updates that were done and then given up by a rollback or restart."),
    Metric("records_rejected_total", "counter", "Lines of a trainer that were no valid records."),
    Metric("trainer_errors_total", "counter", "Exceptions that a trainer reported."),
    Metric("faults_injected_total", "counter", "Injected faults that fired (tests and drills).", {"fault": FAULTS}),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunGauges:
    """The state of the run as gauges; None is unknown."""

    state: str
    step: int
    planned_steps: int
    attempt: int
    lineage_tokens: int
    trainer_up: bool
    open_incidents: int
    restarts_left: int
    rollbacks_left: int
    quarantined_shards: int
    lr_factor: float
    last_commit_step: int | None
    last_good_step: int | None
    at_s: float


class Metrics:
    """The values. Its registry is its own; nothing else of the process is in it."""

    def __init__(self, run_id: str, config_digest: str = "", version: str = "") -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry(auto_describe=False)
        self._metrics = {metric.name: self._made(metric) for metric in TABLE}
        info = Gauge(
            PREFIX + "run_info", "1; joins other series with the run.", ("run_id", "config", "version"),
            registry=self.registry,
        )  # fmt: skip
        info.labels(run_id, config_digest, version).set(1)
        self._counters = list(self._all_counters())
        self._highest_step = 0

    def _made(self, metric: Metric) -> Any:
        kind: type[Any] = Counter if metric.kind == "counter" else Gauge
        made = kind(PREFIX + metric.name, metric.help, tuple(metric.labels), registry=self.registry)
        for values in product(*metric.labels.values()):
            child = made.labels(*values) if values else made
            if metric.kind == "gauge" and metric.name not in ("state", "trainer_up", "open_incidents"):
                child.set(math.nan)  # nothing is known yet
        return made

    def count(self, name: str, *labels: str, by: float = 1.0) -> None:
        """Raise a counter; the amount must be finite and not negative."""
        metric = self._metrics[name]
        (metric.labels(*labels) if labels else metric).inc(by)

    def set(self, name: str, value: float | None, *labels: str) -> None:
        """Set a gauge; None is unknown."""
        metric = self._metrics[name]
        (metric.labels(*labels) if labels else metric).set(math.nan if value is None else value)

    def totals(self) -> dict[str, float]:
        """What must outlive the supervisor: counters that are not 0 as `name{label}`, and when things last happened."""
        totals = {key: float(child._value.get()) for key, child in self._counters}
        totals |= {name: float(self._metrics[name]._value.get()) for name in _LASTING}
        return {key: value for key, value in totals.items() if value and not math.isnan(value)}

    def restore(self, totals: Mapping[str, float], step: int) -> None:
        """Go on from saved totals, with the lineage at `step`; a counter that exists no more is left out."""
        self._highest_step = step
        for key, child in self._counters:
            child.inc(totals.get(key, 0.0))
        for name in _LASTING:
            self.set(name, totals.get(name))

    def _all_counters(self) -> Iterator[tuple[str, Any]]:
        for metric in TABLE:
            if metric.kind == "counter":
                for values in product(*metric.labels.values()):
                    made = self._metrics[metric.name]
                    yield f"{metric.name}{{{','.join(values)}}}", made.labels(*values) if values else made

    # -- folding ----------------------------------------------------------------------------------------------------

    def show(self, run: RunGauges) -> None:
        """Bring the gauges of the run's state up to date."""
        for state in RUN_STATES:
            self.set("state", float(state == run.state), state)
        for name in (
            "step", "planned_steps", "attempt", "lineage_tokens", "trainer_up", "open_incidents", "restarts_left",
            "rollbacks_left", "quarantined_shards", "lr_factor", "last_commit_step", "last_good_step",
        ):  # fmt: skip
            value = getattr(run, name)
            self.set(name, None if value is None else float(value))
        self.set("supervisor_loop_timestamp_seconds", run.at_s)

    def observe(self, record: Record) -> None:  # noqa: C901  one arm per kind of record
        """Take one record in."""
        match record:
            case StepRecord():
                self._step(record)
            case EvalRecord():
                self.set("loss", record.loss, "validation")
                self.count("evaluations_total")
                self.count("evaluation_seconds_total", by=_amount(record.seconds))
            case ActivationRecord():
                for group, stats in record.groups.items():
                    self._group("activation_rms", {group: stats.rms})
                    self._group("activation_max", {group: stats.max})
                    self._group("activation_dead_ratio", {group: stats.dead})
                    self._group("activation_saturated_ratio", {group: stats.saturated})
            case SnapshotRecord():
                self.count("checkpoint_stall_seconds_total", by=_amount(record.stall_s))
            case CommitRecord(tier="disk"):
                self.count("checkpoints_total", "on_disk")
                self.set("last_local_commit_timestamp_seconds", record.at_s)
            case CommitRecord():
                self.count("checkpoints_total", "committed")
                self.count("checkpoint_bytes_total", by=record.bytes)
                self.count("checkpoint_seconds_total", by=_amount(record.seconds))
                self.set("last_commit_timestamp_seconds", record.at_s)
            case CommitFailedRecord():
                self.count("checkpoints_total", "failed")
            case StartedRecord():
                self._started(record)
            case ErrorRecord():
                self.count("trainer_errors_total")
            case FaultRecord():
                if record.fault in FAULTS:
                    self.count("faults_injected_total", record.fault)
            case PhaseRecord() | PlanAppliedRecord() | FinishedRecord():
                pass  # the run's state and the exit say the same
            case _:
                assert_never(record)

    def _started(self, record: StartedRecord) -> None:
        if record.condemned:
            self.count("condemned_checkpoints_total", by=len(record.condemned))
        if not record.replay:
            self.count("lost_steps_total", by=max(0, self._highest_step - record.step))
            self._highest_step = record.step

    def _step(self, record: StepRecord) -> None:
        self.count("steps_total")
        self.count("tokens_total", by=record.tokens or 0)
        if record.step_time_s is not None:
            for part in ("data", "compute", "other"):
                self.count("step_seconds_total", part, by=_amount(getattr(record.step_time_s, part)))
        for name, happened in (("clipped_steps_total", record.clipped), ("skipped_steps_total", record.skipped)):
            if happened:
                self.count(name)
        for rung in _rungs(record):
            self.count("prevention_total", rung)
        for name in ("loss", "grad_norm"):
            value = getattr(record, name)
            if value is not None and not math.isfinite(value):
                self.count("nonfinite_total", name)
        self.set("last_step_timestamp_seconds", record.at_s)
        if record.replay:
            return
        self._highest_step = record.step
        self.set("loss", record.loss, "train")
        self.set("grad_norm", record.grad_norm)
        self.set("learning_rate", record.lr)
        self.set("tokens_per_second", _speed(record))
        self._group("update_ratio", record.update_ratio)
        self._group("group_grad_norm", record.grad_norms)
        self._group("attention_logit_max", record.attention_logit_max)
        self._group("second_moment_ratio", record.second_moment_ratio)
        if record.log_z is not None:  # taken on a schedule: the last one stands until the next
            self.set("log_z", record.log_z)
        if record.scaler is not None:
            self.set("loss_scale", record.scaler)

    def _group(self, name: str, values: Mapping[str, float] | None) -> None:
        for group, value in (values or {}).items():
            if group in LAYER_GROUPS:
                self.set(name, value, group)


def _rungs(record: StepRecord) -> list[str]:
    """The rungs that acted on an update."""
    acted = [f"skip_{record.skip_reason}"] if record.skipped else []
    if record.prevention is not None and record.prevention.clipped_by is not None:
        acted.append(record.prevention.clipped_by)
    if record.prevention is not None and record.prevention.gave_in:
        acted.append("gave_in")
    return acted


def _speed(record: StepRecord) -> float | None:
    if record.tokens is None or record.step_time_s is None or record.step_time_s.total <= 0:
        return None
    return record.tokens / record.step_time_s.total


def _amount(value: float) -> float:
    """What a counter may be raised by: a broken clock in a record must not end the supervisor."""
    return value if math.isfinite(value) and value > 0 else 0.0
