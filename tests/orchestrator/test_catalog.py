"""The catalogue and pruning, on checkpoints that were really saved."""

from pathlib import Path

import pytest
import torch

from orchestrator.recovery.catalog import list_checkpoints, read_manifest, verify
from orchestrator.recovery.prune import prune, sweep
from tests.trainer import saving
from trainer.checkpoint import CheckpointError, load_checkpoint
from trainer.contract import fence, verdicts
from trainer.contract.config import StoreConfig
from trainer.contract.manifest import commit_id, data_key, manifest_key
from trainer.contract.store import ObjectMissing, Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store on disk with three commits of epoch 1: steps 0, 10 and 20."""
    opened = open_store(StoreConfig(url="file://./store"), tmp_path, "run-1")
    opened.make_place()
    claim(opened, 1)
    for step in (0, 10, 20):
        save(opened, tmp_path, step, 1)
    return opened


def claim(store: Store, epoch: int, base: str | None = None, ancestry: tuple[str, ...] = ()) -> None:
    """Claim an epoch."""
    body = fence.Fence(
        run_id="run-1", epoch=epoch, nonce=f"{epoch:016d}", host="h", pid=1, base=base, ancestry=ancestry
    )
    fence.claim(store, body)


def save(store: Store, root: Path, step: int, epoch: int) -> str:
    """Save a small state."""
    tensors = {"model.w": torch.full((100,), float(step))}
    return saving.save(store, root / f"e{epoch}", tensors, step, epoch=epoch).manifest.commit


def test_listing(store: Store, tmp_path: Path) -> None:
    """Each commit with its state, pin, size and whether it counts; an abandoned one does not."""
    base = commit_id(10, 1, 1)
    claim(store, 2, base=base, ancestry=(commit_id(0, 1, 1),))
    save(store, tmp_path, 15, 2)
    verdicts.write_verdict(store, base, "good", "healthy")
    verdicts.write_verdict(store, commit_id(20, 1, 1), "bad", "rolled back")
    verdicts.pin(store, commit_id(0, 1, 1), "step 0")
    found = list_checkpoints(store)
    assert [(c.step, c.epoch, c.state, c.pinned, c.in_lineage, c.good) for c in found] == [
        (0, 1, "committed", True, True, True),
        (10, 1, "good", False, True, True),
        (15, 2, "committed", False, True, False),
        (20, 1, "bad", False, False, False),
    ]
    assert all(c.bytes == read_manifest(store, c.id).manifest.bytes > 400 for c in found)


def test_an_intact_commit_verifies(store: Store) -> None:
    """Reading every byte of what was saved finds nothing wrong."""
    found = verify(store, commit_id(10, 1, 1))
    assert (found.ok, found.problems, found.bytes > 400) == (True, (), True)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [("flip", "CRC32C"), ("cut", "bytes instead of"), ("remove", "missing"), ("manifest", "digest")],
)
def test_damage_is_found(store: Store, damage: str, expected: str) -> None:
    """A flipped bit, a cut or missing object and a changed manifest are each named."""
    commit = commit_id(10, 1, 1)
    key = manifest_key(commit) if damage == "manifest" else store.list(f"data/{commit}/")[0].key
    path = store.local_path(key)
    assert path is not None
    raw = path.read_bytes()
    path.unlink()
    if damage in ("flip", "manifest"):
        path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    elif damage == "cut":
        path.write_bytes(raw[:-1])
    found = verify(store, commit)
    assert not found.ok
    assert expected in found.problems[0]


def test_a_commit_that_does_not_exist(store: Store) -> None:
    """Verification says so; reading its manifest raises."""
    assert not verify(store, commit_id(99, 1, 1)).ok
    with pytest.raises(ObjectMissing):
        read_manifest(store, commit_id(99, 1, 1))


def test_pruned_commits_are_gone(store: Store) -> None:
    """Manifest, data and facts of a pruned commit go; the others load as before."""
    gone, kept = commit_id(10, 1, 1), commit_id(20, 1, 1)
    verdicts.write_verdict(store, gone, "good", "healthy")
    size = read_manifest(store, gone).manifest.bytes
    assert prune(store, [gone]) == size
    assert not [item for item in store.list() if gone in item.key]
    with pytest.raises(CheckpointError, match="missing"):
        load_checkpoint(store, gone)
    assert load_checkpoint(store, kept).manifest.step == 20


def test_a_late_pin_holds(store: Store) -> None:
    """A commit that was pinned after the plan was made stays."""
    commit = commit_id(10, 1, 1)
    verdicts.pin(store, commit, "keep")
    assert prune(store, [commit]) == 0
    assert verify(store, commit).ok


def test_sweep_takes_what_no_manifest_names(store: Store) -> None:
    """Leftovers of earlier epochs go; the present epoch's unfinished save, real commits and the base stay."""
    torn, running, base = commit_id(25, 1, 1), commit_id(30, 2, 2), commit_id(28, 1, 1)
    claim(store, 2, base=base)
    for commit in (torn, running, base):
        store.create(data_key(commit, "r0-x.safetensors"), b"12345")
    assert sweep(store, 2) == 5
    left = {item.key.split("/")[1] for item in store.list("data/")}
    assert left == {commit_id(0, 1, 1), commit_id(10, 1, 1), commit_id(20, 1, 1), running, base}
