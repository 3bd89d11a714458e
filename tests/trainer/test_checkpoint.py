"""Saving and loading: bit-exact, all or nothing, one at a time, and never a state that is not finite."""

from pathlib import Path
from threading import Event

import pytest
import torch

from tests.trainer.saving import COMMIT, STEP, TinyModel, full_state, save, train, trained, writer_of
from trainer.checkpoint import (
    CheckpointError,
    Committed,
    SaveFailed,
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
from trainer.contract.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store on disk."""
    return open_store(StoreConfig(url="file://./store"), tmp_path, "run-1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_comes_back(store: Store, tmp_path: Path, dtype: torch.dtype) -> None:
    """Every tensor in its own dtype, 0-dim and empty ones too, and the extra state."""
    model, optimizer = trained(dtype)
    tensors = full_state(model, optimizer)
    tensors |= {"x.empty": torch.empty(0, 4), "x.i64": torch.tensor([2**62, -1]), "x.bool": torch.tensor(True)}
    done = save(writer_of(store, tmp_path), tensors, extra={"rng": [1, 2], "step": STEP, "window": [0.1]})
    assert isinstance(done, Committed)
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
    save(writer_of(store, tmp_path), full_state(model, optimizer))
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
    done = save(writer_of(store, tmp_path), full_state(model, optimizer), step=0)
    assert isinstance(done, Committed)
    train(model, optimizer, 1)
    loaded = load_checkpoint(store, done.commit)
    restore_model(model, loaded.tensors)
    restore_optimizer(optimizer, named_parameters(model), loaded.tensors)
    assert optimizer_tensors(optimizer, named_parameters(model)) == {}


def test_a_snapshot_is_a_copy(store: Store, tmp_path: Path) -> None:
    """What training does to the tensors after the snapshot is not in the checkpoint."""
    gate = Event()
    slow = Store(_Gated(tmp_path / "gated", gate), "test://", 30.0)
    writer = writer_of(slow, tmp_path)
    weight = torch.ones(5)
    writer.snapshot({"model.w": weight}, {}, step=STEP, position=0, tokens=0)
    weight.zero_()
    gate.set()
    assert writer.flush(30)
    assert torch.equal(load_checkpoint(slow, COMMIT).tensors["model.w"], torch.ones(5))


class _Gated(LocalBackend):
    """A store on disk that takes no data until the gate opens."""

    def __init__(self, root: Path, gate: Event) -> None:
        super().__init__(root)
        self.gate = gate

    def put_file(self, key: str, path: Path, timeout_s: float) -> None:
        """Wait, then store."""
        assert self.gate.wait(30)
        super().put_file(key, path, timeout_s)


def test_never_two_saves_at_once(tmp_path: Path) -> None:
    """While one is being saved, a snapshot is refused with the reason; afterwards it is taken."""
    gate = Event()
    writer = writer_of(Store(_Gated(tmp_path / "gated", gate), "test://", 30.0), tmp_path)
    state = {"model.w": torch.ones(5)}
    writer.snapshot(state, {}, step=STEP, position=0, tokens=0)
    assert writer.busy
    assert not writer.flush(0.01)
    with pytest.raises(SnapshotRefusedError, match="still under way"):
        writer.snapshot(state, {}, step=STEP + 1, position=0, tokens=0)
    gate.set()
    assert writer.flush(30)
    with pytest.raises(SnapshotRefusedError, match="committed already"):
        writer.snapshot(state, {}, step=STEP, position=0, tokens=0)
    writer.snapshot(state, {}, step=STEP + 1, position=0, tokens=0)
    assert writer.close(30)
    assert [type(result) for result in writer.poll()] == [Committed, Committed]


def test_commits_name_their_parents(store: Store, tmp_path: Path) -> None:
    """Each manifest names the one before it and its digest, the first of an attempt the one that was loaded."""
    writer = writer_of(store, tmp_path)
    first, second = (save(writer, {"model.w": torch.ones(2)}, step=step) for step in (1, 2))
    assert isinstance(first, Committed)
    parent = load_checkpoint(store, commit_id(2, 1, 1)).manifest.parent
    assert parent is not None
    assert (parent.commit, parent.digest) == (first.commit, first.digest)
    loaded = load_checkpoint(store, commit_id(2, 1, 1))
    assert isinstance(second, Committed)
    assert loaded.parent.digest == second.digest == unseal(store.read(manifest_key(second.commit))).digest


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_state_is_never_committed(store: Store, tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """One bad element in any floating tensor: a failed save that names it, no manifest, and saving goes on."""
    writer = writer_of(store, tmp_path)
    poisoned = torch.zeros(100, dtype=dtype)
    poisoned[57] = value
    result = save(writer, {"model.fine": torch.ones(3), "model.poisoned": poisoned})
    assert isinstance(result, SaveFailed)
    assert "model.poisoned is not finite" in result.error
    assert fence.commits_present(store) == ()
    assert isinstance(save(writer, {"model.fine": torch.ones(3)}, step=STEP + 1), Committed)


def test_large_finite_numbers_are_finite(store: Store, tmp_path: Path) -> None:
    """Norms are summed in float64, so the largest float32 numbers do not overflow."""
    extreme = {"model.w": torch.full((1000,), torch.finfo(torch.float32).max)}
    assert isinstance(save(writer_of(store, tmp_path), extreme), Committed)
    assert load_checkpoint(store, COMMIT).manifest.step == STEP


def test_extra_state_must_be_finite_json(store: Store, tmp_path: Path) -> None:
    """What JSON cannot carry is a failed save, not a changed state."""
    writer = writer_of(store, tmp_path)
    for value in (float("nan"), object()):
        writer.snapshot({"model.w": torch.ones(1)}, {"value": value}, step=STEP, position=0, tokens=0)
        assert [type(result) for result in writer.poll()] == [SaveFailed]
    assert store.list() == []


def test_a_superseded_writer_commits_nothing(store: Store, tmp_path: Path) -> None:
    """Once a later epoch is claimed, a save ends as failed and says that the store is another's."""
    fence.claim(store, fence.Fence(run_id="run-1", epoch=2, nonce="n" * 16, host="h", pid=1))
    result = save(writer_of(store, tmp_path, epoch=1), {"model.w": torch.ones(1)})
    assert isinstance(result, SaveFailed)
    assert result.superseded
    assert fence.commits_present(store) == ()


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


def test_a_store_that_fails_ends_no_training(tmp_path: Path) -> None:
    """A failed save is a result with the reason; one failed call is tried again; the next save works."""
    backend = _Failing(tmp_path / "failing")
    writer = writer_of(Store(backend, "test://", 1.0), tmp_path)
    backend.failures = 3
    result = save(writer, {"model.w": torch.ones(1)})
    assert isinstance(result, SaveFailed)
    assert "no answer" in result.error
    backend.failures = 1
    assert isinstance(save(writer, {"model.w": torch.ones(1)}), Committed)
    assert backend.failed == 4
    assert list((tmp_path / "scratch").iterdir()) == []


def test_torn_saves_do_not_exist(store: Store, tmp_path: Path) -> None:
    """Data without a manifest is not listed and not loaded, and does not disturb a later save of the same step."""
    store.create(f"data/{COMMIT}/r0-dead-00000.safetensors", b"half")
    assert fence.commits_present(store) == ()
    with pytest.raises(CheckpointError, match="missing"):
        load_checkpoint(store, COMMIT)
    assert isinstance(save(writer_of(store, tmp_path), {"model.w": torch.ones(1)}), Committed)


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


def test_leftovers_of_a_killed_writer_are_removed(store: Store, tmp_path: Path) -> None:
    """A new writer clears its scratch directory."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch/r0-dead-00000.safetensors").write_bytes(b"half")
    writer_of(store, tmp_path)
    assert list((tmp_path / "scratch").iterdir()) == []
