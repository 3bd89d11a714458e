"""Every format is read back as written, and everything that is wrong with a shard is said by name."""

from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from tests.trainer_data.shards import llmc, megatron
from trainer.contract.config import Format
from trainer.data.errors import DataError
from trainer.data.formats import inspect, read_tokens

FS = LocalFileSystem()
TOKENS = np.arange(500) % 300


def _read(path: Path, wanted: Format = "auto", start: int = 0, count: int = len(TOKENS)) -> list[int]:
    layout = inspect(FS, str(path), wanted)
    assert layout.bytes == path.stat().st_size
    return [int(token) for token in read_tokens(FS, str(path), layout, start, count)]


@pytest.mark.parametrize(("magic", "version"), [(20240520, 1), (20240801, 7)])
def test_llmc_is_recognised_by_its_magic(tmp_path: Path, magic: int, version: int) -> None:
    """Both of llm.c's headers, uint16 and uint32."""
    assert _read(llmc(tmp_path / "a.bin", TOKENS, magic=magic, version=version)) == TOKENS.tolist()


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8", ">u2"])
def test_npy_is_recognised_by_its_magic(tmp_path: Path, dtype: str) -> None:
    """Real .npy files of any integer type and byte order."""
    np.save(tmp_path / "a.npy", TOKENS.astype(dtype))
    assert _read(tmp_path / "a.npy") == TOKENS.tolist()


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8")])
def test_megatron_is_recognised_by_its_index(tmp_path: Path, code: int, dtype: str) -> None:
    """A .bin beside an .idx."""
    assert _read(megatron(tmp_path / "a.bin", TOKENS, code=code, dtype=dtype)) == TOKENS.tolist()


@pytest.mark.parametrize(("wanted", "dtype"), [("raw_u16", "<u2"), ("raw_u32", "<u4")])
def test_raw_is_read_as_told(tmp_path: Path, wanted: Format, dtype: str) -> None:
    """No magic: the configuration names the type."""
    (tmp_path / "a.bin").write_bytes(TOKENS.astype(dtype).tobytes())
    assert _read(tmp_path / "a.bin", wanted) == TOKENS.tolist()


def test_a_range_is_read_alone(tmp_path: Path) -> None:
    """Tokens [start, start + count) behind the header."""
    assert _read(llmc(tmp_path / "a.bin", TOKENS), start=123, count=7) == TOKENS[123:130].tolist()


def _refusal(path: Path, wanted: Format = "auto") -> DataError:
    with pytest.raises(DataError) as caught:
        inspect(FS, str(path), wanted)
    assert caught.value.remedy
    assert caught.value.shard is not None
    assert path.name in str(caught.value) or path.with_suffix(".idx").name in str(caught.value)
    return caught.value


def test_raw_without_being_told_is_refused(tmp_path: Path) -> None:
    """The type cannot be guessed, so the remedy says which key names it."""
    (tmp_path / "a.bin").write_bytes(TOKENS.astype("<u2").tobytes())
    assert "data.format" in _refusal(tmp_path / "a.bin").remedy


def test_missing_shard(tmp_path: Path) -> None:
    """It is named."""
    assert "missing" in str(_refusal(tmp_path / "a.bin"))


@pytest.mark.parametrize("cut", [1, 400, 1000, 1990])
def test_truncated_llmc(tmp_path: Path, cut: int) -> None:
    """The size does not match the header, wherever it was cut."""
    path = llmc(tmp_path / "a.bin", TOKENS)
    path.write_bytes(path.read_bytes()[:-cut])
    assert "truncated" in str(_refusal(path, "llmc"))


def test_truncated_npy(tmp_path: Path) -> None:
    """The size does not match the header."""
    np.save(tmp_path / "a.npy", TOKENS)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-3])
    assert "truncated" in str(_refusal(tmp_path / "a.npy"))


def test_truncated_megatron(tmp_path: Path) -> None:
    """The size does not match the index."""
    path = megatron(tmp_path / "a.bin", TOKENS)
    path.write_bytes(path.read_bytes()[:-2])
    assert "truncated" in str(_refusal(path))


@pytest.mark.parametrize("keep", [0, 10, 20, 36])
def test_damaged_megatron_index(tmp_path: Path, keep: int) -> None:
    """An index that is cut anywhere is refused by name."""
    path = megatron(tmp_path / "a.bin", TOKENS)
    index = path.with_suffix(".idx")
    index.write_bytes(index.read_bytes()[:keep])
    _refusal(path)


def test_megatron_floats_hold_no_tokens(tmp_path: Path) -> None:
    """Code 7 is float32."""
    _refusal(megatron(tmp_path / "a.bin", TOKENS, code=7, dtype="<f4"))


def test_raw_of_odd_size(tmp_path: Path) -> None:
    """Half a token at the end."""
    (tmp_path / "a.bin").write_bytes(b"\x00" * 7)
    assert "truncated" in str(_refusal(tmp_path / "a.bin", "raw_u16"))


def test_llmc_evaluation_file_is_refused(tmp_path: Path) -> None:
    """It has another layout and is no training data."""
    assert "evaluation" in str(_refusal(llmc(tmp_path / "a.bin", TOKENS, magic=20240522)))


def test_unknown_llmc_version(tmp_path: Path) -> None:
    """Not guessed at."""
    assert "version 9" in str(_refusal(llmc(tmp_path / "a.bin", TOKENS, version=9)))


@pytest.mark.parametrize("array", [np.zeros((2, 3), dtype=np.uint16), np.zeros(4, dtype=np.float32)])
def test_npy_of_another_kind(tmp_path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> None:
    """Matrices and floats are no tokens."""
    np.save(tmp_path / "a.npy", array)
    _refusal(tmp_path / "a.npy")


def test_pickled_npy_is_never_loaded(tmp_path: Path) -> None:
    """An array of objects is refused by its header."""
    np.save(tmp_path / "a.npy", np.asarray([{}], dtype=object), allow_pickle=True)
    _refusal(tmp_path / "a.npy")


def test_a_shard_that_shrinks_after_it_was_inspected(tmp_path: Path) -> None:
    """The read says so instead of returning less."""
    path = llmc(tmp_path / "a.bin", TOKENS)
    layout = inspect(FS, str(path))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="truncated"):
        read_tokens(FS, str(path), layout, 0, len(TOKENS))
