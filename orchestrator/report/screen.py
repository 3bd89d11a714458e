"""One screen of a living run: progress, loss and gradient norm curves with incidents marked, the newest log lines.

A pure function of what was read, so that what a terminal of any size shows can be tested line by line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotext
from rich.text import Text

from orchestrator.report.log_lines import LogLine
from orchestrator.report.numbers import duration, loss_text, short
from orchestrator.report.recent import RecentStep
from orchestrator.report.status import next_step

_LEAST_PLOT = 6
_STYLES = {"running": "green", "finished": "green", "halted": "bold red", "failed": "red", "recovering": "yellow"}
_KEYS = "p pause  c checkpoint now  s stop  q quit"


@dataclass(frozen=True, slots=True)
class Seen:
    """What the screen is drawn from. `said` answers the last key."""

    facts: Mapping[str, Any]
    rows: Sequence[RecentStep]
    incidents: Sequence[Mapping[str, Any]]
    logs: Sequence[LogLine]
    paused: bool = False
    said: str = ""


def screen(seen: Seen, width: int, height: int) -> list[Text]:
    """At most `height` lines of at most `width` characters."""
    head = [*_head(seen.facts), *_open(seen.incidents)]
    foot = Text(seen.said or (f"{_KEYS}   (paused)" if seen.paused else _KEYS), style="bold" if seen.said else "dim")
    room = height - len(head) - 1
    num_logs = max(0, min(len(seen.logs), room - 2 * _LEAST_PLOT, room // 4))
    plots = _plots(seen, width, room - num_logs)
    shown = seen.logs[len(seen.logs) - num_logs :]
    logs = [Text(line.plain()[11:], style="yellow" if line.level != "info" else "") for line in shown]
    lines = [*head, *plots, *logs]
    for line in (*lines, foot):
        line.truncate(width, overflow="ellipsis")
    return [*lines[: height - 1], foot]


def _head(facts: Mapping[str, Any]) -> list[Text]:
    step, total = facts["step"], facts["total_steps"]
    first = Text(str(facts["state"]), style=_STYLES.get(str(facts["state"]), "bold"))
    first.append(f"  step {step:,} of {total:,} ({step / max(1, total):.1%})", style="bold")
    if facts.get("seconds_left") is not None:
        first.append(f", {duration(facts['seconds_left'])} left")
    if facts.get("goodput") is not None:
        first.append(f"  goodput {facts['goodput']:.1%}")
    speed = facts.get("tokens_per_s")
    training = [
        f"loss {loss_text(facts.get('loss'))}",
        f"validation {loss_text(facts['validation'][1])}" if facts.get("validation") else "",
        f"lr {facts['lr']:.3g}" if facts.get("lr") is not None else "",
        f"{short(speed)} tokens/s" if speed else "",
    ]
    good = f"last good {facts['last_good_step']:,}" if facts.get("last_good_step") is not None else "none good yet"
    safety = f"{good}  budget {facts.get('rollbacks_left')} rollbacks, {facts.get('restarts_left')} restarts"
    lines = [first, Text("  ".join(part for part in training if part)), Text(safety)]
    wanted = facts.get("because") or next_step(facts)
    return [*lines, Text(f"next: {wanted}", style="yellow")] if wanted else lines


def _open(incidents: Sequence[Mapping[str, Any]]) -> list[Text]:
    """The newest two that are not closed, or the last one that was."""
    going_on = [one for one in incidents if one["state"] != "closed"][-2:] or list(incidents[-1:])
    return [
        Text(f"#{one['id']} {one['class']} at step {one['onset_step']:,}: {one['why']}", style="yellow")
        for one in going_on
    ]


def _plots(seen: Seen, width: int, height: int) -> list[Text]:
    """Loss above, gradient norm below where there is room for both."""
    if height < _LEAST_PLOT:
        return []
    losses = [(row.step, row.loss) for row in seen.rows if row.loss is not None]
    norms = [(row.step, row.grad_norm) for row in seen.rows if row.grad_norm is not None]
    marks = [int(one["onset_step"]) for one in seen.incidents]
    if height < 2 * _LEAST_PLOT or len(norms) < 2:
        return _plot("loss", losses, marks, width, height)
    lower = max(_LEAST_PLOT, height // 3)
    return [*_plot("loss", losses, marks, width, height - lower), *_plot("gradient norm", norms, marks, width, lower)]


def _plot(title: str, points: Sequence[tuple[int, float]], marks: Sequence[int], width: int, height: int) -> list[Text]:
    if len(points) < 2:
        return [Text(f"{title}: nothing to draw yet")]
    steps, values = [step for step, _ in points], [value for _, value in points]
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, height)
    plotext.plot(steps, values, marker="braille")
    for mark in marks:
        if steps[0] <= mark <= steps[-1]:
            plotext.vline(mark)
    middle = (steps[0] + steps[-1]) // 2
    plotext.xticks([steps[0], middle, steps[-1]], [f"{step:,}" for step in (steps[0], middle, steps[-1])])
    ends = (min(values), max(values))
    plotext.yticks(ends, [f"{value:.4g}" for value in ends])
    plotext.title(title)
    return [Text.from_ansi(line) for line in plotext.build().splitlines()][:height]
