"""What checkpoints there are, as the store tells it: commits, their facts, their place in the lineage. Torch-free.

Listing opens nothing (five listings, whatever the number of commits); `verify` reads every byte of one commit.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.recovery.retention import Checkpoint
from trainer.contract import fence, verdicts
from trainer.contract.manifest import (
    Manifest,
    ManifestError,
    ObjectEntry,
    Sealed,
    commit_in,
    crc32c,
    manifest_key,
    parse_commit_id,
    unseal,
)
from trainer.contract.store import ObjectMissing, Store

__all__ = ["Checkpoint", "Verification", "list_checkpoints", "read_manifest", "verify", "with_local"]

_DATA = "data/"


@dataclass(frozen=True, slots=True)
class Verification:
    """What reading every byte of a commit showed; no problems means that it is what was saved."""

    commit: str
    bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def list_checkpoints(store: Store, times_s: Mapping[str, float] | None = None) -> list[Checkpoint]:
    """Every commit in the store, oldest step first; those of abandoned branches have `in_lineage` false.

    Args:
        store: the run's.
        times_s: when each was committed, as the journal knows it; the store's own clock is not asked.

    Raises:
        StoreError: the store cannot be asked.
        FenceError: the newest fence is damaged.
    """
    present = fence.commits_present(store)
    current = set(fence.lineage(store).commits)
    facts = verdicts.read_verdicts(store)
    sizes, at_s = _sizes(store), times_s or {}
    return [_entry(name, facts.of(name), name in current, sizes[name], at_s.get(name)) for name in present]


def with_local(
    found: list[Checkpoint], store: Store, local: Store, times_s: Mapping[str, float] | None = None
) -> list[Checkpoint]:
    """The same with what lies on the node's own disk: also there, or only there, on its way to the store.

    Raises:
        StoreError: the store cannot be asked.
        FenceError: the newest fence is damaged.
    """
    on_disk = fence.commits_present(local)
    known = {checkpoint.id for checkpoint in found}
    sizes = _sizes(local)
    epoch = fence.current_epoch(store)
    lineage = fence.select_lineage(fence.read_fence(store, epoch), on_disk) if epoch is not None else ()
    both = [replace(one, where=("disk", "store")) if one.id in on_disk else one for one in found]
    waiting = [
        replace(
            _entry(name, verdicts.Standing(), name in lineage, sizes[name], (times_s or {}).get(name)), where=("disk",)
        )
        for name in on_disk
        if name not in known
    ]
    return sorted([*both, *waiting], key=lambda checkpoint: parse_commit_id(checkpoint.id))


def _sizes(store: Store) -> Mapping[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for item in store.list(_DATA):
        commit = commit_in(item.key)
        if commit is not None:
            sizes[commit] += item.bytes
    return sizes


def read_manifest(store: Store, commit: str) -> Sealed:
    """The manifest of a commit, checked against its digest.

    Raises:
        ManifestError: it is damaged, or another commit's.
        ObjectMissing: there is no such commit.
    """
    sealed = unseal(store.read(manifest_key(commit)))
    if sealed.manifest.commit != commit:
        raise ManifestError(f"the manifest of {commit} is that of {sealed.manifest.commit}")
    return sealed


def verify(store: Store, commit: str) -> Verification:
    """Read a commit whole: manifest digest, size and CRC32C of every object. All problems, not only the first.

    What a first reading finds wrong is read again: a bad transfer is no damage.

    Raises:
        StoreError: the store cannot be asked; that says nothing about the commit.
    """
    first = _verify(store, commit)
    return first if first.ok else _verify(store, commit)


def _verify(store: Store, commit: str) -> Verification:
    try:
        manifest: Manifest = read_manifest(store, commit).manifest
    except ObjectMissing:
        return Verification(commit, 0, ("there is no manifest, so there is no such checkpoint",))
    except ManifestError as error:
        return Verification(commit, 0, (str(error),))
    found = (_object_problem(store, entry) for entry in manifest.objects)
    return Verification(commit, manifest.bytes, tuple(problem for problem in found if problem))


def _object_problem(store: Store, entry: ObjectEntry) -> str | None:
    try:
        size = store.size(entry.key)
        if size != entry.size:
            return f"{entry.key} has {size} bytes instead of {entry.size}"
        crc = 0
        for chunk in store.stream(entry.key, size):
            crc = crc32c(chunk, crc)
    except ObjectMissing:
        return f"{entry.key} is missing"
    return None if crc == entry.crc32c else f"{entry.key} does not match its CRC32C: it was changed after the save"


def _entry(
    commit: str, standing: verdicts.Standing, in_lineage: bool, size: int, committed_at_s: float | None
) -> Checkpoint:
    named = parse_commit_id(commit)
    return Checkpoint(
        id=commit,
        step=named.step,
        epoch=named.epoch,
        attempt=named.attempt,
        state=standing.state,
        verified=standing.verified,
        pinned=standing.pinned,
        in_lineage=in_lineage,
        bytes=size,
        committed_at_s=committed_at_s,
    )
