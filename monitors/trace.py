"""Recorded runs: CSV with `step,loss` and what else was logged, into records.

An empty cell is "not recorded"; `nan`, `inf` and `-inf` are non-finite values that were.
"""

import csv
from collections.abc import Iterable
from pathlib import Path

from monitors.records import EvalRecord, StepRecord, StepTime

_REQUIRED = ("step", "loss")
_OPTIONAL = ("grad_norm", "lr", "tokens_per_sec", "update_ratio", "val_loss", "loss_scale")


class TraceError(Exception):
    """A file is not a trace. Names the file, the line and the column."""

    def __init__(self, path: Path, line: int, column: str, fact: str) -> None:
        self.path, self.line, self.column = path, line, column
        where = f"{path}:{line}" + (f", column {column}" if column else "")
        remedy = f"a trace is CSV with the columns {', '.join(_REQUIRED)} and any of {', '.join(_OPTIONAL)}"
        super().__init__(f"{where}: {fact}; {remedy}")


def read_trace(path: Path) -> list[StepRecord | EvalRecord]:
    """Read a trace in the order of its rows.

    Raises:
        TraceError: it is not one.
        OSError: the file cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte order mark first
            records = list(_records(path, csv.DictReader(file)))
    except UnicodeDecodeError as error:
        raise TraceError(path, 1, "", "not a text file") from error
    except csv.Error as error:
        raise TraceError(path, 1, "", f"not CSV ({error})") from error
    if not any(isinstance(record, StepRecord) for record in records):
        raise TraceError(path, 1, "loss", "no loss is recorded in any row")
    return records


def _records(path: Path, rows: "csv.DictReader[str]") -> Iterable[StepRecord | EvalRecord]:
    missing = [name for name in _REQUIRED if name not in (rows.fieldnames or ())]
    if missing:
        raise TraceError(path, 1, missing[0], "this column is missing")
    seq, last = 0, -1
    for row in rows:
        line = rows.line_num
        step = _step(path, line, row["step"])
        if step <= last:
            raise TraceError(path, line, "step", f"step {step} comes after step {last}")
        last = step
        loss = _number(path, line, "loss", row["loss"])
        values = {name: _number(path, line, name, row.get(name)) for name in _OPTIONAL}
        if loss is not None:
            seq += 1
            yield _step_record(seq, step, loss, values)
        if values["val_loss"] is not None:
            seq += 1
            yield EvalRecord(
                seq=seq, attempt=1, at_s=float(step), step=step, loss=values["val_loss"], perplexity=0.0, seconds=0.0
            )


def _step_record(seq: int, step: int, loss: float, values: dict[str, float | None]) -> StepRecord:
    speed, ratio = values["tokens_per_sec"], values["update_ratio"]
    known_speed = speed is not None and speed > 0
    return StepRecord(
        seq=seq, attempt=1, at_s=float(step), step=step, loss=loss, grad_norm=values["grad_norm"], lr=values["lr"],
        update_ratio={} if ratio is None else {"all": ratio}, scaler=values["loss_scale"],
        tokens=1_000_000 if known_speed else None,
        step_time_s=StepTime(data=0.0, compute=1_000_000 / speed, other=0.0) if known_speed and speed else None,
    )  # fmt: skip


def _step(path: Path, line: int, text: str | None) -> int:
    try:
        value = float(text or "")
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
