"""What the parts of the engine share while one event is folded: state, policy, facts, and the decisions so far."""

from dataclasses import dataclass, field

from monitors.taxonomy import TAINTING, Finding, IncidentClass
from orchestrator.policy.decisions import Decision, Notify, SendCommand
from orchestrator.policy.model import Policy
from orchestrator.policy.rows import end_of
from orchestrator.policy.state import EngineState, Incident, RunFacts
from trainer.contract.commands import ApplyPlan
from trainer.contract.plan import PlanUpdate

_LEVELS = ("info", "warning", "page")


@dataclass(slots=True)
class Context:
    """One fold in progress. Functions that take a Context may change its state and add decisions."""

    state: EngineState
    policy: Policy
    facts: RunFacts
    decisions: list[Decision] = field(default_factory=list)

    @property
    def enforcing(self) -> bool:
        """False in observe mode and when a trace is replayed: decide and write down, touch nothing."""
        return self.policy.mode == "enforce" and not self.facts.trace

    def decide(self, decision: Decision) -> None:
        """Add a decision."""
        self.decisions.append(decision)

    def notify(self, level: str, title: str, text: str, incident: int | None = None) -> None:
        """Tell people; `level` is info, warning or page."""
        settings = self.policy.notify
        told = settings.command and not self.facts.trace and _LEVELS.index(level) >= _LEVELS.index(settings.level)
        fields = {"level": level, "title": title, "text": text, "incident": incident, "timeout_s": settings.timeout}
        self.decide(Notify.model_validate({**fields, "command": settings.command if told else ()}))

    def next_command(self) -> int:
        """A fresh command id."""
        number = self.state.next_command
        self.state.next_command += 1
        return number

    def apply_plan(self, incident: int | None) -> None:
        """Send the plan as it is now to the running attempt."""
        state = self.state
        update = PlanUpdate(
            skips=tuple(state.skips), quarantines=tuple(state.quarantines), overlays=tuple(state.overlays)
        )
        command = ApplyPlan(id=self.next_command(), update=update)
        state.plans_sent[command.id] = (len(state.quarantines), len(state.overlays))
        self.decide(SendCommand(attempt=state.attempt, command=command, incident=incident))

    def open_incident(self, cls: IncidentClass, onset_step: int, detected_step: int, why: str) -> Incident:
        """A new incident in the logbook."""
        state = self.state
        number = state.incidents[-1].id + 1 if state.incidents else 1
        incident = Incident(
            id=number, cls=cls, onset_step=onset_step, detected_step=detected_step, why=why, attempt=state.attempt,
            opened_at_s=state.now_s,
        )  # fmt: skip
        state.incidents.append(incident)
        return incident

    def adopt_finding(self, finding: Finding) -> Incident:
        """The incident that a finding speaks of, opened or brought up to date."""
        known = (i for i in reversed(self.state.incidents) if i.key == finding.key)
        incident = next(known, None)
        if incident is not None and not incident.is_open:
            return incident  # acted on already: what the diagnosis still sees of it is its fading
        if incident is None:
            incident = self.open_incident(finding.cls, finding.onset_step, finding.step, finding.why)
        incident.key = finding.key
        incident.cls = finding.cls
        incident.onset_step = finding.onset_step
        incident.why = finding.why
        incident.evidence.update(finding.evidence)
        incident.shards = sorted({*incident.shards, *finding.shards})
        if finding.kind in ("suspected", "classified"):
            incident.detected_step = finding.step
        return incident

    def taints(self) -> list[Incident]:
        """Open or suspected incidents that may have damaged the state."""
        return [i for i in self.state.incidents[-64:] if i.cls in TAINTING and i.is_open and i.state != "recovering"]

    def tainted_from(self) -> int | None:
        """First step whose checkpoint may be damaged by what is open now, None if nothing is."""
        margin = self.facts.good_after_steps
        return min((i.onset_step - margin for i in self.taints()), default=None)

    def position_at(self, step: int) -> int:
        """Raw cursor after `step` updates: recorded if it was run, at the current batch size if not (DESIGN 8.2)."""
        state = self.state
        if step >= state.step:
            return state.position + (step - state.step) * self.facts.batch_samples
        recorded = end_of(state.history, step)
        if recorded is not None:
            return recorded
        later = [c for c in state.commits if c.step >= step]
        anchor_step, anchor = (later[0].step, later[0].position) if later else (state.step, state.position)
        return max(0, anchor - (anchor_step - step) * self.facts.batch_samples)
