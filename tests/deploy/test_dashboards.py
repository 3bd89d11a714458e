"""The dashboards: as generated, complete, over metrics that exist, and with data in every panel of a real run."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from ruamel.yaml import YAML

from deploy.grafana import alerting
from monitors.metrics import PREFIX, TABLE
from tests.deploy.monitoring import Prometheus, prometheus, until
from tests.deploy.tools import DEPLOY
from tests.integration.test_training_faults import _policy
from tests.runs import Run, tiny_config, write_corpus
from tests.s3 import free_ports

_AT = DEPLOY / "grafana" / "dashboards"
#: Known only of models with attention capture, bf16 scaling, or of runs in trouble: they may be empty.
_MAY_BE_EMPTY = {"Ends of attempts by cause", "Store calls repeated", "Non-finite steps"}


def _panels(name: str) -> Iterator[dict[str, Any]]:
    for panel in json.loads((_AT / name).read_text())["panels"]:
        if panel["type"] != "row":
            yield panel


def _queries(panel: dict[str, Any], job: str = ".+", instance: str = ".+") -> list[str]:
    """As Grafana would ask, for a minute."""
    filled = []
    for target in panel["targets"]:
        expr = target["expr"].replace("$job", job).replace("$instance", instance)
        filled.append(expr.replace("$__rate_interval", "1m").replace("$__interval", "1m"))
    return filled


def test_the_files_are_what_is_generated() -> None:
    """`make dashboards` writes them."""
    pytest.importorskip("grafana_foundation_sdk")
    from deploy.grafana.build import rendered

    assert {path.name: path.read_text(encoding="utf-8") for path in _AT.iterdir()} == rendered()


def test_grafanas_own_model_knows_every_key() -> None:
    """What it does not know it drops without a word: so nothing may be dropped."""
    dashboards = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    for path in _AT.iterdir():
        raw = json.loads(path.read_text())
        known = json.loads(encoder.JSONEncoder().encode(dashboards.Dashboard.from_json(raw)))
        assert _keys(raw) - _keys(known) == set(), path.name


def _keys(value: Any, at: str = "") -> set[str]:
    match value:
        case dict():
            return {f"{at}.{key}" for key in value} | {
                k for key, one in value.items() for k in _keys(one, f"{at}.{key}")
            }
        case list():
            return {key for one in value for key in _keys(one, f"{at}[]")}
    return set()


@pytest.mark.parametrize("name", ["run.json", "fleet.json"])
def test_panels_are_complete(name: str) -> None:
    """Title, description, unit, thresholds and the chosen data source on all; no two of one name or number."""
    panels = list(_panels(name))
    for panel in panels:
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert defaults["unit"]
        assert defaults["thresholds"]["steps"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert [target["refId"] for target in panel["targets"]] == list("ABCD")[: len(panel["targets"])]
    assert len({panel["title"] for panel in panels}) == len(panels)
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.parametrize("name", ["run.json", "fleet.json"])
def test_queries_parse_over_metrics_that_exist(name: str) -> None:
    """By Prometheus' grammar; every metric and label value is in the table, every selector chooses job and instance."""
    parser = pytest.importorskip("promql_parser")
    table = {PREFIX + metric.name: metric for metric in TABLE}
    for panel in _panels(name):
        for target, expr in zip(panel["targets"], _queries(panel), strict=True):
            parser.parse(expr)
            for metric, labels in re.findall(r"(longwatch_\w+)({[^}]*})?", target["expr"]):
                assert metric in table, panel["title"]
                assert 'job=~"$job", instance=~"$instance"' in labels, panel["title"]
                for label, value in re.findall(r'(\w+)="([^"]*)"', labels):
                    assert value in table[metric].labels[label]
            if "_total" in target["expr"]:
                assert "$__rate_interval" in target["expr"], panel["title"]


def test_managed_alert_rules_are_those_of_prometheus() -> None:
    """The same names, expressions, delays, labels and words; the file is what is generated."""
    read = YAML(typ="safe", pure=True)
    written = read.load(alerting.TARGET.read_text(encoding="utf-8"))
    assert written == alerting.managed()
    ours = [rule for group in written["groups"] for rule in group["rules"]]
    theirs = [rule for group in read.load(alerting.SOURCE.read_text())["groups"] for rule in group["rules"]]
    assert [
        (one["title"], one["data"][0]["model"]["expr"], one["for"], one["labels"], one["annotations"]) for one in ours
    ] == [
        (one["alert"], f"({one['expr'].strip()}) * 0 + 1", one.get("for", "0s"), one["labels"], one["annotations"])
        for one in theirs
    ]
    parser = pytest.importorskip("promql_parser")
    for one in ours:
        parser.parse(one["data"][0]["model"]["expr"])


@pytest.mark.long
def test_no_panel_of_a_real_run_is_empty(tmp_path: Any) -> None:
    """A run with an incident, scraped by a real Prometheus: every query of both dashboards gives data at some time."""
    target = f"127.0.0.1:{free_ports(1)[0]}"
    faults = [
        {"kind": "lr_bomb", "steps": [80, 83], "factor": 300.0},
        {"kind": "slow", "steps": [1, 10**6], "factor": 0.02, "once": False},
    ]
    metrics = {"host": "127.0.0.1", "port": int(target.rpartition(":")[2])}
    config = tiny_config(write_corpus(tmp_path / "corpus"), steps=400, faults=faults, metrics=metrics)
    run = Run(tmp_path, config, _policy())
    with prometheus(tmp_path / "prometheus", target) as server:
        process = run.start()
        until(lambda: (server.value("longwatch_last_good_step") or 0) > 0, run.trainer_output)
        run.wait(process)
        empty = {
            panel["title"]
            for name in ("run.json", "fleet.json")
            for panel in _panels(name)
            if not any(_ever(server, expr) for expr in _queries(panel))
        }
    assert empty - _MAY_BE_EMPTY == set()


def _ever(server: Prometheus, expr: str) -> bool:
    """Whether a query gave a number at any moment of the last minutes."""
    return bool(server.query(f"max_over_time(({expr})[5m:1s])"))
