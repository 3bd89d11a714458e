"""The ledger as text, and as the facts that `longwatch ledger --json` prints."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from orchestrator.ledger.account import Account, Read, Skipped, Stretch
from orchestrator.ledger.spans import Span
from trainer.contract.plan import Quarantine

Classes = Mapping[int, str]
"""{incident id: its class}"""


def account_facts(account: Account, classes: Classes, shards: Sequence[str]) -> dict[str, Any]:
    """An account as JSON."""
    return {
        "stretches": [_stretch_facts(one) for one in account.stretches],
        "skipped": [_skip_facts(one, classes) for one in account.skipped],
        "quarantined": [_quarantine_facts(one, classes, shards) for one in account.quarantines],
    }


def read_facts(read: Read, shards: Sequence[str]) -> dict[str, Any]:
    """One update as JSON."""
    return {
        "step": read.step,
        "attempt": read.attempt,
        "survives": read.survives,
        "at_s": read.at_s,
        "positions": read.span,
        "samples": read.samples,
        "shards": {shard_name(shard, shards): count for shard, count in read.shards.items()},
    }


def shard_name(shard: int, shards: Sequence[str]) -> str:
    """Its name, or its number where the name is not known."""
    return shards[shard] if shard < len(shards) else str(shard)


def account_tables(account: Account, classes: Classes, shards: Sequence[str]) -> list[Table]:
    """What was read, and what was left out, if anything was."""
    tables = [_stretch_table(account.stretches)]
    if account.skipped:
        tables.append(_table("skipped", "then", "passed", "read since", "incident"))
        for one in account.skipped:
            since = "" if one.read_since is None else f"{one.read_since:,}"
            where, why = _span_text((one.skip.begin, one.skip.end)), _incident_text(one.skip.incident, classes)
            tables[-1].add_row(where, one.skip.then, f"{one.passed:,}", since, why)
    if account.quarantines:
        tables.append(_table("quarantined", "from position", "incident"))
        for quarantine in account.quarantines:
            name, why = shard_name(quarantine.shard, shards), _incident_text(quarantine.incident, classes)
            tables[-1].add_row(name, f"{quarantine.from_position:,}", why)
    return tables


def read_table(reads: Iterable[Read], shards: Sequence[str]) -> Table:
    """One row for each update."""
    table = _table("step", "attempt", "positions", "samples", "when", "fate", "shards")
    for read in reads:
        counts = ", ".join(f"{shard_name(shard, shards)}: {count}" for shard, count in read.shards.items())
        row = (f"{read.attempt}", _span_text(read.span), _count_text(read.samples), _when(read.at_s))
        table.add_row(f"{read.step:,}", *row, _fate(read.survives), counts, style="" if read.survives else "dim")
    return table


def _stretch_table(stretches: Iterable[Stretch]) -> Table:
    table = _table("attempt", "steps", "positions", "samples", "from", "to", "fate")
    for one in stretches:
        row = (f"{one.first_step:,}-{one.last_step:,}", _span_text(one.span), _count_text(one.samples))
        times = (_when(one.from_s), _when(one.to_s))
        table.add_row(f"{one.attempt}", *row, *times, _fate(one.survives), style="" if one.survives else "dim")
    return table


def _stretch_facts(stretch: Stretch) -> dict[str, Any]:
    return {
        "attempt": stretch.attempt,
        "survives": stretch.survives,
        "steps": [stretch.first_step, stretch.last_step],
        "positions": stretch.span,
        "samples": stretch.samples,
        "from_s": stretch.from_s,
        "to_s": stretch.to_s,
    }


def _skip_facts(skipped: Skipped, classes: Classes) -> dict[str, Any]:
    skip = skipped.skip
    return {
        "begin": skip.begin,
        "end": skip.end,
        "then": skip.then,
        "passed": skipped.passed,
        "read_since": skipped.read_since,
        "incident": skip.incident,
        "class": classes.get(skip.incident) if skip.incident is not None else None,
    }


def _quarantine_facts(quarantine: Quarantine, classes: Classes, shards: Sequence[str]) -> dict[str, Any]:
    incident = quarantine.incident
    return {
        "shard": shard_name(quarantine.shard, shards),
        "from_position": quarantine.from_position,
        "incident": incident,
        "class": classes.get(incident) if incident is not None else None,
    }


def _incident_text(incident: int | None, classes: Classes) -> str:
    return "" if incident is None else f"#{incident} {classes.get(incident, '')}".rstrip()


def _fate(survives: bool) -> str:
    return "kept" if survives else "rolled back"


def _span_text(span: Span | None) -> str:
    return "" if span is None else f"{span[0]:,}-{span[1]:,}"


def _count_text(samples: int | None) -> str:
    return "" if samples is None else f"{samples:,}"


def _when(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table
