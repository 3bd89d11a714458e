"""The uploader: sends checkpoints from the local disk to the store, in order as long as the store keeps up."""

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import structlog

from monitors.records import CommitFailedRecord, CommitRecord
from trainer.contract.fence import FenceError, FenceLostError
from trainer.contract.manifest import ManifestError, Sealed, parse_commit_id
from trainer.contract.paths import RunPaths
from trainer.contract.store import Store, StoreDenied, StoreError
from trainer.keeping.tier import LocalDamageError, LocalTier, choose_doomed, choose_next
from trainer.keeping.upload import upload
from trainer.reporter import Reporter

log = structlog.get_logger(__name__)

_RETRY_FIRST_S = 0.5
_RETRY_MOST_S = 60.0


class UploadFaults(Protocol):
    """Injected faults, for drills and tests."""

    def before_upload(self, attempt: int, step: int) -> None:
        """A checkpoint is about to be sent."""

    def after_upload(self, attempt: int, step: int, commit: str) -> None:
        """It is in the store."""


class Uploader:
    """One turn sends one checkpoint, or finds that there is none to send now."""

    def __init__(
        self, paths: RunPaths, store: Store, reporter: Reporter, beat: Callable[[], None], faults: UploadFaults,
        ship: Callable[[], object], *, keep: int, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._store = store
        self._reporter = reporter
        self._beat = beat
        self._faults = faults
        self._ship = ship
        self._keep = keep
        self._clock = clock
        self._tier = LocalTier(paths.local_tier)
        self._tier.end_upload()  # of a killed one
        self._tidied = False
        self._not_before_s = 0.0
        self._wait_s = _RETRY_FIRST_S
        self._told: str | None = None
        self._newest_failed: str | None = None

    def turn(self) -> bool:
        """Send what is due; returns whether anything was tried."""
        inventory = self._tier.inventory()
        newest = inventory.waiting[-1] if inventory.waiting else None
        if self._clock() < self._not_before_s and newest == self._newest_failed:
            return False  # but a new one is a reason to look whether the store is back
        commit, passed_over = choose_next(inventory, self._keep, behind=self._newest_failed is not None)
        for other in passed_over:
            self._give_up(other, "passed over: the store is slower than the interval, so it gets fewer checkpoints")
        if commit is None:
            return False
        with suppress(StoreError):  # a full disk takes no mark; the upload is what will make room
            self._tier.begin_upload(commit)
        try:
            self._send(commit)
        finally:
            self._tier.end_upload()
        return True

    def _send(self, commit: str) -> None:
        begun_s = self._clock()
        parsed = parse_commit_id(commit)
        try:
            self._tidy_once()
            self._faults.before_upload(parsed.attempt, parsed.step)
            sealed = upload(self._tier, self._store, commit, self._beat, self._ship)
        except FenceLostError as error:
            self._give_up(commit, str(error), superseded=True)
        except (ManifestError, LocalDamageError) as error:
            self._give_up(commit, f"damaged before it was sent: {error}")
        except (StoreError, FenceError) as error:
            self._try_again(commit, error)
        else:
            self._sent(sealed, self._clock() - begun_s)
            self._faults.after_upload(parsed.attempt, parsed.step, commit)

    def _tidy_once(self) -> None:
        """What a killed uploader left unfinished in the store takes space there and is never seen."""
        if self._tidied:
            return
        try:
            aborted = self._store.abort_unfinished("data/")
        except (
            StoreDenied
        ) as error:  # housekeeping only: uploads need not wait for a permission that they can do without
            aborted = 0
            log.warning("unfinished_uploads_left", why=str(error))
        self._tidied = True
        if aborted:
            log.info("unfinished_uploads_aborted", count=aborted)

    def _sent(self, sealed: Sealed, seconds: float) -> None:
        """Said before it is marked: killed in between, it is found in the store and said again, which harms nobody."""
        manifest = sealed.manifest
        self._wait_s, self._told, self._newest_failed = _RETRY_FIRST_S, None, None
        log.info("uploaded", commit=manifest.commit, seconds=seconds)
        self._reporter.emit(
            CommitRecord,
            tier="store",
            attempt=manifest.attempt,
            step=manifest.step,
            commit=manifest.commit,
            position=manifest.position,
            tokens=manifest.tokens,
            bytes=manifest.bytes,
            seconds=seconds,
        )
        try:
            self._tier.mark_uploaded(manifest.commit)
        except StoreError as error:
            log.warning("local_copy_dropped", commit=manifest.commit, why=str(error))
            self._tier.forget(manifest.commit)
        surplus, _ = choose_doomed(self._tier.inventory(), self._keep)
        for commit in surplus:
            self._tier.forget(commit)

    def _try_again(self, commit: str, error: Exception) -> None:
        """Ever more rarely; said once for each checkpoint."""
        log.warning("upload_failed", commit=commit, why=str(error), again_in_s=self._wait_s)
        if self._told != commit:
            self._told = commit
            self._failed(commit, str(error))
        self._newest_failed = next(iter(self._tier.inventory().waiting[::-1]), commit)
        self._not_before_s = self._clock() + self._wait_s
        self._wait_s = min(_RETRY_MOST_S, 2 * self._wait_s)

    def _give_up(self, commit: str, why: str, *, superseded: bool = False) -> None:
        log.warning("checkpoint_given_up", commit=commit, why=why)
        self._failed(commit, why, gone=True, superseded=superseded)
        self._tier.forget(commit)

    def _failed(self, commit: str, why: str, *, gone: bool = False, superseded: bool = False) -> None:
        parsed = parse_commit_id(commit)
        self._reporter.emit(
            CommitFailedRecord,
            attempt=parsed.attempt,
            step=parsed.step,
            commit=commit,
            error=why,
            gone=gone,
            superseded=superseded,
        )
