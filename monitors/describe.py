"""`python -m monitors.describe > docs/metrics.md`: every metric, from the one table that the exporter is made of."""

import sys

from monitors.metrics import PREFIX, TABLE, Metric

_HEAD = """\
# Metrics

What a run serves at `/metrics` (`metrics.port` of run.yaml, loopback unless told otherwise). Made from the table in
`monitors/metrics.py` by `make docs-metrics`.

Every series exists from the start, at 0, so that the first incident of a run raises a counter. Counters count work
done, replays and lost work included, and go on over restarts of trainer and supervisor. Gauges follow the lineage that
survives; what is unknown is NaN. There is no label whose values are not listed here, so the number of series of a run
is fixed. `longwatch_run_info{run_id, config, version}` is 1 and joins the others with the run. Beside the metrics are
`/healthz` (the supervisor decides) and `/readyz` (the run trains), which answer 200 or 503 and say why.

| metric | type | labels | meaning |
|---|---|---|---|
"""


def page() -> str:
    """docs/metrics.md."""
    return _HEAD + "".join(_row(metric) for metric in TABLE)


def _row(metric: Metric) -> str:
    labels = "; ".join(f"{name}: {', '.join(values)}" for name, values in metric.labels.items())
    return f"| `{PREFIX}{metric.name}` | {metric.kind} | {labels} | {metric.help} |\n"


if __name__ == "__main__":
    sys.stdout.write(page())
