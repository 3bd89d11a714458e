"""The ledger's facts, as the journal has them."""

import json
from collections.abc import Iterator

from monitors.records import PlanAppliedRecord, StartedRecord
from orchestrator.journal import Journal
from orchestrator.ledger.account import Plans, Read, Told
from orchestrator.policy.decisions import SendCommand, StartAttempt
from orchestrator.policy.events import EVENTS, RecordReceived
from trainer.contract.commands import ApplyPlan
from trainer.contract.plan import PlanUpdate, ResumePlan

_READS = """
SELECT s.attempt, s.step, s.at_s, s.data_begin, s.data_end, json_extract(s.record, '$.shards') AS shards,
    NOT EXISTS (
        SELECT 1 FROM attempts later
        WHERE later.attempt > s.attempt AND later.replay = 0 AND later.started_step < s.step
    ) AS survives
FROM steps s JOIN attempts a USING (attempt) WHERE a.replay = 0
"""


def reads(journal: Journal) -> Iterator[Read]:
    """Every update that was no replay, attempt by attempt."""
    for row in journal.select(f"{_READS} ORDER BY s.attempt, s.step"):
        shards = {int(shard): int(count) for shard, (count, _) in json.loads(row["shards"] or "{}").items()}
        yield Read(
            attempt=row["attempt"],
            step=row["step"],
            at_s=row["at_s"],
            span=None if row["data_begin"] is None else (row["data_begin"], row["data_end"]),
            samples=sum(shards.values()) if shards else None,
            shards=shards,
            survives=bool(row["survives"]),
        )


def surviving_reads(journal: Journal) -> list[Read]:
    """Those that the model was made of, in the order of their steps."""
    return sorted((read for read in reads(journal) if read.survives), key=lambda read: read.step)


def plans(journal: Journal) -> Plans:
    """What the attempts were told: by their plans when they began, and by updates from when they said so."""
    records = _rare(journal)
    started = {one.attempt: one for one in records if isinstance(one, StartedRecord)}
    applied = {(one.attempt, one.command): one.step for one in records if isinstance(one, PlanAppliedRecord)}
    told: dict[int, list[tuple[int, Told]]] = {}
    deferred_from = None
    for plan in _begun(journal):
        deferred_from = plan.deferred_from if deferred_from is None else deferred_from
        if load := started.get(plan.attempt):
            told[plan.attempt] = [(load.step, _told(plan.anchored(load.step, load.position)))]
    for attempt, command in _updates(journal):
        step = applied.get((attempt, command.id))
        if step is not None and attempt in told:
            told[attempt].append((step, _told(command.update)))
    return Plans(told, deferred_from)


def shard_names(journal: Journal) -> tuple[str, ...]:
    """Names by shard number, as the newest attempt knows them."""
    found = (one.shards for one in reversed(_rare(journal)) if isinstance(one, StartedRecord))
    return next(found, ())


def _begun(journal: Journal) -> Iterator[ResumePlan]:
    """Plans of all attempts that were no replays."""
    query = "SELECT json FROM decisions WHERE kind = 'start_attempt' ORDER BY id"
    found = (StartAttempt.model_validate_json(row["json"]).plan for row in journal.select(query))
    return (plan for plan in found if plan.replay is None)


def _updates(journal: Journal) -> Iterator[tuple[int, ApplyPlan]]:
    query = "SELECT json FROM decisions WHERE kind = 'send_command' ORDER BY id"
    for row in journal.select(query):
        sent = SendCommand.model_validate_json(row["json"])
        if isinstance(sent.command, ApplyPlan):
            yield sent.attempt, sent.command


def _rare(journal: Journal) -> list[object]:
    """Records of loads and plans, oldest first: the journal keeps them for good."""
    query = (
        "SELECT json FROM events WHERE kind = 'record_received' "
        "AND json_extract(json, '$.record.kind') IN ('started', 'plan_applied') ORDER BY seq"
    )
    events = (EVENTS.validate_json(row["json"]) for row in journal.select(query))
    return [event.record for event in events if isinstance(event, RecordReceived)]


def _told(plan: ResumePlan | PlanUpdate) -> Told:
    return Told(plan.skips, plan.quarantines)
