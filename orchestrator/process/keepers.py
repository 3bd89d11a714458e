"""The writer and the uploader of a run: started, watched and started again, independent of any attempt.

They may be killed at any moment, so nothing of them is journaled: a supervisor that takes a run ends those of its
predecessor and starts its own. Times are CLOCK_MONOTONIC seconds.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from orchestrator.errors import ChildLockHeldError
from orchestrator.process.child import kill_leftovers
from orchestrator.process.lock import take_child_lock
from trainer.contract import arena
from trainer.contract.liveness import read_liveness
from trainer.contract.paths import KEEPER_ROLES, KeeperRole, RunPaths

_BACKOFF_FIRST_S = 0.5
_BACKOFF_MOST_S = 60.0
_HEALTHY_S = 300.0  # one that lived so long has its backoff forgiven
_OLD_DIES_WITHIN_S = 10.0
_POLL_S = 0.02
_LOG = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Keeper:
    role: KeeperRole
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    again_s: float | None = None
    backoff_s: float = _BACKOFF_FIRST_S


@dataclass(slots=True)
class Keepers:
    """Both processes of one run. One that is silent for `silence_s` seconds is killed."""

    paths: RunPaths
    env: Mapping[str, str]
    silence_s: float
    _keepers: dict[KeeperRole, _Keeper] = field(default_factory=dict)

    def start(self) -> None:
        """End those of an earlier supervisor, and start both."""
        end_keepers(self.paths)
        for role in KEEPER_ROLES:
            self._keepers[role] = _Keeper(role)
            self._spawn(self._keepers[role])

    def pid(self, role: KeeperRole) -> int | None:
        """The process of a role, while it lives."""
        keeper = self._keepers.get(role)
        return keeper.process.pid if keeper is not None and keeper.process is not None else None

    def watch(self, now_s: float) -> list[KeeperRole]:
        """Reap the dead, kill the silent, start again what is due; returns who was found dead."""
        died = []
        for keeper in self._keepers.values():
            if keeper.process is not None and keeper.process.poll() is not None:
                self._died(keeper, now_s)
                died.append(keeper.role)
            elif keeper.process is not None and self._is_silent(keeper, now_s):
                _LOG.error("keeper_silent", role=keeper.role, pid=keeper.process.pid)
                keeper.process.kill()
            elif keeper.again_s is not None and now_s >= keeper.again_s:
                self._try_spawn(keeper, now_s)
        return died

    def has_pending(self) -> bool:
        """Whether a snapshot is not on disk yet."""
        return arena.has_pending(self.paths.arena)

    def stop(self, patience_s: float) -> None:
        """Have both do what is still to be done, the writer first, and end; kill what takes longer."""
        deadline_s = time.monotonic() + patience_s
        for role in KEEPER_ROLES:
            keeper = self._keepers.pop(role, None)
            if keeper is None or keeper.process is None:
                continue
            while keeper.process.poll() is None and not self._listens(role) and time.monotonic() < deadline_s:
                time.sleep(_POLL_S)
            keeper.process.terminate()
            try:
                keeper.process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                _LOG.warning("keeper_killed", role=role, why=f"not done within {patience_s:.0f} s")
                keeper.process.kill()
                keeper.process.wait()
        if not self.has_pending():
            arena.remove(self.paths.arena)

    def let_go(self) -> None:
        """Leave them alone: a trainer may live, and the next supervisor ends them."""
        self._keepers.clear()

    def _listens(self, role: KeeperRole) -> bool:
        """Whether it has come so far that a wish to leave does not just kill it."""
        return self.paths.keeper_liveness(role).exists()

    def _spawn(self, keeper: _Keeper) -> None:
        keeper.again_s = None
        keeper.started_s = time.monotonic()
        paths, role = self.paths, keeper.role
        paths.keeper_liveness(role).unlink(missing_ok=True)
        command = [sys.executable, "-m", "trainer.keeping", role, "--run-dir", str(paths.root)]
        lock = take_child_lock(paths.keeper_lock(role))
        output = os.open(paths.keeper_output(role), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            keeper.process = subprocess.Popen(
                command,
                env={**os.environ, **_ONE_THREAD, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lock,),
                start_new_session=True,
            )
        finally:
            os.close(output)
            os.close(lock)

    def _try_spawn(self, keeper: _Keeper, now_s: float) -> None:
        """A machine that cannot start a process now may later; a run is not ended for that."""
        try:
            self._spawn(keeper)
        except (OSError, ChildLockHeldError) as error:
            _LOG.error("keeper_not_started", role=keeper.role, why=str(error), again_in_s=keeper.backoff_s)
            self._again(keeper, now_s)

    def _again(self, keeper: _Keeper, now_s: float) -> None:
        keeper.again_s = now_s + keeper.backoff_s
        keeper.backoff_s = min(_BACKOFF_MOST_S, 2 * keeper.backoff_s)

    def _died(self, keeper: _Keeper, now_s: float) -> None:
        assert keeper.process is not None
        _LOG.warning("keeper_died", role=keeper.role, code=keeper.process.returncode, again_in_s=keeper.backoff_s)
        keeper.process = None
        if now_s - keeper.started_s > _HEALTHY_S:
            keeper.backoff_s = _BACKOFF_FIRST_S
        self._again(keeper, now_s)

    def _is_silent(self, keeper: _Keeper, now_s: float) -> bool:
        page = read_liveness(self.paths.keeper_liveness(keeper.role))
        since_s = page.phase_started_s if page is not None else keeper.started_s
        return now_s - since_s > self.silence_s


#: They copy and send; numerical libraries need no threads for that, and training needs the cores.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def end_keepers(paths: RunPaths) -> None:
    """End those of an earlier supervisor.

    Raises:
        ChildLockHeldError: a process cannot be ended.
    """
    for role in KEEPER_ROLES:
        _end_old(paths.keeper_lock(role))


def _end_old(lock: Path) -> None:
    """Kill whoever holds a role's lock.

    Raises:
        ChildLockHeldError: a process cannot be ended.
    """
    deadline_s = time.monotonic() + _OLD_DIES_WITHIN_S
    while True:
        try:
            os.close(take_child_lock(lock))
        except ChildLockHeldError:
            if time.monotonic() > deadline_s:
                raise
            kill_leftovers(lock)
            time.sleep(_POLL_S)
        else:
            return
