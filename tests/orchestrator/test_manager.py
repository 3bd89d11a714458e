"""What a service manager hears of a supervisor, and what its protection means for a trainer."""

import socket
import threading
from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.policy.events import AttemptSpawned
from orchestrator.process.manager import ServiceManager
from orchestrator.supervisor import Update
from tests.orchestrator.restarting import SmallRun


class _Manager:
    """Reads what is said as it comes: the socket holds but ten messages."""

    def __init__(self, address: Path) -> None:
        self.said: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(address))
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while message := self._socket.recv(4096):
            self.said.append(message.decode())

    def close(self) -> None:
        """An empty message is nobody else's."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()


def test_a_supervisor_is_ready_turns_and_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order, the loop's turns with the state that `systemctl status` shows."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with closing(_Manager(tmp_path / "notify")) as manager:
        assert SmallRun(tmp_path / "small", {"steps": 30, "step_s": 0.02}).supervise() == 0
    said = manager.said
    assert said[0] == "READY=1"
    assert said[-1].startswith("STOPPING=1\nWATCHDOG_USEC=")
    assert len(said) > 3
    assert all(one.startswith("WATCHDOG=1\nSTATUS=") and " of " in one for one in said[1:-1])


def test_nobody_listens(tmp_path: Path) -> None:
    """Neither no manager nor one that is gone is an error; an abstract address is one too."""
    for environment in ({}, {"NOTIFY_SOCKET": str(tmp_path / "gone")}, {"NOTIFY_SOCKET": "@longwatch-nobody"}):
        with ServiceManager(environment) as manager:
            manager.ready()
            manager.alive("running")
            manager.leaving()


def test_a_trainer_is_not_protected_from_the_oom_killer(tmp_path: Path) -> None:
    """Its supervisor is, by its unit; of the two it must be the trainer that goes."""
    own = Path("/proc/self/oom_score_adj")
    before = own.read_text()
    try:
        own.write_text("-100")
    except PermissionError:
        pytest.skip("this process may not protect itself (CAP_SYS_RESOURCE)")
    seen: list[str] = []

    def note(update: Update) -> None:
        for folded in update.folded:
            if isinstance(folded.event, AttemptSpawned):
                seen.append(Path(f"/proc/{folded.event.pid}/oom_score_adj").read_text().strip())

    try:
        assert SmallRun(tmp_path / "small", {"steps": 100}).supervise(note) == 0
    finally:
        own.write_text(before)
    assert seen == ["0"]
