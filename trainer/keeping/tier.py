"""Checkpoints on the node's own disk: laid out like the store, plus what has become of each on its way there."""

import json
from dataclasses import dataclass
from pathlib import Path

from trainer.contract import fence
from trainer.contract.backends import LocalBackend
from trainer.contract.manifest import Sealed, crc32c, manifest_key, parse_commit_id, unseal
from trainer.contract.paths import NEEDED
from trainer.contract.store import ObjectExists, ObjectMissing, Store

_UPLOADED = "uploaded/"
_UPLOADING = "uploading/"


class LocalDamageError(Exception):
    """A checkpoint on the local disk is not what was written there."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """What lies on the local disk, oldest first; a newer fence epoch is newer whatever its step."""

    waiting: tuple[str, ...]
    uploaded: tuple[str, ...]
    uploading: str | None
    needed: frozenset[str] = frozenset()

    @property
    def spare(self) -> tuple[str, ...]:
        """Those waiting that may be passed over: not the newest, nor what a recovery of this moment would load."""
        return tuple(commit for commit in self.waiting[:-1] if commit not in self.needed and commit != self.uploading)


class LocalTier:
    """The local disk of one run. Used by the writer, the uploader and the loader at the same time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store(LocalBackend(root), f"file://{root}", 3600.0)
        self.store.make_place()

    @property
    def scratch(self) -> Path:
        """Where files lie while they are written; the writer process alone uses it."""
        return self.root / "scratch"

    def inventory(self) -> Inventory:
        """What is there now."""
        commits = sorted(fence.commits_present(self.store), key=_age)
        uploaded = {_commit_of(item.key) for item in self.store.list(_UPLOADED)}
        uploading = [_commit_of(item.key) for item in self.store.list(_UPLOADING)]
        return Inventory(
            tuple(commit for commit in commits if commit not in uploaded),
            tuple(commit for commit in commits if commit in uploaded),
            uploading[0] if uploading else None,
            self._needed(),
        )

    def _needed(self) -> frozenset[str]:
        """What the supervisor has said last; nothing, as long as it has said nothing."""
        try:
            return frozenset(json.loads((self.root / NEEDED).read_bytes()))
        except (FileNotFoundError, ValueError):
            return frozenset()

    def manifest(self, commit: str) -> Sealed:
        """The manifest of a commit.

        Raises:
            ObjectMissing: it is not here.
            ManifestError: it is damaged.
        """
        return unseal(self.store.read(manifest_key(commit)))

    def verify(self, sealed: Sealed) -> None:
        """Read every object.

        Raises:
            LocalDamageError: one of them is missing, or not what was written.
        """
        for entry in sealed.manifest.objects:
            crc = 0
            try:
                for chunk in self.store.stream(entry.key, entry.size):
                    crc = crc32c(chunk, crc)
            except ObjectMissing as error:
                raise LocalDamageError(f"{entry.key} is missing on the local disk") from error
            if crc != entry.crc32c:
                raise LocalDamageError(f"{entry.key} was changed on the local disk")

    def path(self, key: str) -> Path:
        """The file of an object."""
        return self.root / key

    def begin_upload(self, commit: str) -> None:
        """Say which commit is on its way, so that nobody makes room by removing it."""
        self.end_upload()
        self.store.create(f"{_UPLOADING}{commit}.json", b"{}")

    def end_upload(self) -> None:
        """None is on its way."""
        for item in self.store.list(_UPLOADING):
            self.store.delete(item.key)

    def mark_uploaded(self, commit: str) -> None:
        """The store has it."""
        try:
            self.store.create(f"{_UPLOADED}{commit}.json", b"{}")
        except ObjectExists:
            return

    def forget(self, commit: str) -> None:
        """Remove a commit, manifest first; one that is not there is no error."""
        self.store.delete(manifest_key(commit))
        for item in self.store.list(f"data/{commit}/"):
            self.store.delete(item.key)
        self.store.delete(f"{_UPLOADED}{commit}.json")


def choose_next(inventory: Inventory, keep: int, *, behind: bool) -> tuple[str | None, tuple[str, ...]]:
    """What to upload next, and what is passed over for it. Pure.

    In order, as long as the store keeps up; the newest first when the last try failed (`behind`). Once more than `keep`
    wait, all but the newest are given up, save what a recovery needs: the interval at which the store gets checkpoints
    widens, that of the local disk does not.
    """
    waiting = inventory.waiting
    if not waiting:
        return None, ()
    if len(waiting) > keep:
        return waiting[-1], inventory.spare
    return (waiting[-1] if behind else waiting[0]), ()


def choose_doomed(inventory: Inventory, keep: int) -> tuple[tuple[str, ...], str | None]:
    """What leaves the local disk: uploaded ones beyond the newest few; and, if too many wait, which is passed over.

    Pure. Neither the one that is being uploaded, nor the newest that waits, nor what a recovery of this moment would
    load is ever passed over.
    """
    surplus = inventory.uploaded[: max(0, len(inventory.uploaded) - keep)]
    waiting = [commit for commit in inventory.waiting if commit != inventory.uploading]
    return surplus, (inventory.spare[0] if len(waiting) > keep and inventory.spare else None)


def _age(commit: str) -> tuple[int, int]:
    parsed = parse_commit_id(commit)
    return parsed.epoch, parsed.step


def _commit_of(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".json")
