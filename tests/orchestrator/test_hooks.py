"""The user's own command: gets the message, has a time limit, and its failures stay its own."""

import sys
import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from orchestrator.hooks import Hooks


def _finish(hooks: Hooks) -> None:
    deadline_s = time.monotonic() + 30
    while hooks.outstanding and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not hooks.outstanding


def test_the_message_is_on_its_standard_input(tmp_path: Path) -> None:
    """Byte for byte, and no shell reads the arguments."""
    hooks = Hooks()
    target = tmp_path / "told $HOME; x"
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_bytes(sys.stdin.buffer.read())"

    hooks.start([sys.executable, "-c", code, str(target)], b'{"level": "page"}', 30.0)
    _finish(hooks)

    assert target.read_bytes() == b'{"level": "page"}'


@pytest.mark.parametrize(
    ("command", "timeout_s", "said"),
    [
        (["/nowhere/at/all"], 5.0, "No such file"),
        ([sys.executable, "-c", "import sys; sys.exit('no network')"], 30.0, "no network"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], 0.2, "timed out"),
    ],
)
def test_its_failures_are_logged_and_no_more(command: list[str], timeout_s: float, said: str) -> None:
    """A missing program, an error, one that hangs."""
    hooks = Hooks()

    with capture_logs() as logs:
        hooks.start(command, b"{}", timeout_s)
        _finish(hooks)

    (entry,) = logs
    assert entry["event"] == "notify_hook_failed"
    assert said in str(entry)
