"""Stores as a run finds them: the place made, the epoch claimed."""

from trainer.contract import fence
from trainer.contract.store import Store


def claimed(store: Store, epoch: int = 1, ancestry: tuple[str, ...] = ()) -> Store:
    """The same store with its place made and the epoch claimed, unless it or a later one is already."""
    store.make_place()
    if (fence.current_epoch(store) or -1) < epoch:
        body = fence.Fence(run_id="run-1", epoch=epoch, nonce=f"{epoch:016d}", host="h", pid=1, ancestry=ancestry)
        fence.claim(store, body)
    return store
