"""Structured logs of the trainer's processes, one JSON object a line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

import structlog


class _Lines:
    """A file to which a thread that outlives the block may still write: that goes nowhere, and ends no thread."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        """One line, as long as the file is open."""
        with contextlib.suppress(ValueError):
            self._file.write(text)

    def flush(self) -> None:
        """The same."""
        with contextlib.suppress(ValueError):
            self._file.flush()


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Structured log lines into `path` while the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = structlog.get_config()
    with path.open("a", encoding="utf-8") as file:
        structlog.configure(
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
            logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _Lines(file))),
            cache_logger_on_first_use=False,
        )
        try:
            yield
        finally:
            structlog.configure(**before)
