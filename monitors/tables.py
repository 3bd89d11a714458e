"""Logs of other programs as tables: CSV, JSON lines and TensorBoard event files; and which column is what.

Column names are guessed from those that trainers and experiment trackers use, whatever their case; a name that is given
comes first. Nothing is guessed where two columns could be meant.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Field -> names it has elsewhere, the likeliest first. Spaces and hyphens are read as underscores.
NAMES: dict[str, tuple[str, ...]] = {
    "step": (
        "step", "_step", "global_step", "trainer/global_step", "train/global_step", "train/step", "iteration", "iter",
        "num_updates", "update",
    ),
    "loss": (
        "loss", "train/loss", "train_loss", "training_loss", "loss/train", "lm_loss", "train/lm_loss", "train/ce_loss",
        "lm_loss_training/lm_loss",
    ),
    "grad_norm": (
        "grad_norm", "train/grad_norm", "gradient_norm", "total_grad_norm", "optim/total_grad_norm", "gnorm",
        "grad_norm/total", "train/gnorm",
    ),
    "lr": (
        "lr", "learning_rate", "train/lr", "train/learning_rate", "optim/learning_rate", "optim/learning_rate_group0",
    ),
    "tokens_per_sec": (
        "tokens_per_sec", "tokens_per_second", "train/tokens_per_sec", "throughput/tokens_per_sec",
        "throughput/device/tokens_per_second", "tok/s", "tokens/s",
    ),
    "val_loss": (
        "val_loss", "val/loss", "validation_loss", "validation/loss", "eval_loss", "eval/loss", "valid_loss",
        "loss/val",
    ),
    "update_ratio": ("update_ratio",),
    "loss_scale": ("loss_scale", "train/loss_scale"),
}  # fmt: skip
REQUIRED = ("step", "loss")
_SPREADS = ("__MIN", "__MAX")  # W&B exports each value with what it hides by thinning out
_EVENTS = "*tfevents*"


class TraceError(Exception):
    """A file is not a trace. Names the file, the line and the column."""

    def __init__(self, path: Path, line: int, column: str, fact: str, remedy: str = "") -> None:
        self.path, self.line, self.column = path, line, column
        where = f"{path}:{line}" + (f", column {column}" if column else "")
        optional = ", ".join(name for name in NAMES if name not in REQUIRED)
        remedy = remedy or f"a trace has the columns {', '.join(REQUIRED)} and any of {optional}"
        super().__init__(f"{where}: {fact}; {remedy}")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows as (line, column -> text); an empty text is "not recorded". Rows can be read once."""

    path: Path
    columns: tuple[str, ...]
    rows: Iterable[tuple[int, Mapping[str, str]]]
    plain: bool = False  # ours: every row has a step, and steps only rise


def is_tensorboard(path: Path) -> bool:
    """An event file, or a directory with one."""
    return "tfevents" in path.name if path.is_file() else any(path.glob(_EVENTS))


def open_table(path: Path) -> Table:
    """The table in a file, by its kind.

    Raises:
        TraceError: it cannot be read as what it seems to be.
        OSError: it cannot be read at all.
    """
    if is_tensorboard(path):
        return _events(path)
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        return _json_lines(path)
    return _csv(path)


def columns_of(table: Table, given: Mapping[str, str]) -> dict[str, str]:
    """Field -> column, for those that are there.

    Raises:
        TraceError: a column that was named or that is needed is not there, or several could be meant.
    """
    shown = ", ".join(table.columns[:20]) + (", ..." if len(table.columns) > 20 else "")
    found = {}
    for field in NAMES:
        remedy = f"name it with --column {field}=NAME; the columns are: {shown or 'none'}"
        if field in given:
            if given[field] not in table.columns:
                raise TraceError(table.path, 1, field, f"there is no column {given[field]!r}", remedy)
            found[field] = given[field]
            continue
        column = _guess(table, field, remedy)
        if column is not None:
            found[field] = column
        elif field in REQUIRED:
            raise TraceError(table.path, 1, field, "this column is missing", f"step, loss are needed: {remedy}")
    return found


def _guess(table: Table, field: str, remedy: str) -> str | None:
    for name in NAMES[field]:
        matches = [column for column in table.columns if _plain_name(column) == name]
        if len(matches) > 1:
            raise TraceError(table.path, 1, field, f"it could be any of {', '.join(matches)}", remedy)
        if matches:
            return matches[0]
    return None


def _plain_name(column: str) -> str:
    """Without case, without W&B's `RUN - ` before it; a spread is no name of anything."""
    if column.endswith(_SPREADS):
        return ""
    return column.rpartition(" - ")[2].strip().lower().replace(" ", "_").replace("-", "_")


def _csv(path: Path) -> Table:
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark first
    except UnicodeDecodeError as error:
        raise TraceError(path, 1, "", "not a text file") from error
    reader = csv.DictReader(text.splitlines())
    names = tuple(reader.fieldnames or ())
    return Table(path, names, _csv_rows(path, reader), plain=not names or {*REQUIRED} <= {*names})


def _csv_rows(path: Path, reader: "csv.DictReader[str]") -> Iterator[tuple[int, Mapping[str, str]]]:
    try:
        for row in reader:
            yield reader.line_num, {name: text or "" for name, text in row.items() if name is not None}
    except csv.Error as error:
        raise TraceError(path, reader.line_num, "", f"not CSV ({error})") from error


def _json_lines(path: Path) -> Table:
    """One object a line, as trackers write their history; nested keys are joined by a slash."""
    rows: list[tuple[int, Mapping[str, str]]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise TraceError(path, number, "", f"not JSON ({error})", "give one JSON object a line") from error
            if not isinstance(value, dict):
                raise TraceError(path, number, "", "not a JSON object", "give one JSON object a line")
            rows.append((number, dict(_flat(value))))
    columns = tuple(dict.fromkeys(name for _, row in rows for name in row))
    return Table(path, columns, rows)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{name}/")
        elif isinstance(item, str | int | float) and not isinstance(item, bool):
            yield f"{prefix}{name}", str(item)


def _events(path: Path) -> Table:
    """Scalars of TensorBoard by step. What a restart has written anew replaces what it overtook."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        remedy = "install it: pip install 'longwatch[tensorboard]'"
        raise TraceError(path, 1, "", "the package tensorboard is needed to read event files", remedy) from error
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    steps: dict[int, dict[str, str]] = {}
    for tag in tags["scalars"]:
        for scalar in events.Scalars(tag):
            steps.setdefault(scalar.step, {})[tag] = repr(scalar.value)
    for tag in tags["tensors"]:  # where TensorFlow 2 and newer writers put their scalars
        for event in events.Tensors(tag):
            if len(event.tensor_proto.float_val) == 1:
                steps.setdefault(event.step, {})[tag] = repr(event.tensor_proto.float_val[0])
    names = tuple(dict.fromkeys([*tags["scalars"], *tags["tensors"]]))
    rows = [(number, {**values, "step": str(step)}) for number, (step, values) in enumerate(sorted(steps.items()), 1)]
    return Table(path, ("step", *names), rows)
