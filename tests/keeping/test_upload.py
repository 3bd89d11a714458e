"""A commit on its way while another writer takes over: the manifest is the last thing that is asked for."""

from pathlib import Path

import pytest

from tests.stores import claimed
from tests.trainer.saving import Saving, full_state, trained
from trainer.contract import fence
from trainer.contract.config import StoreConfig
from trainer.contract.fence import FenceLostError
from trainer.contract.store import open_store
from trainer.keeping.upload import upload


def test_a_writer_that_is_superseded_half_way_does_not_commit(tmp_path: Path) -> None:
    """The data is there, the journal is being sent, and just then somebody else claims the next epoch."""
    store = claimed(open_store(StoreConfig(url=str(tmp_path / "store")), tmp_path, "run-1"))
    other = fence.Fence(run_id="run-1", epoch=2, nonce="o" * 16, host="elsewhere", pid=1)
    with Saving(store, tmp_path / "run") as saving:
        commit = saving.snapshot(full_state(*trained()))
        saving.persist()
        with pytest.raises(FenceLostError):
            upload(saving.tier, store, commit, lambda: None, lambda: fence.claim(store, other))
    assert fence.commits_present(store) == ()
    assert list(store.list(f"data/{commit}/"))
    store.close()
