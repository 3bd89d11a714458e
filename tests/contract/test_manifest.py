"""The manifest: names of commits, and bytes of which not one may change unnoticed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.contract.manifest import (
    CommitId,
    Health,
    Manifest,
    ManifestError,
    ObjectEntry,
    TensorEntry,
    commit_id,
    crc32c,
    data_key,
    manifest_key,
    parse_commit_id,
    seal,
    unseal,
)

COMMIT = commit_id(1200, 3, 5)


def make_manifest(**changes: object) -> Manifest:
    """A small manifest that is valid unless told otherwise."""
    fields: dict[str, object] = {
        "run_id": "run-1",
        "commit": COMMIT,
        "step": 1200,
        "epoch": 3,
        "attempt": 5,
        "tokens": 9600,
        "position": 300,
        "nonce": "0" * 32,
        "objects": (ObjectEntry(key=data_key(COMMIT, "r0-a.safetensors"), size=10, crc32c=7),),
        "tensors": (TensorEntry(name="model.w", dtype="float32", shape=(2, 1), object=0, norm=1.5e-07),),
        "health": Health(loss=2.5),
        "extra": {"rng": [1, 2**63], "window": [0.1, 1e-17]},
    }
    return Manifest.model_validate({**fields, **changes})


def test_commit_names() -> None:
    """A commit's name has a fixed form, so that names sort by step."""
    assert COMMIT == "000000001200-e3-5"
    assert parse_commit_id(COMMIT) == CommitId(1200, 3, 5)
    assert manifest_key(COMMIT) == "commits/000000001200-e3-5.json"


@given(st.integers(0, 10**12 - 1), st.integers(0, 10**9), st.integers(0, 10**9))
def test_commit_names_come_back(step: int, epoch: int, attempt: int) -> None:
    """Every name parses to what it was made of."""
    assert parse_commit_id(commit_id(step, epoch, attempt)) == CommitId(step, epoch, attempt)


@pytest.mark.parametrize(
    "name", ["", "latest", "../000000001200-e3-5", "000000001200-e3-5.json", "1200-e3-5", "000000001200-e3-x"]
)
def test_other_names_are_refused(name: str) -> None:
    """What is no commit's name reaches no key."""
    for use in (parse_commit_id, manifest_key, lambda text: data_key(text, "a")):
        with pytest.raises(ValueError, match="not the name of a checkpoint"):
            use(name)


def test_a_sealed_manifest_comes_back() -> None:
    """All fields survive, large integers and tiny numbers to the last bit."""
    sealed = seal(make_manifest())
    again = unseal(sealed.raw)
    assert again == sealed
    assert again.manifest.extra == {"rng": [1, 2**63], "window": [0.1, 1e-17]}


def test_every_changed_bit_is_detected() -> None:
    """Flip each bit of a manifest in turn: none goes unnoticed."""
    raw = seal(make_manifest()).raw
    for offset in range(len(raw)):
        for bit in range(8):
            damaged = raw[:offset] + bytes([raw[offset] ^ (1 << bit)]) + raw[offset + 1 :]
            with pytest.raises(ManifestError):
                unseal(damaged)


def test_every_truncation_is_detected() -> None:
    """Cut a manifest anywhere, or lengthen it: noticed."""
    raw = seal(make_manifest()).raw
    for damaged in (*(raw[:length] for length in range(len(raw))), raw + b" "):
        with pytest.raises(ManifestError):
            unseal(damaged)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_numbers_have_no_place(value: float) -> None:
    """Neither health, nor norms, nor the extra state hold a number that is not finite."""
    with pytest.raises(ValidationError):
        Health(loss=value)
    with pytest.raises(ValidationError):
        TensorEntry(name="w", dtype="float32", shape=(), object=0, norm=value)
    with pytest.raises(ValueError, match="not JSON compliant"):
        seal(make_manifest(extra={"window": [value]}))


def test_extra_state_that_is_not_json() -> None:
    """Objects that JSON does not know are refused, not turned into something else."""
    with pytest.raises(ValueError, match="not JSON"):
        seal(make_manifest(extra={"rng": {1, 2}}))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 1201},
        {"tensors": (TensorEntry(name="w", dtype="float32", shape=(), object=1, norm=0.0),)},
    ],
    ids=["wrong step", "unlisted object"],
)
def test_a_manifest_that_contradicts_itself(changes: dict[str, object]) -> None:
    """An intact digest does not excuse contents that cannot be true."""
    with pytest.raises(ManifestError):
        unseal(seal(make_manifest(**changes)).raw)


def test_keys_outside_the_data_are_refused() -> None:
    """A manifest cannot point a reader, or a deletion, outside the data of commits."""
    for key in ("commits/000000001200-e3-5.json", "data/../x", "data/000000001200-e3-5/a/b", "/etc/passwd"):
        with pytest.raises(ValidationError):
            ObjectEntry(key=key, size=1, crc32c=0)


def test_crc32c_is_castagnoli() -> None:
    """The published check value, and that it can be continued."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283
