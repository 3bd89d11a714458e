"""`longwatch ledger`: which data was read, when, by which attempt; what was left out, and why.

It tells of what really happened, from the journal alone. Which sample lies at a position is another question.
"""

from collections.abc import Iterator
from contextlib import closing
from typing import Annotated

import typer

from orchestrator.cli.find import JsonOption, RunArgument, find_run
from orchestrator.cli.output import remark, say, say_json, show
from orchestrator.errors import OrchestratorError
from orchestrator.journal import Journal
from orchestrator.ledger.account import Plans, Read, account
from orchestrator.ledger.check import violations
from orchestrator.ledger.read import plans, reads, shard_names, surviving_reads
from orchestrator.ledger.spans import Span, common, without
from orchestrator.report.ledger import account_facts, account_tables, read_facts, read_table


class BadRangeError(OrchestratorError):
    """An option is no range, or names a shard that is not there."""

    exit_code = 2


def ledger(
    run: RunArgument = None,
    steps: Annotated[
        str | None, typer.Option(metavar="FIRST:LAST", help="Updates of these steps, both included.")
    ] = None,
    shard: Annotated[str | None, typer.Option(metavar="SHARD", help="Updates that read of it: name or number.")] = None,
    sample_range: Annotated[
        str | None,
        typer.Option(
            metavar="BEGIN:END", help="Updates that read raw positions [BEGIN, END), also where they were deferred to."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check that nothing is lost and nothing read twice; exit 1 if not.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show which data was read, when and by which attempt, what was skipped or quarantined and for which incident.

    With --steps, --shard or --sample-range every update that fits, also those that were rolled back.
    """
    if check and (steps, shard, sample_range) != (None, None, None):
        raise BadRangeError("--check is about the whole run; leave out --steps, --shard and --sample-range")
    with closing(Journal.read_only(find_run(run).database)) as journal:
        if check:
            _check(journal, json)
            return
        names, told = shard_names(journal), plans(journal)
        wanted = _Wanted(told, _range(steps, "--steps"), _number(shard, names), _range(sample_range, "--sample-range"))
        classes = {incident["id"]: incident["class"] for incident in journal.incidents()}
        whole = account(reads(journal), told)
        found = list(wanted.of(reads(journal))) if wanted.anything else []
    if json:
        chosen = {"reads": [read_facts(read, names) for read in found]} if wanted.anything else {}
        say_json({**account_facts(whole, classes, names), **chosen})
    elif wanted.anything:
        show(read_table(found, names))
        say(f"{len(found)} updates")
    else:
        for table in account_tables(whole, classes, names):
            show(table)


def _check(journal: Journal, json: bool) -> None:
    surviving = surviving_reads(journal)
    first = next(violations(surviving, plans(journal)), None)
    if json:
        say_json({"ok": first is None, "steps": len(surviving), "violation": first})
    elif first is not None:
        remark(first)
    else:
        end = next((read.span[1] for read in reversed(surviving) if read.span), 0)
        say(f"ok: {len(surviving):,} steps, positions 0 to {end:,}: nothing lost, nothing read twice")
    raise typer.Exit(0 if first is None else 1)


class _Wanted:
    """Which updates are asked for; what is not asked for narrows nothing."""

    def __init__(self, told: Plans, steps: Span | None, shard: int | None, positions: Span | None) -> None:
        self._told = told
        self._steps = steps
        self._shard = shard
        self._places = None if positions is None else [positions, *told.later_places(positions)]
        self.anything = (steps, shard, positions) != (None, None, None)

    def of(self, everything: Iterator[Read]) -> Iterator[Read]:
        """Those that fit, in the order given."""
        return (read for read in everything if self._fits(read))

    def _fits(self, read: Read) -> bool:
        if self._steps is not None and not self._steps[0] <= read.step <= self._steps[1]:
            return False
        if self._shard is not None and self._shard not in read.shards:
            return False
        return self._places is None or any(list(common(used, self._places)) for used in self._used(read))

    def _used(self, read: Read) -> list[Span]:
        """The positions that it read, without those that it passed over."""
        return [] if read.span is None else without(read.span, self._told.at(read).skipped)


def _range(text: str | None, option: str) -> Span | None:
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal()) or int(last) < int(first):
        raise BadRangeError(f"{option} {text!r}: a range is two numbers with a colon, the smaller one first: 100:200")
    return int(first), int(last)


def _number(shard: str | None, names: tuple[str, ...]) -> int | None:
    if shard is None:
        return None
    if shard.isdecimal() and (not names or int(shard) < len(names)):
        return int(shard)
    if shard not in names:
        known = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
        raise BadRangeError(f"--shard {shard!r}: there is no such shard; there are {known or 'none known'}")
    return names.index(shard)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog="Example: longwatch ledger runs/my-run --sample-range 4096:8192")(ledger)
