"""The logs of a run's processes as one stream in the order of time: what the supervisor, trainers and keepers wrote.

Structured logs carry the time of each line. Plain output (prints, tracebacks) does not: it has the time at which its
file was last written, or, while it is followed, at which it was seen.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from monitors.tail import Tail
from trainer.contract.paths import RunPaths

LEVELS = ("debug", "info", "warning", "error", "critical")
_STANDARD = ("timestamp", "level", "event", "exception")


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line. `at` is ISO 8601 in UTC, which sorts as text."""

    at: str
    source: str
    level: str
    text: str
    fields: dict[str, Any]

    def plain(self) -> str:
        """For people and grep: time, source, level, event, fields."""
        fields = "".join(f" {name}={_shown(value)}" for name, value in self.fields.items())
        return f"{self.at[:23].replace('T', ' ')} {self.source:<11} {self.level:<8} {self.text}{fields}"


class LogReader:
    """Reads every log of a run on from where it was read last; new files are found as they appear."""

    def __init__(self, paths: RunPaths, level: str = "debug", source: str | None = None) -> None:
        self._directory = paths.root / "logs"
        self._least = LEVELS.index(level)
        self._source = source
        self._tails: dict[Path, Tail] = {}

    def poll(self, now: datetime | None = None) -> list[LogLine]:
        """What is new, by time. `now` is the time of plain output; None: when its file was last written."""
        lines: list[LogLine] = []
        for path in sorted(self._directory.glob("*")):
            if path.suffix in (".jsonl", ".out") and self._source in (None, path.stem):
                tail = self._tails.setdefault(path, Tail(path, 0))
                while found := tail.poll():
                    lines += [line for raw in found for line in self._read(path, raw, now)]
        return sorted(lines, key=lambda line: line.at)

    def _read(self, path: Path, raw: bytes, now: datetime | None) -> Iterator[LogLine]:
        text = raw.decode(errors="replace").rstrip()
        line = _structured(path.stem, text) if path.suffix == ".jsonl" else None
        if line is None and text:
            written = now or datetime.fromtimestamp(path.stat().st_mtime, UTC)
            line = LogLine(written.strftime("%Y-%m-%dT%H:%M:%S.%fZ"), path.stem, "info", text, {})
        if line is not None and _rank(line.level) >= self._least:
            yield line


def _structured(source: str, text: str) -> LogLine | None:
    try:
        row = json.loads(text)
        fields = {name: value for name, value in row.items() if name not in _STANDARD}
        said = str(row["event"]) + (f"\n{row['exception']}" if "exception" in row else "")
        return LogLine(str(row["timestamp"]), source, str(row.get("level", "info")), said, fields)
    except (ValueError, KeyError, AttributeError):
        return None


def _rank(level: str) -> int:
    return LEVELS.index(level) if level in LEVELS else LEVELS.index("info")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return json.dumps(text) if " " in text else text
