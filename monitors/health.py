"""The two questions that a cluster asks: does the supervisor decide, and does the run train? From the metrics alone."""

import math
from collections.abc import Callable, Mapping

from monitors.metrics import PREFIX, Metrics

Check = Callable[[float], str]
"""At a time in unix seconds: what is wrong, empty if nothing is."""

_LOOP_S = 120.0  # the loop turns every second; a save of its journal to a slow disk may hold it up for some
_SLACK_S = 60.0  # evaluations and saves between two steps are no standstill


def checks_of(metrics: Metrics) -> Mapping[str, Check]:
    """Paths of the endpoint, each with its check."""

    def value(name: str, **labels: str) -> float:
        found = metrics.registry.get_sample_value(PREFIX + name, labels)
        return math.nan if found is None else found

    def healthz(now_s: float) -> str:
        silent_s = now_s - value("supervisor_loop_timestamp_seconds")
        return "" if silent_s <= _LOOP_S else f"the supervisor's loop has not turned for {silent_s:.0f} s"

    def readyz(now_s: float) -> str:
        if value("trainer_up") != 1.0:
            return "no trainer lives"
        silent_s = now_s - value("last_step_timestamp_seconds")
        pauses_s = max(value("deadline_seconds", phase=phase) for phase in ("evaluate", "save"))
        allowed_s = value("deadline_seconds", phase="train") + pauses_s + _SLACK_S
        return "" if silent_s <= allowed_s else f"no step for {silent_s:.0f} s"

    return {"/healthz": healthz, "/readyz": readyz}
