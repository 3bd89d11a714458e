"""Recorded runs as records, whatever wrote them down: see `monitors.tables` for the kinds of files and columns.

An empty cell is "not recorded"; `nan`, `inf` and `-inf` are non-finite values that were. Where the step of another
program's log goes back, the run was resumed from there: what follows is another attempt.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from monitors.records import EvalRecord, StepRecord, StepTime
from monitors.tables import NAMES, REQUIRED, Table, TraceError, columns_of, open_table

__all__ = ["TraceError", "read_trace"]

_OPTIONAL = tuple(name for name in NAMES if name not in REQUIRED)
_Values = dict[str, float | None]


def read_trace(path: Path, columns: Mapping[str, str] | None = None) -> list[StepRecord | EvalRecord]:
    """Read a trace in the order of its rows; records of one attempt rise in step.

    Args:
        path: CSV, JSON lines, a TensorBoard event file or a directory of them.
        columns: field -> name of the column, where guessing would be wrong.

    Raises:
        TraceError: it is not one.
        OSError: the file cannot be read.
    """
    table = open_table(path)
    records = list(_records(table, columns_of(table, columns or {})))
    if not any(isinstance(record, StepRecord) for record in records):
        raise TraceError(path, 1, "loss", "no loss is recorded in any row")
    return records


def _records(table: Table, columns: Mapping[str, str]) -> Iterator[StepRecord | EvalRecord]:
    path, seq, attempt, last, seen = table.path, 0, 1, -1, -1
    for line, row in table.rows:
        text = row.get(columns["step"], "")
        if not text.strip() and not table.plain:
            continue  # a row about something else
        step = _step(path, line, text)
        if table.plain and step <= last:
            raise TraceError(path, line, "step", f"step {step} comes after step {last}")
        if step < last:
            attempt, seq, seen = attempt + 1, 0, -1
        last = step
        values = {name: _number(path, line, name, row.get(columns.get(name, ""))) for name in ("loss", *_OPTIONAL)}
        if values["loss"] is not None and step > seen:
            seq, seen = seq + 1, step
            yield _step_record(seq, attempt, step, values)
        if values["val_loss"] is not None:
            seq += 1
            yield EvalRecord(
                seq=seq, attempt=attempt, at_s=float(step), step=step, loss=values["val_loss"], perplexity=0.0,
                seconds=0.0,
            )  # fmt: skip


def _step_record(seq: int, attempt: int, step: int, values: _Values) -> StepRecord:
    loss, speed, ratio = values["loss"], values["tokens_per_sec"], values["update_ratio"]
    assert loss is not None
    known_speed = speed is not None and speed > 0
    return StepRecord(
        seq=seq, attempt=attempt, at_s=float(step), step=step, loss=loss, grad_norm=values["grad_norm"],
        lr=values["lr"], update_ratio={} if ratio is None else {"all": ratio}, scaler=values["loss_scale"],
        tokens=1_000_000 if known_speed else None,
        step_time_s=StepTime(data=0.0, compute=1_000_000 / speed, other=0.0) if known_speed and speed else None,
    )  # fmt: skip


def _step(path: Path, line: int, text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        raise TraceError(path, line, "step", f"{text!r} is not a step number") from None
    if not value.is_integer() or value < 0:
        raise TraceError(path, line, "step", f"{text!r} is not a step number")
    return int(value)


def _number(path: Path, line: int, column: str, text: str | None) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        raise TraceError(path, line, column, f"{text!r} is not a number") from None
