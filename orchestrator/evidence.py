"""The black box of an incident: last records, stacks and the end of the output, kept where nothing overwrites them."""

import os
from collections import deque
from pathlib import Path

from orchestrator.process.causes import output_tail
from trainer.contract.paths import RunPaths

_RECORDS = 200  # DESIGN 5: a ring of the last 200 steps at full detail
_LINE_BYTES = 4096  # about what a step record takes; more is read if they are longer


def capture(paths: RunPaths, attempt: int, incident: int | None) -> Path:
    """Copy what is known of an attempt into `incidents/NNN` (or `incidents/attempt-N` if it has no number yet)."""
    name = f"attempt-{attempt}" if incident is None else f"{incident:03d}"
    where = paths.root / "incidents" / name
    where.mkdir(parents=True, exist_ok=True, mode=0o700)
    (where / f"records-{attempt}.jsonl").write_bytes(_last_lines(paths.records(attempt), _RECORDS))
    (where / f"output-{attempt}.txt").write_text(output_tail(paths.output(attempt)))
    stacks = paths.stacks(attempt)
    if stacks.exists():
        (where / f"stacks-{attempt}.txt").write_bytes(stacks.read_bytes())
    return where


def _last_lines(path: Path, number: int) -> bytes:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            wanted = number * _LINE_BYTES
            while True:
                file.seek(max(0, size - wanted))
                lines = deque(file.read().splitlines(keepends=True), maxlen=number + 1)
                if len(lines) > number or wanted >= size:
                    return b"".join(list(lines)[-number:])
                wanted *= 2
    except FileNotFoundError:
        return b""
