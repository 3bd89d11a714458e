"""Checkpoints as tables: what there is, and what pruning would do."""

from collections.abc import Iterable

from rich.table import Table

from orchestrator.recovery.retention import Checkpoint, Retention
from orchestrator.report.numbers import short

_AGES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def age_text(committed_at_s: float | None, now_s: float) -> str:
    """`3 h`: how long ago by this machine's clock; empty if the journal does not know."""
    if committed_at_s is None:
        return ""
    age_s = max(0.0, now_s - committed_at_s)
    size_s, unit = next(((size_s, unit) for size_s, unit in _AGES if age_s >= size_s), (1.0, "s"))
    return f"{age_s / size_s:.0f} {unit}"


def standing_text(checkpoint: Checkpoint) -> str:
    """The rung of the ladder, and what else is so."""
    facts: list[str] = ["good" if checkpoint.good else checkpoint.state]
    facts += ["verified"] if checkpoint.verified and "verified" not in facts else []
    facts += ["pinned"] if checkpoint.pinned else []
    facts += [] if checkpoint.in_lineage else ["rolled back"]
    return ", ".join(facts)


def checkpoint_table(checkpoints: Iterable[Checkpoint], now_s: float) -> Table:
    """One row for each, in the order given."""
    table = _table("age", "size", "state", "where", "checkpoint")
    for one in checkpoints:
        row = (
            age_text(one.committed_at_s, now_s),
            f"{short(one.bytes)}B",
            standing_text(one),
            "+".join(one.where),
            one.id,
        )
        table.add_row(f"{one.step:,}", *row, style="" if one.in_lineage else "dim")
    return table


def plan_table(checkpoints: Iterable[Checkpoint], plan: Retention, now_s: float) -> Table:
    """What becomes of each, and why."""
    table = _table("age", "size", "what", "why", "checkpoint")
    for one in checkpoints:
        reason = plan.keep.get(one.id)
        what = ("keep", reason) if reason is not None else ("delete", "no rule keeps it")
        row = (age_text(one.committed_at_s, now_s), f"{short(one.bytes)}B", *what, one.id)
        table.add_row(f"{one.step:,}", *row, style="" if reason is not None else "yellow")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("step", justify="right", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right" if name in ("age", "size") else "left", no_wrap=True)
    return table
