"""What `longwatch launch` shows: a live display on a terminal, plain lines elsewhere.

Both get the same facts from the supervisor after they are journaled, and neither may slow it down: steps are shown on
a clock, everything else at once.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from monitors.records import StepRecord
from orchestrator.policy.decisions import Decision
from orchestrator.policy.events import Event, RecordReceived
from orchestrator.policy.state import Incident, RunStatus
from orchestrator.report.lines import decision_line, event_line, incident_line, step_line
from orchestrator.report.numbers import loss_text, short

_PLAIN_EVERY_S = 5.0
_LIVE_EVERY_S = 0.25  # four pictures a second: smooth enough, and nothing beside a training step
_STYLES = {"incident": "yellow", "notify": "yellow", "exit": "red", "error": "red", "end": "bold", "fault": "magenta"}
_BAR_WIDTH = 40

Clock = Callable[[], float]


class Display(Protocol):
    """What the supervisor tells as it goes."""

    def say(self, text: str) -> None:
        """A line of its own."""

    def folded(self, event: Event, decisions: Sequence[Decision]) -> None:
        """An event was journaled with what was decided on it."""

    def refresh(self, status: RunStatus, incidents: Sequence[Incident]) -> None:
        """How the run stands now."""

    def close(self) -> None:
        """Nothing comes any more."""


def display_for(console: Console) -> Display:
    """The display that fits where the output goes."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


class PlainDisplay:
    """Lines for logs: events as they come, steps every few seconds."""

    def __init__(self, console: Console, clock: Clock = time.monotonic, *, steps: bool = True) -> None:
        self._console = console
        self._clock = clock
        self._steps = steps
        self._next_step_s = clock()
        self._tokens_per_s: float | None = None
        self._incidents: dict[int, str] | None = None
        self._told: dict[int, str] = {}

    def say(self, text: str) -> None:
        """Write a line."""
        style = _STYLES.get(text.partition(" ")[0], "")
        self._console.print(Text(text, style=style), soft_wrap=True)

    def folded(self, event: Event, decisions: Sequence[Decision]) -> None:
        """Write the lines of an event and of its decisions."""
        if isinstance(event, RecordReceived) and isinstance(event.record, StepRecord):
            self.step(event.record)
        self._line(event_line(event))
        for decision in decisions:
            self._line(decision_line(decision))

    def step(self, record: StepRecord) -> None:
        """Write a step, if the last one was long enough ago or it is not a healthy one."""
        if self._steps and (self._clock() >= self._next_step_s or record.skipped):
            self._next_step_s = self._clock() + _PLAIN_EVERY_S
            self._line(step_line(record, self._tokens_per_s))

    def refresh(self, status: RunStatus, incidents: Sequence[Incident]) -> None:
        """Write the incidents that have changed; what was closed before this launch was written by an earlier one."""
        self._tokens_per_s = status.tokens_per_s
        if self._incidents is None:
            self._incidents = {one.id: incident_line(one) for one in incidents if not one.is_open}
        for incident in incidents:
            text = incident_line(incident)
            if self._incidents.get(incident.id) != text:
                self._incidents[incident.id] = text
                self._line(incident_line(incident, told=self._told.get(incident.id)))
                self._told[incident.id] = incident.why

    def close(self) -> None:
        """Nothing is held."""

    def _line(self, text: str | None) -> None:
        if text is not None:
            self.say(text)


class LiveDisplay:
    """A picture of the run that stays at the bottom of the terminal, and the lines of events above it."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._lines = PlainDisplay(console, clock, steps=False)  # steps are in the picture
        self._clock = clock
        self._next_s = clock()
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._live.start()

    def say(self, text: str) -> None:
        """Write a line above the picture."""
        self._lines.say(text)

    def folded(self, event: Event, decisions: Sequence[Decision]) -> None:
        """Write the lines of an event and of its decisions above the picture."""
        self._lines.folded(event, decisions)

    def refresh(self, status: RunStatus, incidents: Sequence[Incident]) -> None:
        """Draw the picture anew, at most a few times a second."""
        self._lines.refresh(status, incidents)
        if self._clock() >= self._next_s:
            self._next_s = self._clock() + _LIVE_EVERY_S
            self._live.update(picture(status, incidents), refresh=True)

    def close(self) -> None:
        """Give the terminal back."""
        self._live.stop()


def picture(status: RunStatus, incidents: Sequence[Incident]) -> Group:
    """Progress, loss, learning rate, speed, checkpoints, budget and the newest incidents."""
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        Text(status.state, style="bold"),
        ProgressBar(total=max(1, status.total_steps), completed=status.step, width=_BAR_WIDTH),
        Text(f"step {status.step:,} of {status.total_steps:,}"),
    )
    facts = Table.grid(padding=(0, 2))
    facts.add_row(*(Text(name, style="dim") for name, _ in _facts(status)))
    facts.add_row(*(Text(value) for _, value in _facts(status)))
    newest = [Text(incident_line(incident), style="yellow", no_wrap=True) for incident in incidents if incident.is_open]
    return Group(bar, facts, *newest[-3:])


def _facts(status: RunStatus) -> list[tuple[str, str]]:
    lr = "" if status.lr is None else f"{status.lr:.3g}"
    factor = "" if status.lr_factor == 1.0 else f" x{status.lr_factor:.2g}"
    good = "none" if status.last_good_step is None else f"{status.last_good_step:,}"
    return [
        ("loss", loss_text(status.loss)),
        ("validation", loss_text(status.validation[1] if status.validation else None)),
        ("lr", lr + factor),
        ("tokens/s", short(status.tokens_per_s) if status.tokens_per_s else ""),
        ("last good", good),
        ("incidents", f"{status.incidents} ({status.open_incidents} open)"),
        ("budget", f"{status.rollbacks_left} rollbacks, {status.restarts_left} restarts"),
    ]
