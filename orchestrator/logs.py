"""The supervisor's own log: one JSON object a line in the run directory. Never on the terminal, which is for people."""

from io import TextIOWrapper
from pathlib import Path
from typing import TextIO, cast

import structlog

_LOG_FILE = "supervisor.jsonl"


class _Forgiving:
    """A file whose writes may fail: a full disk costs log lines, not the run."""

    def __init__(self, file: TextIOWrapper) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Write what can be written."""
        try:
            return self._file.write(text)
        except OSError:
            return 0

    def flush(self) -> None:
        """Hand it to the system, if it takes it."""
        try:
            self._file.flush()
        except OSError:
            return


def log_to(directory: Path) -> None:
    """Send every structlog event of this process to `directory`/supervisor.jsonl."""
    file = (directory / _LOG_FILE).open("a", encoding="utf-8")
    (directory / _LOG_FILE).chmod(0o600)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, _Forgiving(file))),  # only these two are called
        cache_logger_on_first_use=False,
    )
