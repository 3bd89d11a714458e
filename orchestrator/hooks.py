"""The user's own command for telling people: run beside the loop, with a time limit, and never the run's undoing."""

import subprocess
import threading
import time
from collections.abc import Sequence

import structlog

_LOG = structlog.get_logger(__name__)
_ERROR_CHARS = 500


class Hooks:
    """Runs commands in threads of their own. What fails is logged; the journal and the metrics have the fact anyway."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    @property
    def outstanding(self) -> int:
        """How many have not come to their end."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        return len(self._threads)

    def start(self, command: Sequence[str], message: bytes, timeout_s: float) -> None:
        """Run `command` (no shell) with `message` on its standard input; after `timeout_s` it is killed."""
        thread = threading.Thread(target=_run, args=(command, message, timeout_s), name="notify-hook", daemon=True)
        thread.start()
        self._threads.append(thread)


def _run(command: Sequence[str], message: bytes, timeout_s: float) -> None:
    begun_s = time.monotonic()
    try:
        done = subprocess.run(command, input=message, capture_output=True, timeout=timeout_s, check=False)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        _LOG.error("notify_hook_failed", program=command[0], error=str(error)[:_ERROR_CHARS])
        return
    seconds = round(time.monotonic() - begun_s, 3)
    if done.returncode:
        said = done.stderr.decode(errors="replace")[-_ERROR_CHARS:]
        _LOG.error("notify_hook_failed", program=command[0], code=done.returncode, said=said, seconds=seconds)
    else:
        _LOG.info("notify_hook_done", program=command[0], seconds=seconds)
