"""The alert rules by promtool: each fires, does not fire for near misses, and outlives restarts and missed scrapes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from monitors.metrics import PREFIX, TABLE
from tests.deploy.tools import DEPLOY, passes, tool

_RULES = DEPLOY / "prometheus" / "longwatch.rules.yml"
_RUNBOOK = DEPLOY.parent / "docs" / "alerts.md"
_ID = 'job="longwatch", instance="a:9108"'
_RUNNING = {"state{state=running}": "1x600", "state{state=halted}": "0x600"}


@dataclass(frozen=True, slots=True)
class Case:
    """One line of alert_cases.yml."""

    alert: str
    why: str
    fires: bool
    at: int
    series: dict[str, str]
    running: bool = False


def _cases() -> list[Case]:
    by_alert = YAML(typ="safe", pure=True).load((Path(__file__).parent / "alert_cases.yml").read_text())
    return [Case(alert=alert, **case) for alert, cases in by_alert.items() for case in cases]


CASES = _cases()


def _rules() -> list[dict[str, Any]]:
    return list(YAML(typ="safe", pure=True).load(_RULES.read_text())["groups"][0]["rules"])


def _tests(cases: list[Case]) -> Iterator[dict[str, Any]]:
    for case in cases:
        named = {**(_RUNNING if case.running else {}), **case.series}
        series = [{"series": _selector(name), "values": values} for name, values in named.items()]
        alert = f'count(ALERTS{{alertname="Longwatch{case.alert}", alertstate="firing"}}) or vector(0)'
        expected = [{"labels": "{}", "value": int(case.fires)}]
        test = {"expr": alert, "eval_time": f"{case.at}m", "exp_samples": expected}
        yield {
            "interval": "1m",
            "name": f"{case.alert}: {case.why}",
            "input_series": series,
            "promql_expr_test": [test],
        }


def _selector(name: str) -> str:
    metric, _, labels = name.rstrip("}").partition("{")
    given = [f'{key}="{value}"' for key, _, value in (one.partition("=") for one in labels.split(",") if one)]
    return f"{metric if metric == 'up' else PREFIX + metric}{{{', '.join([_ID, *given])}}}"


def test_the_rules_are_clean() -> None:
    """By promtool's own linter."""
    passes(tool("promtool"), "check", "rules", "--lint=all", "--lint-fatal", str(_RULES))
    passes(tool("promtool"), "check", "config", str(DEPLOY / "prometheus" / "prometheus.yml"))


@pytest.mark.parametrize("alert", sorted({case.alert for case in CASES}))
def test_an_alert_fires_when_it_should_and_only_then(alert: str, tmp_path: Path) -> None:
    """All cases of one alert, through Prometheus' own evaluation."""
    tests = list(_tests([case for case in CASES if case.alert == alert]))
    file = tmp_path / "tests.yml"
    with file.open("w") as out:
        YAML().dump({"rule_files": [str(_RULES)], "evaluation_interval": "1m", "tests": tests}, out)
    passes(tool("promtool"), "test", "rules", str(file))


def test_every_alert_has_cases_a_runbook_and_words() -> None:
    """One that fires and two near misses for each; a known severity; a section of the page that it points to."""
    sections = set(re.findall(r"^### (\w+)$", _RUNBOOK.read_text(), re.MULTILINE))
    for rule in _rules():
        name = rule["alert"].removeprefix("Longwatch")
        fires = [case.fires for case in CASES if case.alert == name]
        assert (name, any(fires)) == (name, True)
        assert name == "Watchdog" or fires.count(False) >= 2, f"{name} has too few near misses"
        assert rule["labels"]["severity"] in ("page", "warning", "info", "none")
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"].endswith(f"docs/alerts.md#{rule['alert'].lower()}")
        assert rule["alert"] in sections
    assert {rule["alert"] for rule in _rules()} == sections


def test_alerts_on_counters_and_on_what_is_overdue_have_their_traps() -> None:
    """A counter is not scraped for a while and goes on; a time is NaN until the thing has happened once."""
    for rule in _rules():
        cases = [case for case in CASES if case.alert == rule["alert"].removeprefix("Longwatch")]
        values = [(case.fires, value) for case in cases for value in case.series.values()]
        if "increase(" in rule["expr"] or "rate(" in rule["expr"]:
            assert any("_x" in value for fires, value in values if not fires), rule["alert"]
        if "timestamp_seconds" in rule["expr"]:
            assert any("NaN" in value for fires, value in values if fires), rule["alert"]


def test_every_metric_and_label_of_the_rules_exists() -> None:
    """A rule over a name that nobody exposes would be silent for ever."""
    table = {PREFIX + metric.name: metric for metric in TABLE}
    for rule in _rules():
        for name, labels in re.findall(r"(longwatch_\w+)(?:{([^}]*)})?", rule["expr"]):
            assert name in table
            for label, values in re.findall(r'(\w+)=~?"([^"]*)"', labels):
                assert set(values.split("|")) <= set(table[name].labels[label])


def test_pages_wake_somebody_and_the_rest_does_not() -> None:
    """By the routes of the shipped Alertmanager configuration."""
    config = str(DEPLOY / "alertmanager" / "alertmanager.yml")
    passes(tool("amtool"), "check-config", config)
    receivers = {"page": "pager", "warning": "chat", "info": "chat", "none": "dead-man"}
    for rule in _rules():
        severity = rule["labels"]["severity"]
        labels = [f"alertname={rule['alert']}", f"severity={severity}", "job=longwatch", "instance=a"]
        receiver = receivers[severity]
        command = ("config", "routes", "test", f"--config.file={config}", f"--verify.receivers={receiver}", *labels)
        passes(tool("amtool"), *command)


def test_series_are_few() -> None:
    """All there can ever be of one run: a handful of hundreds, whatever happens."""
    count = sum(len(list(product(*metric.labels.values()))) for metric in TABLE)
    assert count < 400
