"""Whole checkpoints on a real S3 server."""

from pathlib import Path

import torch

from orchestrator.recovery.catalog import list_checkpoints, verify
from orchestrator.recovery.prune import prune
from tests import s3
from tests.trainer.saving import COMMIT, full_state, save, trained
from trainer.checkpoint import load_checkpoint
from trainer.contract import fence
from trainer.contract.store import open_store


def test_a_checkpoint_on_s3(seaweedfs_server: s3.S3Server, tmp_path: Path) -> None:
    """Saved, listed, verified, loaded to the last bit, and pruned, with one object large enough to go in parts."""
    store = open_store(seaweedfs_server.config(prefix="whole"), tmp_path, "run-1")
    fence.claim(store, fence.Fence(run_id="run-1", epoch=1, nonce="n" * 16, host="h", pid=1))
    tensors = full_state(*trained()) | {"model.large": torch.arange(28 << 20, dtype=torch.float32)}
    assert tensors["model.large"].nbytes > 100 << 20  # s3fs sends parts from 100 MiB on
    save(store, tmp_path, tensors)

    (listed,) = list_checkpoints(store)
    assert (listed.id, listed.in_lineage) == (COMMIT, True)
    assert verify(store, COMMIT).ok
    loaded = load_checkpoint(store, COMMIT)
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors.items())

    assert prune(store, [COMMIT]) == listed.bytes
    assert [item.key for item in store.list()] == ["fence/e1.json"]
    store.close()
