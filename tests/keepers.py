"""The writer and the uploader of a run as threads, for attempts that no supervisor watches."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from trainer.contract import arena
from trainer.contract.config import RunConfig
from trainer.contract.paths import KEEPER_ROLES, KeeperRole, RunPaths
from trainer.keeping.__main__ import open_desk, serve

_ENDS_WITHIN_S = 60.0


@contextmanager
def keepers(paths: RunPaths, config: RunConfig, *, keep_arena: bool = False) -> Iterator[None]:
    """Both are there while the block runs; at its end they do what is still to be done, as for a supervisor."""
    running = [_Running(role, paths, config) for role in KEEPER_ROLES]
    try:
        yield
    finally:
        for one in running:
            one.stop()
        if not keep_arena and not arena.has_pending(paths.arena):
            arena.remove(paths.arena)


class _Running:
    def __init__(self, role: KeeperRole, paths: RunPaths, config: RunConfig) -> None:
        self._asked = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(role, paths, config), name=role)
        self._thread.start()

    def _run(self, role: KeeperRole, paths: RunPaths, config: RunConfig) -> None:
        with ExitStack() as stack:
            turn: Callable[[], bool] = open_desk(role, paths, config, lambda: None, stack)
            serve(turn, self._asked.is_set, lambda: False, lambda: None, orphan_s=_ENDS_WITHIN_S)

    def stop(self) -> None:
        self._asked.set()
        self._thread.join(_ENDS_WITHIN_S)
        assert not self._thread.is_alive(), "a keeper did not end"
