"""Where the uploader meets the injected faults. With none configured all do nothing.

`steps` and `attempt` of such a fault are those of the checkpoint that is being sent.
"""

from dataclasses import dataclass

from monitors.records import FaultRecord
from trainer.contract.config import FaultConfig, FaultKind
from trainer.contract.paths import RunPaths
from trainer.contract.store import Store
from trainer.faults import storage
from trainer.faults.injector import Fired, Injector, Occasion
from trainer.keeping.tier import LocalTier
from trainer.reporter import Reporter

_BEFORE: tuple[FaultKind, ...] = ("store_error", "torn_write")
_AFTER: tuple[FaultKind, ...] = ("corrupt_checkpoint",)


@dataclass(slots=True)
class _Wrong:
    """What is wrong with the store at the moment."""

    failing: bool = False
    dying: bool = False


class FaultyUploads:
    """Carries out what the injector says is due. `store` is the one to use: the same, or one that can fail."""

    def __init__(self, faults: tuple[FaultConfig, ...], paths: RunPaths, store: Store, reporter: Reporter) -> None:
        self._injector = Injector(faults, paths.fault_counts("uploader"))
        self._local = LocalTier(paths.local_tier).store
        self._sound = store
        self._reporter = reporter
        self._wrong = _Wrong()
        self.store = store
        if self._injector.configured(*_BEFORE):
            backend = storage.FaultyBackend(store.backend, self._wrong)
            self.store = Store(backend, store.url, store.timeout_s)

    def before_upload(self, attempt: int, step: int) -> None:
        """A checkpoint is about to be sent."""
        self._wrong.failing = self._wrong.dying = False
        for fired in self._fire(attempt, step, _BEFORE):
            if fired.fault.kind == "store_error":
                self._wrong.failing = True
            else:
                self._wrong.dying = True

    def after_upload(self, attempt: int, step: int, commit: str) -> None:
        """It is in the store."""
        for _ in self._fire(attempt, step, _AFTER):
            storage.flip_byte_of(self._sound, self._local, commit)

    def _fire(self, attempt: int, step: int, kinds: tuple[FaultKind, ...]) -> list[Fired]:
        found = self._injector.due(Occasion(attempt, step), kinds)
        for fired in found:
            self._reporter.emit(FaultRecord, attempt=attempt, step=step, fault=fired.fault.kind, count=fired.count)
        return found
