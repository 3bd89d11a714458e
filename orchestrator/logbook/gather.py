"""The facts of a logbook, gathered from a run: one pass over the updates, and a look at everything that is rare."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from orchestrator.journal import Journal
from orchestrator.ledger.account import Account, Read, account
from orchestrator.ledger.read import plans, shard_names
from orchestrator.logbook import read, sums
from orchestrator.logbook.model import Attempt, Configuration, Logbook, Opening, Skipped, Source
from orchestrator.logbook.signals import Curves, Sums, Update, values
from orchestrator.logbook.tales import told
from orchestrator.report.explain import rules_of
from orchestrator.report.facts import run_status, shown_incidents
from orchestrator.report.ledger import shard_name
from orchestrator.report.time_spent import time_spent
from trainer.contract.paths import RunPaths

_MOST_INCIDENTS = 60  # with black boxes; of more, the newest and those that cost steps
_TEXT_LIMIT = 200_000  # of a policy that somebody made very long


def gather(paths: RunPaths) -> Logbook:
    """All facts of a run.

    Raises:
        JournalError: there is no journal, or it can't be read.
    """
    now_s = time.time()
    status = run_status(paths, now_s)
    with closing(Journal.read_only(paths.database)) as journal:
        known = read.attempts(journal)
        began_s = known[0].spawned_at_s if known else now_s
        fate = read.fates(known)
        passed = _Pass.over(journal, fate, began_s)
        _add_rare(passed, paths, known, fate)
        incidents = shown_incidents(journal)
        shown = _shown(incidents)
        rules = rules_of(paths)
        totals = passed.sums.totals()
        checkpoints, left_out = sums.checkpoints(journal, known)
        spent = time_spent(journal, now_s)
        return Logbook(
            run=str(paths.root.name),
            made_at_s=now_s,
            began_at_s=began_s,
            verdict=sums.verdict(status, incidents, totals, spent),
            panels=passed.curves.panels(),
            trend=passed.sums.trend(),
            totals=totals,
            incidents=[told(journal, one, known, fate, rules) for one in shown],
            incidents_left_out=len(incidents) - len(shown),
            attempts=known,
            differences=sums.differences(journal, known),
            sources=_sources(paths, passed, shard_names(journal)),
            skipped=_skipped(passed, shard_names(journal), _sample_tokens(journal)),
            checkpoints=checkpoints,
            checkpoints_left_out=left_out,
            goodput=sums.goodput(spent),
            configuration=_configuration(paths, journal),
        )


@dataclass
class _Pass:
    """What the pass over all updates has gathered."""

    curves: Curves
    sums: Sums
    count: int
    account: Account | None = None
    samples: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)

    @classmethod
    def over(cls, journal: Journal, fate: read.Fates, began_s: float) -> "_Pass":
        """Read everything once; the ledger's sums pull the rows through."""
        count = read.count_updates(journal)
        made = cls(Curves(began_s, count), Sums(count), count)
        made.account = account(made._observed(read.updates(journal, fate)), plans(journal))
        return made

    def _observed(self, updates: Iterator[Update]) -> Iterator[Read]:
        for ordinal, update in enumerate(updates):
            self.curves.add(ordinal, update, values(update.record))
            self.sums.add(ordinal, update)
            record = update.record
            shards = {int(shard): int(count) for shard, (count, _) in (record.get("shards") or {}).items()}
            span = record.get("data")
            if update.survives and shards:
                self.samples.update(shards)
                share = (record.get("tokens") or 0) / sum(shards.values())
                self.tokens.update({shard: round(samples * share) for shard, samples in shards.items()})
            yield Read(
                attempt=update.attempt,
                step=update.step,
                at_s=update.at_s,
                span=(span["begin"], span["end"]) if span else None,
                samples=sum(shards.values()) if shards else None,
                shards=shards,
                survives=update.survives,
            )


def _add_rare(passed: _Pass, paths: RunPaths, known: list[Attempt], fate: read.Fates) -> None:
    """Evaluations and activations. They are few: their place among the updates is as good as their step's."""
    highest = max((one.last_step or 0 for one in known), default=0)
    for record in read.rare_records(paths, known):
        attempt, step = record["attempt"], record["step"]
        update = Update(attempt, step, fate.survives(attempt, step), record["at_s"], record)
        passed.curves.add(step * passed.count // max(1, highest), update, read.rare_values(record))


def _shown(incidents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are told in full: what cost steps or is open comes first, then what is newest."""
    ranked = sorted(incidents, key=lambda one: (one["state"] == "closed", not one["cost"]["steps"], -one["id"]))
    return sorted(ranked[:_MOST_INCIDENTS], key=lambda one: int(one["id"]))


def _sources(paths: RunPaths, passed: _Pass, names: Sequence[str]) -> list[Source]:
    """By source where the run's data book knows it, else by shard."""
    book = json.loads(paths.data_book.read_text()) if paths.data_book.exists() else {"shards": []}
    of_shard = {number: str(one["source"]) for number, one in enumerate(book["shards"])}
    samples: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for shard, count in passed.samples.items():
        name = of_shard.get(shard, shard_name(shard, names))
        samples[name] += count
        tokens[name] += passed.tokens[shard]
    return [Source(name=name, samples=count, tokens=tokens[name]) for name, count in samples.most_common()]


def _sample_tokens(journal: Journal) -> int | None:
    for record in read.kept_records(journal, "started"):
        return int(record["sample_tokens"])
    return None


def _skipped(passed: _Pass, names: Sequence[str], sample_tokens: int | None) -> list[Skipped]:
    found = passed.account
    if found is None:
        return []
    ranges = [
        Skipped(
            what=f"positions {one.skip.begin:,} to {one.skip.end:,}",
            samples=one.passed,
            tokens=None if sample_tokens is None else one.passed * sample_tokens,
            then="dropped" if one.skip.then == "drop" else f"read later, {one.read_since or 0:,} so far",
            incident=one.skip.incident,
        )
        for one in found.skipped
    ]
    shards = [
        Skipped(
            what=f"shard {shard_name(one.shard, names)} from position {one.from_position:,} on",
            samples=None,
            tokens=None,
            then="quarantined",
            incident=one.incident,
        )
        for one in found.quarantines
    ]
    return [*ranges, *shards]


def _configuration(paths: RunPaths, journal: Journal) -> Configuration:
    openings: list[Opening] = []
    before: dict[str, str] = {}
    for event in read.events(journal, "run_opened"):
        now = {"configuration": event["config_digest"], "policy": event["policy_digest"], "code": event["code_version"]}
        openings.append(
            Opening(
                at_s=event["at_s"],
                code_version=event["code_version"],
                config_digest=event["config_digest"],
                policy_digest=event["policy_digest"],
                changed=[name for name, value in now.items() if before and before[name] != value],
            )
        )
        before = now
    return Configuration(
        config=json.loads(paths.run_yaml.read_text()) if paths.run_yaml.exists() else {},
        policy=paths.policy_yaml.read_text()[:_TEXT_LIMIT] if paths.policy_yaml.exists() else "",
        openings=openings,
    )
