"""Incidents as text: what happened, why, what was done about it and what it cost.

Works on the published JSON form, so that a finished run, a living one and a replayed trace read the same.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.text import Text

Facts = Mapping[str, Any]

_OUTCOME_STYLES = {"worked": "green", "came_back": "green", "halted": "red", "relapsed": "yellow"}


def incident_lines(incidents: Iterable[Facts]) -> list[Text]:
    """A few lines for each incident."""
    return [line for incident in incidents for line in _lines(incident)]


def cost_text(cost: Facts) -> str:
    """A cost in words; what is zero is left out."""
    parts = [
        _counted(cost.get("steps", 0), "step run again", "steps run again"),
        _counted(cost.get("tokens", 0), "token trained again", "tokens trained again"),
        _counted(cost.get("skipped_samples", 0), "sample skipped", "samples skipped"),
        _seconds(cost.get("detect_s", 0.0), "to detect"),
        _seconds(cost.get("restart_s", 0.0), "to restart"),
        _seconds(cost.get("recompute_s", 0.0), "to be back where it was"),
    ]
    return ", ".join(part for part in parts if part) or "nothing"


def total_cost(incidents: Iterable[Facts]) -> dict[str, float]:
    """The costs of all incidents together."""
    total: dict[str, float] = {}
    for incident in incidents:
        for name, value in incident.get("cost", {}).items():
            total[name] = total.get(name, 0) + value
    return total


def _lines(incident: Facts) -> list[Text]:
    title = Text()
    title.append(f"#{incident['id']} " if "id" in incident else "")
    title.append(str(incident["class"]), style="bold")
    if cause := incident.get("cause") or incident.get("phase"):
        title.append(f" ({cause})")
    title.append(f"  {_steps(incident)}")
    if outcome := incident.get("outcome"):
        title.append(f"  {outcome.replace('_', ' ')}", style=_OUTCOME_STYLES.get(outcome, ""))
    lines = [
        title,
        Text(f"   why   {incident['why']}"),
        Text(f"   {'would' if incident.get('observed') else 'did  '} {', '.join(incident['decision']) or 'nothing'}"),
    ]
    if incident.get("shards"):
        lines.append(Text(f"   shard {', '.join(str(shard) for shard in incident['shards'])}"))
    if after := after_text(incident):
        lines.append(Text(f"   after {after}"))
    if "cost" in incident:
        lines.append(Text(f"   cost  {cost_text(incident['cost'])}"))
    return lines


def after_text(incident: Facts) -> str:
    """What was seen of the recovery."""
    said = []
    if course := incident.get("course"):
        said.append(f"the loss is {course['after']:.3f}, it was {course['before']:.3f} before")
    if restored := incident.get("lr_restored_step"):
        said.append(f"LR back at its schedule from step {restored} on")
    return "; ".join(said)


def _steps(incident: Facts) -> str:
    onset, detected, end = incident["onset_step"], incident["detected_step"], incident["end_step"]
    span = f"step {onset}" if end == onset else f"steps {onset} to {'now' if end is None else end}"
    return f"{span}, detected at {detected}"


def _counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}" if number else ""


def _seconds(seconds: float, what: str) -> str:
    return f"{seconds:.1f} s {what}" if seconds >= 0.05 else ""  # less would show as 0.0
