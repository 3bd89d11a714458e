"""How checkpoints go: the manifest first, then the facts, then the data. Which ones is decided in `retention`.

Only the holder of the newest epoch may call these.
"""

from collections.abc import Iterable

from trainer.contract import fence, verdicts
from trainer.contract.manifest import commit_in, manifest_key, parse_commit_id
from trainer.contract.store import Store


def prune(store: Store, commits: Iterable[str]) -> int:
    """Delete commits; returns the bytes freed.

    The manifest goes first, so that there is no moment at which a checkpoint exists without its data. A commit that
    was pinned after the plan was made stays. Calling again after a failure goes on where it stopped (see `sweep`).
    """
    freed = 0
    for commit in commits:
        if verdicts.is_pinned(store, commit):
            continue
        store.delete(manifest_key(commit))
        freed += _delete_rest(store, commit)
    return freed


def sweep(store: Store, epoch: int) -> int:
    """Delete data of earlier epochs that has no manifest: saves that never came to their end, half-done prunes.

    What the fence of `epoch` builds on is left alone, even if its manifest has not been seen. Returns bytes freed.
    """
    base = fence.read_fence(store, epoch)
    known = {*fence.commits_present(store), *base.ancestry, base.base}
    orphans = {name for item in store.list("data/") if (name := commit_in(item.key)) is not None} - known
    return sum(_delete_rest(store, commit) for commit in sorted(orphans) if parse_commit_id(commit).epoch < epoch)


def _delete_rest(store: Store, commit: str) -> int:
    """The data goes last: as long as some of it is there, a sweep finds what else is left."""
    for key in verdicts.facts_keys(commit):
        store.delete(key)
    freed = 0
    for item in store.list(f"data/{commit}/"):
        store.delete(item.key)
        freed += item.bytes
    return freed
