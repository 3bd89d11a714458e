"""Grafana-managed alert rules, equal to those of Prometheus: for who has Grafana but no Alertmanager.

Prometheus fires on whatever its expression returns; Grafana wants a condition. So every expression is turned into a 1
for each series that it returns, and the condition is that it is above 0.
"""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

SOURCE = Path(__file__).parents[1] / "prometheus" / "longwatch.rules.yml"
TARGET = Path(__file__).parent / "provisioning" / "alerting" / "longwatch.yml"
_DATASOURCE = "prometheus"  # uid in provisioning/datasources
_WINDOW_S = 600


def managed() -> dict[str, Any]:
    """The provisioning file."""
    groups = YAML(typ="safe", pure=True).load(SOURCE.read_text(encoding="utf-8"))["groups"]
    return {"apiVersion": 1, "groups": [_group(group) for group in groups]}


def wrapped(expr: str) -> str:
    """1 for every series that an expression returns, whatever its value."""
    return f"({expr.strip()}) * 0 + 1"


def _group(group: dict[str, Any]) -> dict[str, Any]:
    rules = [_rule(rule) for rule in group["rules"]]
    return {"orgId": 1, "name": group["name"], "folder": "Longwatch", "interval": "30s", "rules": rules}


def _rule(rule: dict[str, Any]) -> dict[str, Any]:
    span = {"from": _WINDOW_S, "to": 0}
    query = {"refId": "A", "expr": wrapped(rule["expr"]), "instant": True, "range": False}
    above = {
        "refId": "B",
        "type": "threshold",
        "expression": "A",
        "conditions": [{"evaluator": {"type": "gt", "params": [0]}}],
    }
    return {
        "uid": rule["alert"].lower(),
        "title": rule["alert"],
        "condition": "B",
        "data": [
            {"refId": "A", "relativeTimeRange": dict(span), "datasourceUid": _DATASOURCE, "model": query},
            {"refId": "B", "relativeTimeRange": dict(span), "datasourceUid": "__expr__", "model": above},
        ],
        "noDataState": "OK",  # an expression that returns nothing is one that does not fire
        "execErrState": "Error",
        "for": rule.get("for", "0s"),
        "labels": rule["labels"],
        "annotations": rule["annotations"],
    }


def write() -> None:
    """Write the file."""
    yaml = YAML()
    yaml.width = 1000
    with TARGET.open("w", encoding="utf-8") as file:
        file.write("# Made from deploy/prometheus/longwatch.rules.yml by `make dashboards`.\n")
        yaml.dump(managed(), file)
