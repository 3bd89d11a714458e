"""`longwatch explain`: every rule about an incident says why it was chosen or not, as noted when it was decided."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from monitors.taxonomy import IncidentClass
from orchestrator.cli.app import run
from orchestrator.config import resolve, write_resolved
from orchestrator.journal import Batch, Journal
from orchestrator.policy.model import Policy
from orchestrator.policy.rules import choose
from orchestrator.policy.state import Incident
from orchestrator.report.explain import explanation_lines
from tests.orchestrator.clirun import write_journal, write_run
from tests.orchestrator.simulated import World, healthy

_LADDER = [{"roll_back": {"margin_steps": 20}, "skip_data": "40 batches"}, {"halt": {}}]
_RULES = [
    {"on": "crash", "do": ["restart"]},
    {"on": "unrecovered_spike", "when": {"in_warm_up": True}, "do": ["halt"]},
    {"on": "unrecovered_spike", "when": {"validation_confirms": False}, "do": ["record"]},
    {"on": "unrecovered_spike", "when": {"validation_confirms": True}, "ladder": _LADDER},
    {"on": "unrecovered_spike", "do": ["record"]},
]
_GUARDS = {"max_skipped_share": 0.5, "max_discarded_share": 1.0, "relapse_steps": 400}


def _policy(**changes: Any) -> Policy:
    return Policy.model_validate({"version": 1, "guards": _GUARDS, "rules": _RULES, **changes})


def _text(incident: Incident, policy: Policy) -> str:
    published = json.loads(incident.model_dump_json(by_alias=True))
    return "\n".join(line.plain for line in explanation_lines(published, policy.rules))


def _spiking(world: World, step: int) -> float:
    assert world.plan is not None
    return healthy(world, step) + (4.0 if step >= 200 and world.plan.attempt < 3 else 0.0)


def test_a_relapse_explains_itself() -> None:
    """Rolled back, relapsed, halted: evidence, the rules not taken and why, the rung, and what a person does."""
    world = World(policy=_policy(), loss=_spiking, validation=_spiking)
    world.run()
    first, second = (i for i in world.engine.incidents() if i.cls is IncidentClass.UNRECOVERED_SPIKE)

    said = _text(first, world.engine.policy)
    assert "threshold_sigma = 6" in said
    assert "an evaluation on the spot confirmed it" in said
    total = len(world.engine.policy.rules)
    assert (
        f"not 2 of {total}: when in_warm_up=True do halt (its onset, step {first.onset_step}, lies after the " in said
    )
    assert f"not 3 of {total}: when validation_confirms=False do record (validation confirms it (confirmed))" in said
    assert f"chosen 4 of {total}: when validation_confirms=True do roll_back+skip_data | halt (the first that" in said
    assert f"not 5 of {total}: do record (it fits too, but an earlier one did first)" in said
    assert "rung 1 of 2, its first time" in said
    assert f"rolled back to the checkpoint of step {first.target_step}" in said

    said = _text(second, world.engine.policy)
    assert f"rung 2 of 2, because it is a relapse of incident {first.id}" in said
    assert "longwatch resume RUN --because TEXT" in said


def test_what_a_guard_forbids_is_said() -> None:
    """The rule was chosen and not carried out."""
    strict = _policy(guards={**_GUARDS, "max_skipped_share": 1e-6, "always_skipped_batches": 0})
    world = World(policy=strict, loss=_spiking, validation=_spiking)
    world.run()
    assert "a guard stood against it: 320 skipped samples would be more than the limit" in _text(
        world.incident("unrecovered_spike"), world.engine.policy
    )


@pytest.mark.parametrize(
    ("when", "given", "why"),
    [
        ({"cause": "host_oom"}, {"cause": "killed"}, "cause is killed, not host_oom"),
        ({"cause": ["gpu", "nccl"]}, {"cause": "killed"}, "cause is killed, not gpu or nccl"),
        ({"cause": "killed"}, {"cause": "killed"}, None),
    ],
)
def test_each_condition_says_what_it_wanted(when: dict[str, Any], given: dict[str, Any], why: str | None) -> None:
    """And what there was."""
    policy = Policy.model_validate({"version": 1, "rules": [{"on": "crash", "when": when, "do": ["restart"]}]})
    incident = Incident(id=1, cls=IncidentClass.CRASH, onset_step=5, detected_step=5, why="it died", **given)
    chosen = choose(policy, incident, World().facts)
    (row,) = incident.considered
    assert (chosen is not None) == row.matched == (why is None)
    assert row.why == (why or "the first that fits")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its number; one that is not there is named with those that are."""
    made = resolve(write_run(tmp_path))
    write_resolved(made)
    write_journal(made.paths)
    world = World(policy=_policy(mode="observe"), loss=_spiking)
    world.run()
    decided = world.incident("unrecovered_spike").model_copy(update={"id": 7})
    with closing(Journal.open(made.paths.database)) as journal:
        journal.commit(Batch(incidents={7: decided.model_dump_json(by_alias=True)}))

    assert run(["explain", "7", str(made.paths.root)]) == 0
    said = capsys.readouterr().out
    assert "validation_confirms counted as true" in said
    assert "nothing was touched" in said
    assert run(["explain", "7", str(made.paths.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["considered"][2]["matched"]
    assert run(["explain", "9", str(made.paths.root)]) == 2
    assert "there is no incident 9; there are: 1, 2, 7" in capsys.readouterr().err
