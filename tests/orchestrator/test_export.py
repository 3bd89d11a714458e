"""Exported weights: what others load is what was trained, and nothing half-written or damaged is ever given out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from orchestrator.cli.app import run
from orchestrator.recovery.export import Dtype, ExportError, export_weights
from tests.orchestrator.stored import StoredRun
from tests.trainer.saving import TinyModel, full_state, trained
from trainer.contract.config import ModelConfig
from trainer.contract.store import Store


@pytest.fixture(name="stored")
def _stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoredRun:
    """A run directory with an empty store."""
    monkeypatch.chdir(tmp_path)
    made = StoredRun(tmp_path)
    made.claim(1)
    return made


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_exported_weights_fill_a_model(stored: StoredRun, weights: torch.dtype) -> None:
    """Names as the model has them, tied ones once, moments left out; and it computes the same."""
    model, optimizer = trained(weights)
    stored.save(3, tensors=full_state(model, optimizer))

    assert run(["checkpoints", "export", "3", "--out", "w.safetensors"]) == 0

    loaded = load_file(stored.here / "w.safetensors")
    assert loaded.keys() == {"embed.weight", "norm.weight", "norm.bias", "seen"}
    other = TinyModel(weights)
    assert other.load_state_dict(loaded, strict=False).missing_keys == ["head.weight"]  # tied to the embedding
    tokens = torch.arange(5)
    assert torch.equal(other(tokens), model(tokens))


def test_the_file_says_where_it_comes_from(stored: StoredRun) -> None:
    """Step, run, commit and model, in a place where every reader of the format finds them."""
    commit = stored.save(7)

    assert run(["checkpoints", "export", "7", "--out", "weights/"]) == 0
    assert run(["checkpoints", "export", "7", "--out", "weights", "--force"]) == 0

    with safe_open(stored.here / "weights" / "tiny-step-7.safetensors", framework="pt") as file:
        known = file.metadata()
        assert ModelConfig.model_validate_json(known.pop("model")) == stored.config.model
        assert int(known.pop("sequence_tokens")) > 0
        assert known == {
            "format": "pt", "step": "7", "run_id": "run-1", "commit": commit, "config_digest": "c", "tokens": "112",
        }  # fmt: skip


_ANY_FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("target", ["bf16", "fp32", "as-is"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_conversion_is_torchs_own(tmp_path_factory: pytest.TempPathFactory, source: torch.dtype, target: Dtype) -> None:
    """Bit for bit what `Tensor.to` gives, for any finite numbers; integers are left alone."""
    here = tmp_path_factory.mktemp("run")
    stored = StoredRun(here)
    stored.claim(1)
    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32, "as-is": source}[target]
    step = 0

    @given(st.lists(_ANY_FLOAT, min_size=1, max_size=40))
    def check(numbers: list[float]) -> None:
        nonlocal step
        step += 1
        finite = torch.tensor(numbers).to(source).nan_to_num(1.0, 2.0, 3.0).reshape(1, -1)
        commit = stored.save(step, good=False, tensors={"model.a": torch.arange(3), "model.b": finite})
        done = export_weights(stored.store, commit, here / "w", dtype=target, force=True)
        found = load_file(here / "w")
        assert torch.equal(found["a"], torch.arange(3))
        assert found["b"].dtype == wanted
        assert torch.equal(found["b"].view(torch.uint8), finite.to(wanted).view(torch.uint8))
        assert done.bytes == (here / "w").stat().st_size

    check()


def _refused(store: Store, commit: str, out: Path, said: str, **options: Any) -> None:
    with pytest.raises(ExportError, match=said):
        export_weights(store, commit, out, **options)
    assert not list(out.parent.glob(".*part"))


def test_damaged_weights_are_not_given_out(stored: StoredRun) -> None:
    """A flipped bit, and nothing is written; the manifest alone does not vouch."""
    commit = stored.save(3)
    stored.damage(commit)

    _refused(stored.store, commit, stored.here / "w", "CRC32C")
    assert not (stored.here / "w").exists()


def test_a_file_that_is_there_stays(stored: StoredRun) -> None:
    """Replaced only on request, and then at once; without weights there is nothing to export."""
    commit = stored.save(3)
    out = stored.here / "w"
    out.write_text("mine")

    _refused(stored.store, commit, out, "exists already")
    assert out.read_text() == "mine"
    export_weights(stored.store, commit, out, force=True)
    assert load_file(out)["w"].shape == (100,)

    bare = stored.save(4, tensors={"optim.w.step": torch.tensor(4.0)})
    _refused(stored.store, bare, stored.here / "x", "no weights")


def test_large_tensors_pass_in_pieces(stored: StoredRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one piece of a tensor, and pieces that end within it."""
    monkeypatch.setattr("orchestrator.recovery.export._CHUNK_BYTES", 64)
    weights = torch.randn(7, 33)
    commit = stored.save(3, tensors={"model.first": torch.ones(5), "model.w": weights})

    export_weights(stored.store, commit, stored.here / "w", dtype="bf16")

    assert torch.equal(load_file(stored.here / "w")["w"], weights.bfloat16())
