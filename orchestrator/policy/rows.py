"""Rows of a run's recent past: each is a step, or several that differ in their place alone. Pure."""

from collections.abc import Iterable, Iterator, Sequence

from orchestrator.policy.state import HistoryRow

HISTORY_STEPS = 4096  # covers the widest rollback of the shipped policy (2,000 steps) twice


def keep(history: list[HistoryRow], row: HistoryRow) -> None:
    """Add what has passed; what is older than anything that is asked for goes, many at a time."""
    history.append(row)
    if history[0].step <= row.step - 2 * HISTORY_STEPS:
        del history[: next(i for i, old in enumerate(history) if old.step > row.step - HISTORY_STEPS)]


def each_step(rows: Iterable[HistoryRow], after: int = 0, upto: int | None = None) -> Iterator[HistoryRow]:
    """One row for each step in (after, upto], in order."""
    for row in rows:
        if row.step <= after:
            continue
        for step in range(max(after, row.step - row.steps) + 1, row.step + 1):
            if upto is not None and step > upto:
                return
            yield row if row.steps == 1 else _one(row, step)


def up_to(rows: Iterable[HistoryRow], step: int) -> list[HistoryRow]:
    """Those at or before a step; a row that reaches beyond it is cut."""
    kept = []
    for row in rows:
        first = row.step - row.steps + 1
        if row.step <= step:
            kept.append(row)
        elif first <= step:
            kept.append(row.model_copy(update={"step": step, "end": _end(row, step), "steps": step - first + 1}))
    return kept


def end_of(rows: Sequence[HistoryRow], step: int) -> int | None:
    """Raw cursor after a step, None if no row holds it."""
    for row in reversed(rows):
        if row.step - row.steps < step <= row.step:
            return _end(row, step)
    return None


def _one(row: HistoryRow, step: int) -> HistoryRow:
    return row.model_copy(update={"step": step, "end": _end(row, step), "steps": 1, "samples": 0})


def _end(row: HistoryRow, step: int) -> int:
    return row.end - (row.step - step) * row.samples
