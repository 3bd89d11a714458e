"""Loading verifies everything: no damage goes unnoticed, no contradiction passes, and silence condemns nothing."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.stores import claimed
from tests.trainer.saving import COMMIT, STEP, full_state, save, trained
from trainer.checkpoint import CheckpointError, load_checkpoint
from trainer.contract.backends import LocalBackend
from trainer.contract.config import StoreConfig
from trainer.contract.fence import FENCES
from trainer.contract.manifest import Manifest, commit_id, manifest_key, seal, unseal
from trainer.contract.store import Store, StoreUnavailable, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store on disk."""
    return claimed(open_store(StoreConfig(url="file://./store"), tmp_path, "run-1"))


def test_an_unreachable_store_condemns_nothing(store: Store, tmp_path: Path) -> None:
    """Loading from a store that does not answer is the store's error, not the checkpoint's."""
    save(store, tmp_path, {"model.w": torch.ones(1)})

    class Silent(LocalBackend):
        """Lists and sizes, but does not send."""

        def read(self, key: str, start: int, end: int | None, timeout_s: float) -> bytes:
            """Never answers."""
            raise TimeoutError("silent server")

    with pytest.raises(StoreUnavailable):
        load_checkpoint(Store(Silent(tmp_path / "store/run-1"), "test://", 1.0), COMMIT)


def test_no_damage_goes_unnoticed(store: Store, tmp_path: Path) -> None:
    """In each object and the manifest: bit flips at many offsets, truncations, an empty file, a missing one."""
    model, optimizer = trained()
    save(store, tmp_path, full_state(model, optimizer), extra={"rng": [1]})
    chance = random.Random(7)
    keys = [item.key for item in store.list() if not item.key.startswith(FENCES)]
    assert len(keys) == 5
    for key in keys:
        raw = store.read(key)
        offsets = {0, 7, 8, len(raw) - 1, *(chance.randrange(len(raw)) for _ in range(40))}
        damaged: list[bytes | None] = [_flipped(raw, offset, chance.randrange(8)) for offset in sorted(offsets)]
        damaged += [raw[:-1], raw[: len(raw) // 2], raw + b"\0", b"", None]
        for bad in damaged:
            path = store.local_path(key)
            assert path is not None
            path.unlink()
            if bad is not None:
                path.write_bytes(bad)
            with pytest.raises(CheckpointError) as caught:
                load_checkpoint(store, COMMIT)
            assert caught.value.commit == COMMIT
            path.write_bytes(raw)
    assert load_checkpoint(store, COMMIT).manifest.step == STEP


def _flipped(raw: bytes, offset: int, bit: int) -> bytes:
    return raw[:offset] + bytes([raw[offset] ^ (1 << bit)]) + raw[offset + 1 :]


def test_a_manifest_under_another_name(store: Store, tmp_path: Path) -> None:
    """A manifest that was copied to another commit's name is not that commit."""
    save(store, tmp_path, {"model.w": torch.ones(1)})
    other = commit_id(STEP + 1, 1, 1)
    store.create(manifest_key(other), store.read(manifest_key(COMMIT)))
    with pytest.raises(CheckpointError, match=COMMIT):
        load_checkpoint(store, other)


def rewritten(store: Store, change: Callable[[Manifest], Manifest]) -> None:
    """Replace the manifest by one that is intact but says something else."""
    manifest = unseal(store.read(manifest_key(COMMIT))).manifest
    store.delete(manifest_key(COMMIT))
    store.create(manifest_key(COMMIT), seal(change(manifest)).raw)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [("dtype", "float64", "its index says float64"), ("shape", (9, 9), r"its index says"), ("norm", 1.0, "has norm")],
)
def test_the_index_must_be_met(store: Store, tmp_path: Path, field: str, value: object, expected: str) -> None:
    """A dtype, shape or norm other than the manifest's condemns the commit, though every byte is as saved."""
    model, optimizer = trained()
    save(store, tmp_path, full_state(model, optimizer))

    def change(manifest: Manifest) -> Manifest:
        first = manifest.tensors[0].model_copy(update={field: value})
        return manifest.model_copy(update={"tensors": (first, *manifest.tensors[1:])})

    rewritten(store, change)
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(store, COMMIT)


def test_a_tensor_missing_from_the_index(store: Store, tmp_path: Path) -> None:
    """Data that the index does not know is no complete checkpoint."""
    save(store, tmp_path, {"model.a": torch.ones(1), "model.b": torch.ones(1)})
    rewritten(store, lambda manifest: manifest.model_copy(update={"tensors": manifest.tensors[:1]}))
    with pytest.raises(CheckpointError, match="differ in"):
        load_checkpoint(store, COMMIT)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"step": STEP + 1}, "step is 3 in the manifest, 4 in the state"),
        ({"tokens": 47}, "tokens is 48"),
        ({"position": 7}, "position is 6"),
        ({"skipped_updates": 1}, "the state has seen 2 updates"),
    ],
)
def test_counters_must_agree(store: Store, tmp_path: Path, extra: dict[str, object], expected: str) -> None:
    """Step, tokens, position and the optimizer's own step counts must fit each other."""
    model, optimizer = trained()
    save(store, tmp_path, full_state(model, optimizer), extra=extra)
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(store, COMMIT)


def test_updates_that_were_not_applied_are_counted(store: Store, tmp_path: Path) -> None:
    """With one skipped update of four the optimizer is at three, and the checkpoint is sound."""
    model, optimizer = trained()
    save(store, tmp_path, full_state(model, optimizer), step=4, extra={"skipped_updates": 1})
    assert load_checkpoint(store, commit_id(4, 1, 1)).manifest.step == 4
