"""The writer: puts complete slots of the arena on the local disk and gives them back."""

import errno
from collections.abc import Callable

import structlog

from monitors.records import CommitFailedRecord, CommitRecord
from trainer.checkpointing.errors import NonFiniteStateError
from trainer.checkpointing.layout import SnapshotDescription
from trainer.contract.arena import ArenaError, ArenaReader, Slot
from trainer.contract.manifest import Sealed, commit_id, parse_commit_id
from trainer.contract.paths import RunPaths
from trainer.contract.store import StoreError, StoreFull
from trainer.keeping.persist import SlotLostError, clear, describe, persist, reserve
from trainer.keeping.tier import LocalTier, choose_doomed
from trainer.reporter import Reporter

log = structlog.get_logger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Writer:
    """One turn takes over every slot that is pending. Nothing in it may end the process but its death."""

    def __init__(
        self, paths: RunPaths, reporter: Reporter, beat: Callable[[], None], *, keep: int, clock: Callable[[], float]
    ) -> None:
        """`keep`: how many on the local disk may wait for the store, and how many that are in it stay."""
        self._paths = paths
        self._reporter = reporter
        self._beat = beat
        self._keep = keep
        self._clock = clock
        self._tier = LocalTier(paths.local_tier)
        clear(self._tier)

    def turn(self) -> bool:
        """Take over what is pending, oldest first; returns whether there was anything."""
        try:
            with ArenaReader(self._paths.arena) as arena:
                pending = sorted((slot for slot in arena.slots() if slot.is_pending), key=lambda slot: slot.number)
                for slot in pending:
                    self._take(arena, slot)
                return bool(pending)
        except FileNotFoundError:
            return False  # no attempt has made one yet
        except ArenaError as error:
            log.warning("arena_unusable", why=str(error))
            return False

    def close(self) -> None:
        """Give the reserved space back: whoever writes next reserves its own."""
        clear(self._tier)

    def _take(self, arena: ArenaReader, slot: Slot) -> None:
        begun_s = self._clock()
        try:
            said = describe(arena, slot)
        except (SlotLostError, ValueError) as error:  # damaged, or of another version of this program
            log.error("snapshot_lost", slot=slot.index, number=slot.number, why=str(error))
            arena.release(slot)
            return
        try:
            sealed = self._persist(arena, slot, said)
        except (StoreError, NonFiniteStateError, SlotLostError, OSError, ValueError) as error:
            log.error("snapshot_not_saved", step=said.step, why=str(error))
            commit = commit_id(said.step, said.epoch, said.attempt)
            self._failed(commit, f"{type(error).__name__}: {error}")
        else:
            self._saved(said, sealed, self._clock() - begun_s)
        arena.release(slot)
        self._make_room()
        if not reserve(self._tier, slot.payload_bytes):
            log.warning("no_room_for_the_next_checkpoint", bytes=slot.payload_bytes)

    def _persist(self, arena: ArenaReader, slot: Slot, said: SnapshotDescription) -> Sealed:
        """On a full disk older checkpoints make room; the newest that the store does not have is never given up."""
        while True:
            try:
                return persist(arena, slot, said, self._tier, self._beat)
            except (StoreFull, OSError) as error:
                full = isinstance(error, StoreFull) or error.errno in _FULL
                if not full or not self._spare_one():
                    raise

    def _spare_one(self) -> bool:
        inventory = self._tier.inventory()
        if inventory.uploaded:
            self._tier.forget(inventory.uploaded[0])
            return True
        if not inventory.spare:
            return False
        self._pass_over(inventory.spare[0], "the local disk is full")
        return True

    def _make_room(self) -> None:
        surplus, passed_over = choose_doomed(self._tier.inventory(), self._keep)
        for commit in surplus:
            self._tier.forget(commit)
        if passed_over is not None:
            self._pass_over(passed_over, "the store is slower than the interval, so it gets fewer checkpoints")

    def _pass_over(self, commit: str, why: str) -> None:
        log.warning("checkpoint_passed_over", commit=commit, why=why)
        self._failed(commit, f"passed over on its way to the store: {why}")
        self._tier.forget(commit)

    def _saved(self, said: SnapshotDescription, sealed: Sealed, seconds: float) -> None:
        log.info("saved", commit=sealed.manifest.commit, seconds=seconds)
        self._reporter.emit(
            CommitRecord,
            tier="disk",
            attempt=said.attempt,
            step=said.step,
            commit=sealed.manifest.commit,
            position=said.position,
            tokens=said.tokens,
            bytes=sealed.manifest.bytes,
            seconds=seconds,
        )

    def _failed(self, commit: str, error: str) -> None:
        parsed = parse_commit_id(commit)
        self._reporter.emit(
            CommitFailedRecord, attempt=parsed.attempt, step=parsed.step, commit=commit, error=error, gone=True
        )
