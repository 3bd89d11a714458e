"""From the local disk to the store: data objects, their sizes as the store sees them, the fence, the manifest last."""

from collections.abc import Callable

from trainer.contract import fence
from trainer.contract.manifest import Sealed, manifest_key
from trainer.contract.store import ObjectMissing, Store, StoreUnavailable
from trainer.keeping.tier import LocalTier


def upload(tier: LocalTier, store: Store, commit: str, beat: Callable[[], None], ship: Callable[[], object]) -> Sealed:
    """Send one commit. Doing it again after a death or a lost answer sends only what is missing.

    `ship` sends what the journal says of the steps up to it: a commit should not be known before its history is.

    Raises:
        FenceLostError: the store goes on without this commit: a rollback went behind it, or another writer has taken
            over.
        ManifestError: the local copy's manifest is damaged.
        LocalDamageError: the local copy is damaged, so it must not be sent.
        StoreError: the store fails; nothing that is half there counts.
    """
    sealed = tier.manifest(commit)
    if _is_there(store, commit, sealed):
        return sealed
    fence.ensure_accepted(store, commit)
    tier.verify(sealed)
    for entry in sealed.manifest.objects:
        beat()
        store.put_file(entry.key, tier.path(entry.key))
        stored = store.size(entry.key)
        if stored != entry.size:
            why = f"it holds {stored} bytes of the {entry.size} written"
            raise StoreUnavailable(store.url, why, entry.key)
    beat()
    ship()
    fence.ensure_accepted(store, commit)
    store.create(manifest_key(commit), sealed.raw)
    return sealed


def _is_there(store: Store, commit: str, sealed: Sealed) -> bool:
    """An earlier try may have come to its end without living to see it."""
    try:
        return store.read(manifest_key(commit)) == sealed.raw
    except ObjectMissing:
        return False
