"""The node's keepers: saves lie on the local disk and go to the store one after another, whoever lives or dies.

What is passed over while the store lags, and what leaves the disk, is chosen by the uploader's own rules
(`trainer.keeping.tier`), acceptance by the real fence, and the objects in the store are real manifests.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from monitors.records import CommitFailedRecord, CommitRecord
from tests.simulation.clock import Clock
from trainer.contract import fence
from trainer.contract.fence import FenceError, FenceLostError
from trainer.contract.manifest import Manifest, ObjectEntry, crc32c, data_key, manifest_key, parse_commit_id, seal
from trainer.contract.store import Store, StoreError
from trainer.keeping.tier import Inventory, choose_doomed, choose_next

KEEP = 2
_RETRY_MOST_S = 60.0
_TRIES = 4


@dataclass(frozen=True, slots=True)
class Save:
    """A checkpoint as it really is: what it holds, and what it was built on."""

    commit: str
    step: int
    position: int
    parent: str | None
    ready_s: float
    healthy: bool = True

    @property
    def attempt(self) -> int:
        """Whose it is."""
        return parse_commit_id(self.commit).attempt


@dataclass(slots=True)
class Keeper:
    """The local tier and the uploader of one machine. `say` takes the records that they write."""

    clock: Clock
    store: Store
    upload_s: float
    say: Callable[[CommitRecord | CommitFailedRecord], None]
    needed: Callable[[], tuple[str, ...]]
    told: Callable[[str], None]
    waiting: dict[str, Save] = field(default_factory=dict)
    uploaded: dict[str, Save] = field(default_factory=dict)
    seq: int = 0
    _failed: str | None = None
    _wait_s: float = 0.5
    _busy: bool = False

    def on_disk(self, commit: str) -> Save | None:
        """A save that this machine's disk holds."""
        return self.waiting.get(commit) or self.uploaded.get(commit)

    def record(self, save: Save, tier: str) -> CommitRecord:
        """That it exists, on disk or in the store."""
        self.seq += 1
        return CommitRecord.model_validate(
            {"seq": self.seq, "attempt": save.attempt, "at_s": self.clock.wall_s, "tier": tier, "step": save.step,
             "commit": save.commit, "position": save.position, "tokens": save.step, "bytes": 1, "seconds": 1.0}
        )  # fmt: skip

    def take(self, save: Save) -> None:
        """A save is on disk. It is sent when its time has come."""
        self.waiting[save.commit] = save
        if not self._busy:
            self._busy = True
            self.clock.at(max(self.clock.now_s, save.ready_s), self.turn)

    def catch_up(self, saves: Sequence[Save]) -> list[CommitRecord]:
        """Take saves of the past; where they lie by now, if the store was as it is now."""
        records = []
        sendable = not self.waiting and self._accepts(saves)
        for save in saves:
            sent = sendable and save.ready_s <= self.clock.now_s and self._tried(partial(self._put, save))
            if not sent:
                sendable = False
                self.take(save)
            records.append(self.record(save, "store" if sent else "disk"))
        return records

    def _accepts(self, saves: Sequence[Save]) -> bool:
        """Asked once for all saves of one attempt and one moment."""
        return not saves or self._tried(lambda: fence.ensure_accepted(self.store, saves[0].commit))

    def _tried(self, call: Callable[[], object]) -> bool:
        """What is past had time to be tried again."""
        for _ in range(_TRIES):
            with suppress(StoreError, FenceError):
                call()
                return True
        return False

    def turn(self) -> None:
        """Send what is to be sent now, or give up what has to make room."""
        self._busy = False
        inventory = self._inventory()
        commit, passed_over = choose_next(inventory, KEEP, behind=self._failed is not None)
        for other in passed_over:
            self._give_up(other, "passed over: the store is slower than the interval")
        if commit is None:
            return
        save = self.waiting[commit]
        try:
            self.send(save)
            self.say(self.record(save, "store"))
        except FenceLostError as error:
            self._give_up(commit, str(error))
        except (StoreError, FenceError):
            self._failed = commit
            self._wait_s = min(_RETRY_MOST_S, 2 * self._wait_s)
            self._busy = True
            self.clock.after(self._wait_s, self.turn)
            return
        self._failed, self._wait_s = None, 0.5
        if self.waiting:
            self._busy = True
            self.clock.after(self.upload_s, self.turn)

    def send(self, save: Save) -> None:
        """Data, then the manifest, each time asking whether it still counts."""
        fence.ensure_accepted(self.store, save.commit)
        self._put(save, between=lambda: fence.ensure_accepted(self.store, save.commit))

    def _put(self, save: Save, between: Callable[[], None] = lambda: None) -> None:
        body = save.commit.encode()
        entry = ObjectEntry(key=data_key(save.commit, "r0.safetensors"), size=len(body), crc32c=crc32c(body))
        named = parse_commit_id(save.commit)
        manifest = Manifest(
            run_id="sim", commit=save.commit, step=save.step, epoch=named.epoch, attempt=named.attempt,
            tokens=save.step, position=save.position, nonce=f"{save.step:032x}", objects=(entry,), tensors=(),
        )  # fmt: skip
        self.store.create(entry.key, body)
        between()
        self.store.create(manifest_key(save.commit), seal(manifest).raw)
        self.waiting.pop(save.commit, None)
        self.uploaded[save.commit] = save
        self.told(save.commit)
        surplus, _ = choose_doomed(self._inventory(), KEEP)
        for commit in surplus:
            del self.uploaded[commit]

    def _give_up(self, commit: str, why: str) -> None:
        save = self.waiting.pop(commit)
        self.seq += 1
        self.say(
            CommitFailedRecord(
                seq=self.seq, attempt=save.attempt, at_s=self.clock.wall_s, step=save.step, commit=commit, error=why,
                gone=True,
            )
        )  # fmt: skip
        self.turn_later()

    def turn_later(self) -> None:
        """Whatever else waits has its turn."""
        if self.waiting and not self._busy:
            self._busy = True
            self.clock.after(0.0, self.turn)

    def _inventory(self) -> Inventory:
        return Inventory(
            tuple(sorted(self.waiting, key=_age)), tuple(sorted(self.uploaded, key=_age)), None,
            frozenset(self.needed()),
        )  # fmt: skip


def _age(commit: str) -> tuple[int, int]:
    parsed = parse_commit_id(commit)
    return parsed.epoch, parsed.step
