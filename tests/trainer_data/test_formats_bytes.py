"""Shards built byte by byte from the layouts that their projects document, and read by those projects' own readers."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer_data.shards import llmc, megatron
from trainer.contract.config import Format
from trainer.data.errors import DataError
from trainer.data.formats import inspect, read_tokens

FS = LocalFileSystem()
_MANY = (1 << 31) + 5  # more than 32 bits with a sign can count


def _npy(version: tuple[int, int], descr: str, shape: str, payload: bytes, order: str = "False") -> bytes:
    """The format of numpy's NEP 1: magic, version, length of the header, the header, the elements."""
    text = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    width = 2 if version[0] == 1 else 4
    text += b" " * (-(8 + width + len(text) + 1) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version) + len(text).to_bytes(width, "little") + text + payload


def _index(code: int, lengths: list[int], offsets: list[int], documents: list[int]) -> bytes:
    """Megatron's: nine bytes of magic, version, dtype code, two counts, then lengths, byte offsets, documents."""
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    return (
        head
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(offsets)}q", *offsets)
        + struct.pack(f"<{len(documents)}q", *documents)
    )


def _tokens(path: Path, wanted: Format = "auto") -> list[int]:
    layout = inspect(FS, str(path), wanted)
    return [int(token) for token in read_tokens(FS, str(path), layout, 0, layout.tokens)]


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize(
    ("descr", "payload"),
    [
        ("<u2", bytes.fromhex("0100 ffff")),
        (">u2", bytes.fromhex("0001 ffff")),
        ("<i4", bytes.fromhex("01000000 ffff0000")),
        ("|u1", bytes.fromhex("01 ff")),
        (">i8", bytes.fromhex("0000000000000001 000000000000ffff")),
    ],
)
def test_npy_of_every_version(tmp_path: Path, version: tuple[int, int], descr: str, payload: bytes) -> None:
    """Every header, width and byte order; numpy's own reader sees the same."""
    path = tmp_path / "a.npy"
    path.write_bytes(_npy(version, descr, "(2,)", payload))
    expected = [1, 255 if descr == "|u1" else 65535]
    assert _tokens(path) == expected
    assert np.load(path).tolist() == expected


@pytest.mark.parametrize(
    ("descr", "shape"), [("<f4", "(2,)"), ("<u2", "(2, 2)"), ("<u2", "()"), ("<U1", "(2,)"), ("|b1", "(2,)")]
)
def test_npy_that_holds_no_tokens(tmp_path: Path, descr: str, shape: str) -> None:
    """Floats, matrices, scalars, text and truth values are refused, with what was found."""
    path = tmp_path / "a.npy"
    path.write_bytes(_npy((1, 0), descr, shape, bytes(64)))
    with pytest.raises(DataError, match="array of shape") as caught:
        inspect(FS, str(path))
    assert caught.value.remedy


def test_npy_with_a_header_that_is_none(tmp_path: Path) -> None:
    """Cut within the header, or no Python literal."""
    whole = _npy((1, 0), "<u2", "(2,)", bytes(4))
    for raw in (whole[:9], whole[:40], whole.replace(b"descr", b"\xff\xfe\xfd\xfc\xfb")):
        path = tmp_path / "a.npy"
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"a\.npy"):
            inspect(FS, str(path))


@pytest.mark.parametrize(("code", "dtype"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_megatron_of_every_dtype(tmp_path: Path, code: int, dtype: str) -> None:
    """Each integer code; two sequences, the second of which begins where its byte offset says."""
    tokens = [1, 2, 3, 100, 127]
    size = struct.calcsize(dtype)
    (tmp_path / "a.bin").write_bytes(struct.pack(f"<{len(tokens)}{dtype}", *tokens))
    (tmp_path / "a.idx").write_bytes(_index(code, [2, 3], [0, 2 * size], [0, 1, 2]))
    assert _tokens(tmp_path / "a.bin") == tokens


_DAMAGE: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("not a Megatron index", lambda raw: b"X" + raw[1:]),
    ("version 2", lambda raw: raw[:9] + struct.pack("<Q", 2) + raw[17:]),
    ("dtype code 6", lambda raw: raw[:17] + b"\x06" + raw[18:]),
    ("dtype code 99", lambda raw: raw[:17] + b"\x63" + raw[18:]),
    ("truncated", lambda raw: raw[:-1]),
    ("do not lie one after another", lambda raw: raw[:42] + struct.pack("<qq", 0, 5) + raw[58:]),
    ("do not lie one after another", lambda raw: raw[:34] + struct.pack("<ii", -2, 7) + raw[42:]),
    ("expected 12 bytes", lambda raw: raw[:34] + struct.pack("<ii", 2, 4) + raw[42:]),
]


@pytest.mark.parametrize(("expected", "change"), _DAMAGE)
def test_a_megatron_index_that_does_not_fit(tmp_path: Path, expected: str, change: Callable[[bytes], bytes]) -> None:
    """Magic, version, dtype, sizes, byte offsets and lengths are all looked at."""
    (tmp_path / "a.bin").write_bytes(struct.pack("<5H", 1, 2, 3, 4, 5))
    whole = _index(8, [2, 3], [0, 4], [0, 1, 2])
    assert len(whole) == 34 + 8 + 16 + 24
    (tmp_path / "a.idx").write_bytes(change(whole))
    with pytest.raises(DataError, match=expected) as caught:
        inspect(FS, str(tmp_path / "a.bin"))
    assert caught.value.remedy


def test_more_tokens_than_32_bits_count(tmp_path: Path) -> None:
    """Sparse files of more than 4 GB: counts and byte offsets beyond 2^31 and 2^32, and the last token is read."""
    raw, npy, flat = tmp_path / "raw.bin", tmp_path / "a.npy", tmp_path / "m.bin"
    npy.write_bytes(_npy((1, 0), "<u2", f"({_MANY},)", b""))
    lengths = [(1 << 31) - 1, _MANY - (1 << 31) + 1]
    flat.with_suffix(".idx").write_bytes(_index(8, lengths, [0, 2 * lengths[0]], [0, 1, 2]))
    for path, wanted in ((raw, "raw_u16"), (npy, "npy"), (flat, "megatron")):
        begin = path.stat().st_size if path.exists() else 0
        with path.open("ab") as file:
            file.truncate(begin + 2 * (_MANY - 1))
        with path.open("ab") as file:
            file.write(struct.pack("<H", 4711))
        layout = inspect(FS, str(path), wanted)  # type: ignore[arg-type]
        assert layout.tokens == _MANY
        assert read_tokens(FS, str(path), layout, _MANY - 2, 2).tolist() == [0, 4711]


def _written(path: Path, kind: str, tokens: "np.ndarray[Any, Any]") -> tuple[Path, Format]:
    match kind:
        case "llmc":
            return llmc(path, tokens), "auto"
        case "llmc-32":
            return llmc(path, tokens, magic=20240801, version=7), "auto"
        case "megatron":
            return megatron(path, tokens), "auto"
        case "npy":
            path = path.with_suffix(".npy")
            np.save(path, tokens.astype("<u2"))
            return path, "auto"
        case _:
            path.write_bytes(tokens.astype("<u2" if kind == "raw_u16" else "<u4").tobytes())
            return path, kind  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["llmc", "llmc-32", "megatron", "npy", "raw_u16", "raw_u32"])
def test_any_tokens_and_any_range(tmp_path: Path, kind: str) -> None:
    """Whatever is written in a format, every range of it is read as it is."""

    @given(
        tokens=st.lists(st.integers(0, 65535), min_size=1, max_size=60), cut=st.tuples(st.floats(0, 1), st.floats(0, 1))
    )
    def check(tokens: list[int], cut: tuple[float, float]) -> None:
        path, wanted = _written(tmp_path / "a.bin", kind, np.asarray(tokens))
        begin, end = sorted(round(part * len(tokens)) for part in cut)
        layout = inspect(FS, str(path), wanted)
        assert layout.tokens == len(tokens)
        assert read_tokens(FS, str(path), layout, begin, end - begin).tolist() == tokens[begin:end]

    check()


def test_megatrons_own_reader_agrees(tmp_path: Path) -> None:
    """Where Megatron-core is installed (0.16.1 agreed), its dataset reads the same tokens from the same files."""
    pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # type: ignore[import-not-found]

    path = megatron(tmp_path / "a.bin", np.arange(501) % 300)
    dataset = IndexedDataset(str(path.with_suffix("")))
    theirs = np.concatenate([dataset[number] for number in range(len(dataset))])  # it has no end of its own
    assert _tokens(path) == theirs.tolist()
