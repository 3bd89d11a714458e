"""Support for diagnoses by replay on the real trainer: the engine decides, attempts run in this process, one by one.

An attempt runs to its planned end; its records are folded in order until the engine has it stopped, as it would have
been. So a diagnosis costs a few short attempts and no process.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monitors.records import CommitRecord, Record, StepRecord, parse_record
from orchestrator.facts import facts_of
from orchestrator.policy.decisions import Decision, EndRun, StartAttempt, StopAttempt
from orchestrator.policy.engine import Engine
from orchestrator.policy.events import AttemptExited, AttemptSpawned, Event, RecordReceived, RunOpened
from orchestrator.policy.model import Policy
from orchestrator.policy.shipped import in_force
from orchestrator.policy.state import Incident
from tests.keepers import keepers
from tests.trainer.attempts import TinyRun
from trainer.attempt import Attempt
from trainer.contract.paths import KEEPER_ROLES
from trainer.contract.plan import ResumePlan

STEPS = 130
_DIAGNOSED = ["sudden_nan", "unrecovered_spike", "plateau_then_nan"]
_CUT = {"factor": 0.5, "hold_steps": 100, "ramp_steps": 100}
_ANSWERS: dict[str, dict[str, Any]] = {
    "hardware": {"roll_back": {"margin_steps": 0}},
    "data": {"roll_back": {"margin_steps": 0}, "skip_data": "20 batches", "quarantine_shards": {}},
    "data_and_state": {"roll_back": {"margin_steps": 0}, "skip_data": "20 batches", "lower_lr": _CUT},
    "optimisation": {"roll_back": {"margin_steps": 10}, "lower_lr": _CUT},
    "state": {"roll_back": {"margin_steps": 10}, "lower_lr": _CUT, "reseed": {}},
    "inconclusive": {"roll_back": {"margin_steps": 0}, "reseed": {}},
}


def policy(**diagnose: Any) -> Policy:
    """Three classes are diagnosed; every verdict has its answer. Horizons are those of a run of a hundred steps."""
    answers = [{"on": _DIAGNOSED, "when": {"verdict": verdict}, "do": [do]} for verdict, do in _ANSWERS.items()]
    return Policy.model_validate(
        {
            "version": 1,
            "detect": {"recover_steps": 10, "recover_steps_max": 20},
            "guards": {"max_skipped_share": 0.9, "max_discarded_share": 1.0, "max_quarantined_share": 0.9},
            "rules": [*answers, {"on": _DIAGNOSED, "do": [{"diagnose": diagnose}]}],
        }
    )


@dataclass
class Diagnosed:
    """One run with faults, as far as the answer to its first diagnosis."""

    root: Path
    faults: list[dict[str, Any]]
    changes: dict[str, Any] = field(default_factory=dict)
    policy: Policy = field(default_factory=policy)

    def __post_init__(self) -> None:
        config: dict[str, Any] = {
            "steps": STEPS,
            "model": {"layers": 2, "heads": 2, "width": 32},
            "schedule": {"kind": "constant", "warmup_steps": 10},
            "checkpoint": {"every_steps": 10, "good_after_steps": 10, "patience_s": 30, "keep_local": 50},
            "faults": self.faults,
        }
        self.run = TinyRun(self.root, config | self.changes)
        self.engine = Engine(in_force(self.policy), facts_of(self.run.config))
        self.plans: list[ResumePlan] = []
        self._at_s = 0.0

    def go(self) -> Incident | None:
        """Until the first verdict has been answered; the incident, or None if the run ended without one."""
        event: Event = RunOpened(
            at_s=0.0, run_id=self.run.config.name, config_digest="c", policy_digest="p", code_version="1"
        )
        decisions = self.engine.fold(event)
        while True:
            started = [decision.plan for decision in decisions if isinstance(decision, StartAttempt)]
            settled = [incident for incident in self.engine.incidents() if incident.verdict is not None]
            if settled or not started or any(isinstance(decision, EndRun) for decision in decisions):
                self.plans += started
                return settled[0] if settled else None
            decisions = self._attempt(started[0])

    def _attempt(self, plan: ResumePlan) -> list[Decision]:
        paths, number = self.run.paths, plan.attempt
        self.plans.append(plan)
        paths.plan(number).write_text(plan.model_dump_json())
        self.run.claim(plan.epoch)
        with keepers(paths, self.run.config), Attempt(paths, number) as entered:
            entered.run()
        self._fold(AttemptSpawned(at_s=self._at_s, attempt=number, pid=1))
        for record in self._records(number):
            self._at_s += 1e-3
            decisions = self._fold(RecordReceived(at_s=self._at_s, record=record))
            if any(isinstance(decision, StopAttempt) for decision in decisions):
                return self._fold(AttemptExited(at_s=self._at_s, attempt=number, cause="left"))
        cause = "replay_done" if plan.replay is not None else "finished"
        return self._fold(AttemptExited(at_s=self._at_s, attempt=number, cause=cause))

    def _fold(self, event: Event) -> list[Decision]:
        return self.engine.fold(event)

    def _records(self, attempt: int) -> Iterator[Record]:
        """In order; a commit right after its step, because here steps are far faster than the saves behind them."""
        files = [self.run.paths.records(attempt), *(self.run.paths.keeper_records(role) for role in KEEPER_ROLES)]
        lines = [[parse_record(line) for line in file.read_text().splitlines()] for file in files if file.exists()]
        own, kept = lines[0], [record for part in lines[1:] for record in part]
        commits = [record for record in kept if isinstance(record, CommitRecord) and record.attempt == attempt]
        for record in own:
            yield record
            if isinstance(record, StepRecord) or record.kind == "started":
                yield from (commit for commit in commits if commit.step == record.step)
