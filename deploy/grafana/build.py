"""`python -m deploy.grafana.build`: dashboards and alert rules as Grafana provisions them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.builders.common import ScaleDistributionConfig
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueTextMode, ScaleDistribution
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, Threshold, ThresholdsMode

from deploy.grafana import alerting
from deploy.grafana.panels import COST, DEEDS, FLEET, HEAD, HEALTH, Panel

HERE = Path(__file__).parent / "dashboards"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_CHOSEN = 'job=~"$job", instance=~"$instance"'
_INCIDENTS = f"sum by (class) (increase(longwatch_incidents_total{{{_CHOSEN}}}[$__interval])) > 0"


def expression(query: str) -> str:
    """A query of the table with the labels that choose runs."""
    return query.replace("{S", "{" + _CHOSEN)


def run_dashboard() -> dashboard.Dashboard:
    """Training health on top, then what Longwatch did, then what it cost."""
    built = _begun("longwatch-run", "Longwatch: a run", several=False)
    for title, panels in (("Now", HEAD), ("Training health", HEALTH), ("What Longwatch did", DEEDS), ("Cost", COST)):
        _add(built, title, panels)
    return built


def fleet_dashboard() -> dashboard.Dashboard:
    """All runs beside each other."""
    built = _begun("longwatch-fleet", "Longwatch: all runs", several=True)
    _add(built, "Runs", FLEET)
    return built


def _begun(uid: str, title: str, *, several: bool) -> dashboard.Dashboard:
    source = dashboard.DatasourceVariable("datasource").label("Data Source").type("prometheus")
    built = dashboard.Dashboard(title).uid(uid).tags(["longwatch"]).refresh("30s").time("now-6h", "now").readonly()
    built = built.tooltip(DashboardCursorSync.CROSSHAIR)
    built = built.with_variable(source)
    for label in ("job", "instance"):
        query = f"label_values(longwatch_run_info, {label})"
        variable = dashboard.QueryVariable(label).label(label).datasource(_SOURCE).query(query)
        many = several or label == "job"
        built = built.with_variable(variable.multi(many).include_all(many).all_value(".+" if many else ""))
    annotation = (
        dashboard.AnnotationQuery()
        .name("Incidents")
        .enable(True)
        .icon_color("red")
        .datasource(_SOURCE)
        .expr(_INCIDENTS)
    )
    return built.annotation(annotation)


def _add(built: dashboard.Dashboard, title: str, panels: Sequence[Panel]) -> None:
    built.with_row(dashboard.Row(title))
    for panel in panels:
        built.with_panel(_panel(panel))


def _panel(panel: Panel) -> Any:
    builder: Any
    match panel.kind:
        case "number":
            builder = stat.Panel().height(4)
            if panel.named:
                builder = builder.text_mode(BigValueTextMode.NAME)
        case "states":
            builder = statetimeline.Panel().height(6)
        case "time":
            builder = timeseries.Panel().height(8).line_width(1).fill_opacity(5)
            if panel.logarithmic:
                builder = builder.scale_distribution(ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10))
    steps = [Threshold(value=value, color=colour) for value, colour in panel.steps]
    limits = dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
    builder = builder.title(panel.title).description(panel.description).unit(panel.unit).datasource(_SOURCE)
    builder = builder.span(panel.width).thresholds(limits)
    for letter, (query, legend) in zip("ABCD", panel.queries, strict=False):
        target = prometheus.Dataquery().ref_id(letter).expr(expression(query)).legend_format(legend)
        builder = builder.with_target(target)
    return builder


def rendered() -> dict[str, str]:
    """File name -> JSON."""
    found = {}
    for name, built in (("run", run_dashboard()), ("fleet", fleet_dashboard())):
        raw = json.loads(JSONEncoder(sort_keys=True).encode(built.build()))
        for number, panel in enumerate(raw["panels"], start=1):
            panel["id"] = number  # the SDK leaves them out
        found[f"{name}.json"] = json.dumps(raw, indent=1, sort_keys=True) + "\n"
    return found


if __name__ == "__main__":
    for name, text in rendered().items():
        (HERE / name).write_text(text, encoding="utf-8")
    alerting.write()
