"""Why an incident was answered as it was, from what was noted when it was decided.

Works on the published JSON form. The rules are shown as the policy of now has them; which of them was chosen, and why
the others were not, was written down then.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.text import Text

from orchestrator.config import read_policy
from orchestrator.policy.model import Rule
from orchestrator.policy.shipped import in_force
from orchestrator.report.incidents import incident_lines
from trainer.contract.paths import RunPaths

Facts = Mapping[str, Any]
_VALIDATION = {
    "confirmed": "an evaluation on the spot confirmed it",
    "refuted": "an evaluation on the spot did not confirm it",
    "assumed": "no evaluation could be made, so validation_confirms counted as true",
}


def rules_of(paths: RunPaths) -> tuple[Rule, ...]:
    """The rules of a run's policy in order, the shipped ones behind its own; none if the policy is not there."""
    if not paths.policy_yaml.exists():
        return ()
    return in_force(read_policy(paths.policy_yaml)).rules


def explanation_lines(incident: Facts, rules: tuple[Rule, ...]) -> list[Text]:
    """The incident, its evidence, the rules considered, what stood against them, and what a person can do."""
    return [
        *incident_lines([incident]),
        *_section("evidence", evidence_lines(incident)),
        *_section("rules", rule_lines(incident, rules)),
        *_section("then", then_lines(incident)),
    ]


def _section(title: str, lines: Iterable[str]) -> Iterator[Text]:
    for number, line in enumerate(lines):
        text = Text("   ")
        text.append(f"{title if number == 0 else '':<9}", style="bold")
        yield text.append(line)


def evidence_lines(incident: Facts) -> Iterator[str]:
    """What was measured, by name, and what an evaluation or replays said of it."""
    for name, value in incident.get("evidence", {}).items():
        yield f"{name} = {', '.join(map(_number, value)) if isinstance(value, list) else _number(value)}"
    if validation := incident.get("validation"):
        yield _VALIDATION[validation]
    if verdict := incident.get("verdict"):
        yield f"replays gave the verdict {verdict}"


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def rule_lines(incident: Facts, rules: tuple[Rule, ...]) -> Iterator[str]:
    """The rule that was chosen, those that were not, and the guard that stood against it."""
    total, considered = incident.get("rules", 0), incident.get("considered", [])
    if not total:
        yield "none was asked: it was not, or not yet, answered"
        return
    for row in considered:
        shown = f": {_said(rules[row['rule'] - 1])}" if row["rule"] <= len(rules) == total else ""
        yield f"{'chosen' if row['matched'] else 'not'} {row['rule']} of {total}{shown} ({row['why']})"
    others = total - len(considered)
    yield f"{others} other rule{'s are' if others != 1 else ' is'} not about {incident['class']}"
    if incident.get("rungs", 1) > 1:
        yield f"rung {min(incident['rung'] + 1, incident['rungs'])} of {incident['rungs']}" + _because(incident)
    if refused := incident.get("refused"):
        yield f"a guard stood against it: {refused}"


def _because(incident: Facts) -> str:
    relapse = incident.get("relapse_of")
    return f", because it is a relapse of incident {relapse}" if relapse is not None else ", its first time"


def _said(rule: Rule) -> str:
    when = rule.when.model_dump(exclude_none=True)
    conditions = ", ".join(f"{name}={value}" for name, value in when.items())
    doing = " | ".join("+".join(rung.names()) for rung in rule.rungs())
    return f"{'when ' + conditions + ' ' if conditions else ''}do {doing}"


def then_lines(incident: Facts) -> Iterator[str]:
    """What became of it."""
    if (target := incident.get("target_step")) is not None:
        yield f"rolled back to the checkpoint of step {target}"
    if (resume := incident.get("resume_step")) is not None:
        yield f"the run had been at step {resume}"
    if incident.get("observed"):
        yield "nothing was touched: the policy only observes, or a recorded run was replayed"
    if incident.get("outcome") == "halted":
        yield "the run was halted; once the cause is dealt with: longwatch resume RUN --because TEXT"
