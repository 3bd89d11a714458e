"""Saving and loading: bit-exact, all or nothing, one at a time, and never a state that is not finite."""

from pathlib import Path

import pytest
import torch

from tests.stores import claimed
from tests.trainer.saving import COMMIT, STEP, Saving, TinyModel, full_state, save, train, trained
from trainer.checkpoint import (
    CheckpointError,
    NonFiniteStateError,
    SnapshotRefusedError,
    StateMismatchError,
    load_checkpoint,
    model_tensors,
    named_parameters,
    optimizer_tensors,
    restore_model,
    restore_optimizer,
)
from trainer.contract import fence
from trainer.contract.backends import LocalBackend
from trainer.contract.config import StoreConfig
from trainer.contract.manifest import commit_id, manifest_key, unseal
from trainer.contract.store import Store, StoreUnavailable, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store on disk."""
    return claimed(open_store(StoreConfig(url="file://./store"), tmp_path, "run-1"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_comes_back(store: Store, tmp_path: Path, dtype: torch.dtype) -> None:
    """Every tensor in its own dtype, 0-dim and empty ones too, and the extra state."""
    model, optimizer = trained(dtype)
    tensors = full_state(model, optimizer)
    tensors |= {"x.empty": torch.empty(0, 4), "x.i64": torch.tensor([2**62, -1]), "x.bool": torch.tensor(True)}
    done = save(store, tmp_path, tensors, extra={"rng": [1, 2], "step": STEP, "window": [0.1]}).manifest
    assert (done.commit, done.step, done.position, done.tokens) == (COMMIT, STEP, 6, 48)

    loaded = load_checkpoint(store, COMMIT)
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(loaded.tensors[name], tensor), name
    assert loaded.extra == {"rng": [1, 2], "step": STEP, "window": [0.1]}
    assert len(loaded.manifest.objects) > 2
    assert loaded.manifest.health.loss == 2.0
    assert loaded.manifest.bytes == done.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_to_the_last_bit(store: Store, tmp_path: Path, dtype: torch.dtype) -> None:
    """A restored model and optimizer, float32 moments of bfloat16 weights included, continue like the original."""
    model, optimizer = trained(dtype)
    save(store, tmp_path, full_state(model, optimizer))
    loaded = load_checkpoint(store, COMMIT)
    again = TinyModel(dtype)
    optimizer_again = torch.optim.AdamW(again.parameters(), lr=1e-2)
    restore_model(again, loaded.tensors)
    restore_optimizer(optimizer_again, named_parameters(again), loaded.tensors)
    assert optimizer_again.state[again.embed.weight]["exp_avg"].dtype == torch.float32
    if dtype == torch.float32:  # torch's own foreach update refuses mixed dtypes, so only this one can train on
        assert train(model, optimizer, 4) == train(again, optimizer_again, 4)
    restored, original = full_state(again, optimizer_again), full_state(model, optimizer)
    assert all(torch.equal(restored[name], original[name]) for name in original)


def test_tied_weights_are_saved_once() -> None:
    """Tied tensors and buffers that are not persistent take no place."""
    assert sorted(model_tensors(TinyModel())) == [
        "model.embed.weight",
        "model.norm.bias",
        "model.norm.weight",
        "model.seen",
    ]


def test_the_state_before_any_update(store: Store, tmp_path: Path) -> None:
    """Step 0 has no optimizer state, and loading it takes the optimizer back to none."""
    model, optimizer = trained(steps=0)
    done = save(store, tmp_path, full_state(model, optimizer), step=0).manifest
    train(model, optimizer, 1)
    loaded = load_checkpoint(store, done.commit)
    restore_model(model, loaded.tensors)
    restore_optimizer(optimizer, named_parameters(model), loaded.tensors)
    assert optimizer_tensors(optimizer, named_parameters(model)) == {}


def test_a_snapshot_is_a_copy(store: Store, tmp_path: Path) -> None:
    """What training does to the tensors after the snapshot is not in the checkpoint."""
    weight = torch.ones(5)
    with Saving(store, tmp_path) as saving:
        commit = saving.snapshot({"model.w": weight})
        weight.zero_()
        saving.persist()
        saving.upload(commit)
    assert torch.equal(load_checkpoint(store, COMMIT).tensors["model.w"], torch.ones(5))


def test_a_third_snapshot_waits_for_a_slot(store: Store, tmp_path: Path) -> None:
    """Two may wait for the disk; a third is refused with the reason until one of them is there, and none is lost."""
    state = {"model.w": torch.ones(5)}
    with Saving(store, tmp_path) as saving:
        commits = [saving.snapshot(state, step) for step in (1, 2)]
        assert not saving.snapshotter.ready()
        with pytest.raises(SnapshotRefusedError, match="both slots"):
            saving.snapshot(state, 3)
        saving.persist()
        assert saving.snapshotter.ready()
        commits.append(saving.snapshot(state, 3))
        assert [saving.persist().manifest.step for _ in range(2)] == [2, 3]
        for commit in commits:
            saving.upload(commit)
    assert fence.commits_present(store) == tuple(commits)


def test_commits_name_their_parents(store: Store, tmp_path: Path) -> None:
    """Each manifest names the one before it and its digest, the first of an attempt the one that was loaded."""
    with Saving(store, tmp_path) as saving:
        first, second = (saving.save({"model.w": torch.ones(2)}, step) for step in (1, 2))
    loaded = load_checkpoint(store, second.manifest.commit)
    parent = loaded.manifest.parent
    assert parent is not None
    assert (parent.commit, parent.digest) == (first.manifest.commit, first.digest)
    assert loaded.parent.digest == second.digest == unseal(store.read(manifest_key(second.manifest.commit))).digest
    with Saving(claimed(store, 2), tmp_path, epoch=2, loaded=loaded.parent) as saving:
        third = saving.save({"model.w": torch.ones(2)}, 3)
    assert third.manifest.parent == loaded.parent


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_non_finite_state_is_never_committed(store: Store, tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """One bad element in any floating tensor: a failed save that names it, nothing kept, and saving goes on."""
    poisoned = torch.zeros(100, dtype=dtype)
    poisoned[57] = value
    with Saving(store, tmp_path) as saving:
        saving.snapshot({"model.fine": torch.ones(3), "model.poisoned": poisoned})
        with pytest.raises(NonFiniteStateError, match=r"model\.poisoned is not finite"):
            saving.persist()
        assert saving.tier.store.list() == []
        saving.save({"model.fine": torch.ones(3)}, step=STEP + 1)
    assert fence.commits_present(store) == (commit_id(STEP + 1, 1, 1),)


def test_large_finite_numbers_are_finite(store: Store, tmp_path: Path) -> None:
    """Norms are summed in float64, so the largest float32 numbers do not overflow."""
    save(store, tmp_path, {"model.w": torch.full((1000,), torch.finfo(torch.float32).max)})
    assert load_checkpoint(store, COMMIT).manifest.step == STEP


def test_extra_state_must_be_finite_json(store: Store, tmp_path: Path) -> None:
    """What JSON cannot carry is refused, not changed."""
    with Saving(store, tmp_path) as saving:
        for value in (float("nan"), object()):
            with pytest.raises(SnapshotRefusedError, match="not finite JSON"):
                saving.snapshot({"model.w": torch.ones(1)}, extra={"value": value})
        assert saving.snapshotter.ready()


def test_what_a_later_epoch_does_not_build_on_is_not_uploaded(store: Store, tmp_path: Path) -> None:
    """Once a later epoch is claimed, only the commits that it names may still arrive."""
    with Saving(store, tmp_path) as saving:
        kept, lost = (saving.snapshot({"model.w": torch.ones(1)}, step) for step in (1, 2))
        saving.persist()
        saving.persist()
        fence.claim(store, fence.Fence(run_id="run-1", epoch=2, nonce="n" * 16, host="h", pid=1, base=kept))
        with pytest.raises(fence.FenceLostError):
            saving.upload(lost)
        saving.upload(kept)
    assert fence.lineage(store).commits == (kept,)


class _Failing(LocalBackend):
    """A store on disk in which one kind of call fails, as often as told."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.failures = 0
        self.failed = 0

    def put_file(self, key: str, path: Path, timeout_s: float) -> None:
        """Fail or store."""
        if self.failures:
            self.failures -= 1
            self.failed += 1
            raise TimeoutError("silent server")
        super().put_file(key, path, timeout_s)


def test_an_upload_that_failed_is_done_again(tmp_path: Path) -> None:
    """Failed calls are tried again within one upload; an upload that failed whole leaves the local copy for another."""
    backend = _Failing(tmp_path / "failing")
    store = claimed(Store(backend, "test://", 1.0))
    with Saving(store, tmp_path) as saving:
        commit = saving.snapshot({"model.w": torch.ones(1)})
        saving.persist()
        backend.failures = 3
        with pytest.raises(StoreUnavailable, match="no answer"):
            saving.upload(commit)
        assert fence.commits_present(store) == ()
        backend.failures = 1
        saving.upload(commit)
    assert backend.failed == 4
    assert load_checkpoint(store, COMMIT).manifest.step == STEP


def test_torn_saves_do_not_exist(store: Store, tmp_path: Path) -> None:
    """Data without a manifest is not listed and not loaded, and does not disturb a later save of the same step."""
    store.create(f"data/{COMMIT}/r0-dead-00000.safetensors", b"half")
    assert fence.commits_present(store) == ()
    with pytest.raises(CheckpointError, match="missing"):
        load_checkpoint(store, COMMIT)
    save(store, tmp_path, {"model.w": torch.ones(1)})
    assert fence.commits_present(store) == (COMMIT,)


def test_a_state_that_does_not_fit(store: Store, tmp_path: Path) -> None:
    """Another model, dtype or optimizer is refused by name, before anything is changed."""
    model, optimizer = trained()
    tensors = full_state(model, optimizer)
    parameters = named_parameters(model)
    wrong_dtype = tensors | {"model.norm.weight": tensors["model.norm.weight"].double()}
    with pytest.raises(StateMismatchError, match=r"norm\.weight is float32.*float64"):
        restore_model(model, wrong_dtype)
    with pytest.raises(StateMismatchError, match=r"differ in norm\.weight"):
        restore_model(model, {name: t for name, t in tensors.items() if name != "model.norm.weight"})
    with pytest.raises(StateMismatchError, match=r"no optimizer state for norm\.bias"):
        restore_optimizer(optimizer, parameters, {n: t for n, t in tensors.items() if "optim.norm.bias" not in n})
    with pytest.raises(StateMismatchError, match="which the model does not have"):
        restore_optimizer(optimizer, parameters, {"optim.gone.exp_avg": torch.ones(1)})
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    after = full_state(model, optimizer)
    assert all(torch.equal(after[name], before[name]) for name in before)
