"""Structured logs of the trainer's processes, one JSON object a line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import structlog


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
            logger_factory=structlog.WriteLoggerFactory(file),
            cache_logger_on_first_use=False,
        )
        try:
            yield
        finally:
            structlog.configure(**before)
