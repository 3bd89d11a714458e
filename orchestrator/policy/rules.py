"""Which rule answers an incident: first match wins. Pure."""

from orchestrator.policy.model import Policy, Rule
from orchestrator.policy.state import Incident, RunFacts


def needs_validation(policy: Policy, incident: Incident, facts: RunFacts) -> bool:
    """Whether the first rule that fits otherwise wants an evaluation on the spot that has not been made."""
    if incident.validation is not None:
        return False
    for rule in policy.rules:
        if _fits(rule, incident, facts):
            return rule.when.validation_confirms is not None
    return False


def matching(policy: Policy, incident: Incident, facts: RunFacts) -> Rule | None:
    """The first rule whose class and conditions hold."""
    for rule in policy.rules:
        if _fits(rule, incident, facts) and _validation_fits(rule, incident):
            return rule
    return None


def _fits(rule: Rule, incident: Incident, facts: RunFacts) -> bool:
    when = rule.when
    return (
        incident.cls in rule.classes()
        and _among(when.cause, incident.cause)
        and _among(when.phase, incident.phase)
        and (when.verdict is None or when.verdict == incident.verdict)
        and (incident.verdict is None or not any(rung.diagnose for rung in rule.rungs()))  # it has been diagnosed
        and (when.in_warm_up is None or when.in_warm_up == (incident.onset_step <= facts.warmup_steps))
    )


def _validation_fits(rule: Rule, incident: Incident) -> bool:
    wanted = rule.when.validation_confirms
    return wanted is None or wanted == (incident.validation in ("confirmed", "assumed"))


def _among(wanted: str | tuple[str, ...] | None, actual: str | None) -> bool:
    if wanted is None:
        return True
    return actual in ((wanted,) if isinstance(wanted, str) else wanted)
