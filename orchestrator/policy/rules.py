"""Which rule answers an incident: first match wins, and every rule about its class says why it did or did not. Pure."""

from collections.abc import Iterator

from orchestrator.policy.model import Policy, Rule
from orchestrator.policy.state import Considered, Incident, RunFacts


def needs_validation(policy: Policy, incident: Incident, facts: RunFacts) -> bool:
    """Whether the first rule that fits otherwise wants an evaluation on the spot that has not been made."""
    if incident.validation is not None:
        return False
    for rule in policy.rules:
        if incident.cls in rule.classes() and next(_misfits(rule, incident, facts), None) is None:
            return rule.when.validation_confirms is not None
    return False


def choose(policy: Policy, incident: Incident, facts: RunFacts) -> Rule | None:
    """The first rule whose class and conditions hold; what was considered is noted in the incident."""
    chosen, incident.considered = None, []
    incident.rules = len(policy.rules)
    for number, rule in enumerate(policy.rules, start=1):
        if incident.cls not in rule.classes():
            continue
        misfits = [*_misfits(rule, incident, facts), *_validation_misfits(rule, incident)]
        fits = not misfits and chosen is None
        why = "; ".join(misfits) or ("the first that fits" if fits else "it fits too, but an earlier one did first")
        incident.considered.append(Considered(rule=number, matched=fits, why=why))
        chosen = rule if fits else chosen
    return chosen


def _misfits(rule: Rule, incident: Incident, facts: RunFacts) -> Iterator[str]:
    """Conditions that do not hold, in words; without that of an evaluation, which may be still to come."""
    when = rule.when
    for name, wanted, actual in (
        ("cause", when.cause, incident.cause),
        ("phase", when.phase, incident.phase),
        ("verdict", when.verdict, incident.verdict),
    ):
        if wanted is not None and actual not in ((wanted,) if isinstance(wanted, str) else wanted):
            yield f"{name} is {actual or 'not known'}, not {wanted if isinstance(wanted, str) else ' or '.join(wanted)}"
    in_warm_up = incident.onset_step <= facts.warmup_steps
    if when.in_warm_up is not None and when.in_warm_up != in_warm_up:
        where = "within" if in_warm_up else "after"
        yield f"its onset, step {incident.onset_step}, lies {where} the warm-up of {facts.warmup_steps} steps"
    if incident.verdict is not None and any(rung.diagnose for rung in rule.rungs()):
        yield "it asks for a diagnosis, which has been made"


def _validation_misfits(rule: Rule, incident: Incident) -> Iterator[str]:
    wanted, confirms = rule.when.validation_confirms, incident.validation in ("confirmed", "assumed")
    if wanted is not None and wanted != confirms:
        yield f"validation {'confirms' if confirms else 'does not confirm'} it ({incident.validation or 'not asked'})"
