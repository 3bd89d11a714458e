"""Metrics as Prometheus sees them: every series from the start, counters that survive, one endpoint and no more."""

import math
import socket
import threading
import time
import urllib.error
import urllib.request
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from monitors import metrics as table
from monitors.describe import page
from monitors.exporter import Exporter, ExporterError
from monitors.metrics import TABLE, Metrics, RunGauges
from monitors.records import (
    ActivationRecord,
    ActivationStats,
    CommitFailedRecord,
    CommitRecord,
    Condemned,
    EvalRecord,
    FaultRecord,
    Prevention,
    Record,
    SnapshotRecord,
    StepRecord,
)
from orchestrator.policy.decisions import Decision
from orchestrator.policy.model import ActionName
from orchestrator.policy.state import RunStatus
from orchestrator.process.causes import CAUSES
from tests.orchestrator.events import started_record, step_record
from trainer.contract.config import FaultKind

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def _scrape(metrics: Metrics) -> tuple[str, Series]:
    with Exporter(metrics, "127.0.0.1", 0) as exporter, urllib.request.urlopen(exporter.url) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        text = response.read().decode()
    series: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in series, f"{key} is exposed twice"
            series[key] = sample.value
    return text, series


def _value(series: Series, name: str, **labels: str) -> float:
    return series[(f"longwatch_{name}", frozenset(labels.items()))]


def test_every_series_of_the_table_is_there_from_the_start() -> None:
    """All label combinations; counters at 0, so that the first increase is one; gauges unknown."""
    _, series = _scrape(Metrics("run"))
    for metric in TABLE:
        for values in product(*metric.labels.values()):
            value = _value(series, metric.name, **dict(zip(metric.labels, values, strict=True)))
            if metric.kind == "counter":
                assert value == 0, metric.name
            else:
                assert value == 0 or math.isnan(value), metric.name
    expected = sum(math.prod(len(values) for values in metric.labels.values()) for metric in TABLE) + 1  # run_info
    assert len(series) == expected


def test_names_follow_the_rules() -> None:
    """Prefix, _total for counters and only for them, help for all, no _created companions, no unbounded labels."""
    text, series = _scrape(Metrics("run"))
    assert all(name.startswith("longwatch_") for name, _ in series)
    assert "_created" not in text
    for metric in TABLE:
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith("."), metric.name
        assert not {"rank", "step", "path", "attempt"} & set(metric.labels)
    assert len({metric.name for metric in TABLE}) == len(TABLE)


def test_vocabularies_are_those_of_the_supervisor() -> None:
    """monitors may not import orchestrator, so they are written down twice and compared here."""
    assert set(table.EXIT_CAUSES) == set(CAUSES)
    assert set(table.ACTIONS) == set(get_args(ActionName))
    assert set(table.FAULTS) == set(get_args(FaultKind))
    kinds = {member.model_fields["kind"].default for member in get_args(get_args(Decision)[0])}
    assert set(table.DECISION_KINDS) == kinds
    assert set(table.RUN_STATES) == set(get_args(RunStatus.model_fields["state"].annotation))


def test_records_become_values() -> None:
    """One of each kind that counts."""
    metrics = Metrics("run", "abc", "0.1")
    envelope: dict[str, Any] = {"seq": 1, "attempt": 1, "at_s": 50.0}
    stats = ActivationStats(rms=1.5, max=3.0, dead=0.25, saturated=0.5)
    records: tuple[Record, ...] = (
        started_record(1, 0, condemned=(Condemned(commit="x", why="crc"),)),
        step_record(1, 1, loss=2.5, update_ratio={"early": 1e-3}, clipped=True, tokens=100),
        EvalRecord(**envelope, step=1, loss=2.4, perplexity=11.0, seconds=3.0),
        ActivationRecord(**envelope, step=1, groups={"late": stats}),
        SnapshotRecord(**envelope, step=1, stall_s=0.25, bytes=10),
        CommitRecord(**envelope, step=1, commit="c", position=4, tokens=8, bytes=1000, seconds=2.0),
        CommitFailedRecord(**envelope, step=1, error="full"),
        FaultRecord(**envelope, step=1, fault="nan_loss", count=1),
    )
    for record in records:
        metrics.observe(record)
    _, series = _scrape(metrics)
    assert _value(series, "run_info", run_id="run", config="abc", version="0.1") == 1
    assert _value(series, "loss", split="train") == 2.5
    assert _value(series, "loss", split="validation") == 2.4
    assert _value(series, "update_ratio", layer_group="early") == 1e-3
    assert math.isnan(_value(series, "update_ratio", layer_group="late"))
    assert _value(series, "activation_dead_ratio", layer_group="late") == 0.25
    assert _value(series, "tokens_per_second") == 200
    assert _value(series, "step_seconds_total", part="compute") == pytest.approx(0.3)
    assert _value(series, "clipped_steps_total") == 1
    assert _value(series, "checkpoints_total", outcome="committed") == 1
    assert _value(series, "checkpoints_total", outcome="failed") == 1
    assert _value(series, "checkpoint_stall_seconds_total") == 0.25
    assert _value(series, "condemned_checkpoints_total") == 1
    assert _value(series, "last_commit_timestamp_seconds") == 50.0
    assert _value(series, "faults_injected_total", fault="nan_loss") == 1


def test_non_finite_values_survive_and_are_counted() -> None:
    """A one-step NaN is invisible to a gauge between two scrapes; the counter keeps it."""
    metrics = Metrics("run")
    metrics.observe(step_record(1, 1, loss=math.nan, grad_norm=math.inf, skipped=True))
    _, series = _scrape(metrics)
    assert math.isnan(_value(series, "loss", split="train"))
    assert _value(series, "grad_norm") == math.inf
    metrics.observe(step_record(1, 2))
    _, series = _scrape(metrics)
    assert _value(series, "loss", split="train") == 2.0
    assert _value(series, "nonfinite_total", signal="loss") == 1
    assert _value(series, "nonfinite_total", signal="grad_norm") == 1
    assert _value(series, "skipped_steps_total") == 1


def test_each_rung_of_the_prevention_ladder_is_counted() -> None:
    """By what acted; a step may be of two rungs, and the plain counters stay what they were."""
    metrics = Metrics("run")
    done: tuple[dict[str, Any], ...] = (
        {},
        {"clipped": True, "prevention": Prevention(clip_factor=0.5, clipped_by="clip_norm")},
        {"clipped": True, "prevention": Prevention(clip_factor=0.5, clipped_by="adaptive_clip")},
        {"clipped": True, "skipped": True, "prevention": Prevention(skipped="norm", norm_limit=1.0)},
        {"loss": math.nan, "skipped": True},
        {"clipped": True, "prevention": Prevention(clip_factor=0.1, clipped_by="clip_norm", gave_in=True)},
    )
    for step, fields in enumerate(done, 1):
        metrics.observe(step_record(1, step, **fields))
    _, series = _scrape(metrics)
    counted = {rung: _value(series, "prevention_total", rung=rung) for rung in table.RUNGS}
    assert counted == {"clip_norm": 2, "adaptive_clip": 1, "skip_norm": 1, "skip_non_finite": 1, "gave_in": 1}
    assert _value(series, "clipped_steps_total") == 4
    assert _value(series, "skipped_steps_total") == 2


def test_what_was_not_recorded_is_not_made_up() -> None:
    """A trace without norms, times and tokens: unknown is NaN, and nothing non-finite is counted."""
    metrics = Metrics("run")
    metrics.observe(StepRecord(seq=1, attempt=1, at_s=1.0, step=1, loss=2.0))
    _, series = _scrape(metrics)
    assert math.isnan(_value(series, "grad_norm"))
    assert math.isnan(_value(series, "tokens_per_second"))
    assert _value(series, "nonfinite_total", signal="grad_norm") == 0


def test_replays_are_work_but_not_the_lineage() -> None:
    """Counters count them, gauges do not show them."""
    metrics = Metrics("run")
    metrics.observe(step_record(1, 1, loss=2.0))
    metrics.observe(step_record(2, 1, loss=9.0, replay=True))
    _, series = _scrape(metrics)
    assert _value(series, "steps_total") == 2
    assert _value(series, "loss", split="train") == 2.0


def test_steps_given_up_are_counted() -> None:
    """10 steps, then a load of step 6; also over a restart of the supervisor in between."""
    metrics = Metrics("run")
    metrics.observe(started_record(1, 0))
    for step in range(1, 11):
        metrics.observe(step_record(1, step))
    metrics.observe(started_record(2, 6))
    again = Metrics("run")
    again.restore(metrics.totals(), step=6)
    again.observe(started_record(3, 5))
    _, series = _scrape(again)
    assert _value(series, "lost_steps_total") == 5


def test_counters_go_on_after_a_restart_and_unknown_totals_are_left_out() -> None:
    """Prometheus sees no reset; a total of a version that had other metrics does no harm."""
    metrics = Metrics("run")
    metrics.count("incidents_total", "sudden_nan")
    metrics.count("checkpoint_bytes_total", by=1e9)
    metrics.set("last_good_timestamp_seconds", 77.0)
    totals = metrics.totals()
    assert set(totals) == {"incidents_total{sudden_nan}", "checkpoint_bytes_total{}", "last_good_timestamp_seconds"}
    again = Metrics("run")
    again.restore(totals | {"gone_total{}": 5.0}, step=0)
    again.count("incidents_total", "sudden_nan")
    _, series = _scrape(again)
    assert _value(series, "incidents_total", **{"class": "sudden_nan"}) == 2
    assert _value(series, "checkpoint_bytes_total") == 1e9
    assert _value(series, "last_good_timestamp_seconds") == 77.0
    assert math.isnan(_value(series, "last_step_timestamp_seconds"))


def test_the_state_is_one_of_its_values() -> None:
    """Exactly one state is 1; what is not known is NaN."""
    metrics = Metrics("run")
    run = RunGauges(
        state="recovering", step=5, planned_steps=10, attempt=2, lineage_tokens=40, trainer_up=True, open_incidents=1,
        restarts_left=3, rollbacks_left=4, quarantined_shards=0, lr_factor=0.5, last_commit_step=None,
        last_good_step=None, at_s=1.0,
    )  # fmt: skip
    metrics.show(run)
    _, series = _scrape(metrics)
    assert [state for state in table.RUN_STATES if _value(series, "state", state=state)] == ["recovering"]
    assert _value(series, "trainer_up") == 1
    assert math.isnan(_value(series, "last_good_step"))


def test_nothing_else_is_served_and_only_for_reading() -> None:
    """No other page, no other verb."""
    with Exporter(Metrics("run"), "127.0.0.1", 0) as exporter:
        base = exporter.url.removesuffix("/metrics")
        for path, method, code in (("/", "GET", 404), ("/metrics/x", "GET", 404), ("/metrics", "POST", 501)):
            request = urllib.request.Request(base + path, method=method)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request)
            assert refused.value.code == code
            refused.value.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(exporter.url)


def test_a_port_in_use_is_named_with_the_remedy() -> None:
    """Before anything is started."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ExporterError, match=rf"127\.0\.0\.1:{port}.*metrics\.port"):
            Exporter(Metrics("run"), "127.0.0.1", port)


def _told(base: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(base + path) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_healthz_and_readyz() -> None:
    """The supervisor decides; the run trains. Neither is taken for granted at the start."""
    metrics = Metrics("run")
    with Exporter(metrics, "127.0.0.1", 0) as exporter:
        base = exporter.url.removesuffix("/metrics")
        assert [_told(base, path)[0] for path in ("/healthz", "/readyz")] == [503, 503]
        metrics.set("supervisor_loop_timestamp_seconds", time.time())
        assert _told(base, "/healthz") == (200, "ok\n")
        assert _told(base, "/readyz") == (503, "no trainer lives\n")
        metrics.set("trainer_up", 1.0)
        for phase in ("train", "evaluate", "save"):
            metrics.set("deadline_seconds", 30.0, phase)
        metrics.set("last_step_timestamp_seconds", time.time() - 100.0)
        assert _told(base, "/readyz") == (200, "ok\n")
        metrics.set("last_step_timestamp_seconds", time.time() - 500.0)
        assert _told(base, "/readyz")[0] == 503
        assert "no step for" in _told(base, "/readyz")[1]
        metrics.set("supervisor_loop_timestamp_seconds", time.time() - 300.0)
        assert _told(base, "/healthz")[0] == 503


def test_who_scrapes_sees_the_last_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that is asked regularly waits to be asked once more; one that was asked once does not."""
    metrics = Metrics("run")
    with Exporter(metrics, "127.0.0.1", 0) as exporter:
        for number, now_s in enumerate((1000.0, 1030.0), start=1):
            monkeypatch.setattr("monitors.exporter.time.monotonic", lambda now_s=now_s: now_s)
            exporter.linger(60.0)
            urllib.request.urlopen(exporter.url).close()
            deadline_s = time.time() + 30.0
            while exporter.scrapes < number:  # it is counted when the answer is on its way
                assert time.time() < deadline_s
        metrics.set("step", 7.0)
        waiting = threading.Thread(target=exporter.linger, args=(60.0,))
        waiting.start()
        assert waiting.is_alive()
        with urllib.request.urlopen(exporter.url) as response:
            assert "longwatch_step 7.0" in response.read().decode()
        waiting.join(30.0)
        assert not waiting.is_alive()
        monkeypatch.setattr("monitors.exporter.time.monotonic", lambda: 9000.0)
        exporter.linger(60.0)  # nobody has asked for long


def test_the_page_of_metrics_is_the_table() -> None:
    """`make docs-metrics` writes it."""
    assert (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8") == page()
