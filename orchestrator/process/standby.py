"""The warm process from which attempts are forked: started beside a running trainer, asked, given up at any doubt.

Without it everything works as before, only slower. It holds nothing of the run: its supervisor's end closes its socket,
and it leaves. Times are CLOCK_MONOTONIC seconds.
"""

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

_ANSWERS_WITHIN_S = 5.0  # a fork takes 20 to 30 ms; a machine that needs longer than this starts cold
_MESSAGE_BYTES = 4096
_RESPAWN_AFTER_FORKS = 100
_BACKOFF_S = 60.0  # one that dies is not tried again at once: cold starts do
_LOG = structlog.get_logger(__name__)


@dataclass(slots=True)
class Standby:
    """At most one process. `env` is that of the attempts: libraries read it while they load."""

    env: Mapping[str, str]
    output: Path
    _process: subprocess.Popen[bytes] | None = None
    _channel: socket.socket | None = None
    _ready: bool = False
    _forks: int = 0
    _not_before_s: float = field(default=0.0)

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._process.pid if self._process is not None else None

    def keep(self, now_s: float) -> None:
        """Have one that is fresh. To be called while a trainer runs well, so that warming up delays no start."""
        if self._process is not None and self._process.poll() is not None:
            _LOG.warning("standby_died", code=self._process.returncode)
            self.stop()
            self._not_before_s = now_s + _BACKOFF_S
        if self._forks >= _RESPAWN_AFTER_FORKS:
            self.stop()
        if self._process is None and now_s >= self._not_before_s:
            self._start()

    def is_ready(self) -> bool:
        """Whether it has warmed up."""
        if self._channel is not None and not self._ready:
            self._ready = "ready" in self._answer(0.0)
        return self._ready

    def fork(self, request: Mapping[str, object], descriptors: list[int]) -> int | None:
        """The pid of a new attempt that waits for its release; None if there is none: start it cold."""
        if not self.is_ready() or self._channel is None:
            return None
        try:
            socket.send_fds(self._channel, [json.dumps(request).encode()], descriptors)
            answer = self._answer(_ANSWERS_WITHIN_S)
        except OSError as error:
            answer = {"error": str(error)}
        self._forks += 1
        pid = answer.get("pid")
        if isinstance(pid, int):
            return pid
        _LOG.warning("standby_given_up", answer=answer)
        self.stop()
        return None

    def stop(self) -> None:
        """End it. What it forked is not its child any more."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._channel = None
        self._ready, self._forks = False, 0

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        command = [sys.executable, "-m", "trainer.standby", "--socket", str(theirs.fileno())]
        try:
            self._process = subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except OSError as error:  # a machine that cannot start a process now; attempts will say so if it lasts
            _LOG.warning("standby_not_started", why=str(error))
            ours.close()
            return
        finally:
            theirs.close()
            os.close(output)
        self._channel = ours

    def _answer(self, wait_s: float) -> dict[str, object]:
        assert self._channel is not None
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        if not poller.poll(wait_s * 1000):
            return {}
        try:
            answer = json.loads(self._channel.recv(_MESSAGE_BYTES) or b"{}")
        except (OSError, ValueError) as error:
            return {"error": str(error)}
        return answer if isinstance(answer, dict) else {}
