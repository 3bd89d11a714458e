"""Token shards in the formats that people already have, read by ranges through fsspec. Torch-free.

llm.c and modded-nanogpt `.bin` (256 x int32 header: magic, version, token count), raw uint16 or uint32 (nanoGPT, OLMo,
datatrove), real `.npy`, Megatron `.bin` beside `.idx`. Layouts are those of the projects' own readers.
"""

import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.contract.config import Format
from trainer.data.errors import DataError
from trainer.data.storage import CALL_TIMEOUT_S, ask, missing, read_range, size_of, truncated

Tokens = npt.NDArray[Any]

LLMC_HEADER_BYTES = 1024
_LLMC_DTYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
_LLMC_MAGICS = {magic for magic, _ in _LLMC_DTYPES}
_LLMC_EVAL_MAGIC = 20240522
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_HEAD_BYTES = 4096
_MEGATRON_HEAD_BYTES = 34
_NPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens of a shard lie: `tokens` of `dtype` from `offset` on."""

    format: str
    dtype: str
    offset: int
    tokens: int
    bytes: int


def inspect(fs: Any, path: str, wanted: Format = "auto") -> Layout:
    """Find out a shard's layout from its header and size; no token is read.

    Raises:
        DataError: missing, truncated, of another format than wanted, or of a kind that is not training data.
    """
    size, head = _head(fs, path)
    found = _detect(fs, path, head) if wanted == "auto" else wanted
    match found:
        case "llmc":
            return _llmc(path, size, head)
        case "npy":
            return _npy(path, size, head)
        case "megatron":
            return _megatron(fs, path, size)
        case "raw_u16":
            return _raw(path, size, "<u2", found)
        case "raw_u32":
            return _raw(path, size, "<u4", found)
    raise DataError(
        f"{path}: the format cannot be told from the file", "set data.format to raw_u16 or raw_u32", shard=path
    )


def read_tokens(
    fs: Any, path: str, layout: Layout, start: int, count: int, timeout_s: float = CALL_TIMEOUT_S
) -> Tokens:
    """Tokens [start, start + count) in the shard's own dtype.

    Raises:
        DataError: the shard is missing, or has become shorter.
        DataUnreachableError: its storage gave no answer within `timeout_s`.
    """
    dtype = np.dtype(layout.dtype)
    begin = layout.offset + start * dtype.itemsize
    end = begin + count * dtype.itemsize
    try:
        raw = read_range(fs, path, begin, end, timeout_s)
    except FileNotFoundError as error:
        raise missing(path) from error
    if len(raw) != end - begin:
        raise truncated(path, f"bytes {begin} to {end}", f"{begin + len(raw)} bytes")
    return np.frombuffer(raw, dtype=dtype)


def _head(fs: Any, path: str) -> tuple[int, bytes]:
    try:
        size = size_of(fs, path)
        return size, read_range(fs, path, 0, min(size, _HEAD_BYTES))
    except FileNotFoundError as error:
        raise missing(path) from error


def _detect(fs: Any, path: str, head: bytes) -> str | None:
    if head.startswith(_NPY_MAGIC):
        return "npy"
    if len(head) >= 12 and struct.unpack_from("<i", head)[0] in _LLMC_MAGICS | {_LLMC_EVAL_MAGIC}:
        return "llmc"
    return "megatron" if path.endswith(".bin") and ask(fs, path, fs.exists, _index_of(path)) else None


def _llmc(path: str, size: int, head: bytes) -> Layout:
    if len(head) < LLMC_HEADER_BYTES:
        raise truncated(path, f"a header of {LLMC_HEADER_BYTES} bytes", f"{size} bytes")
    magic, version, tokens = struct.unpack_from("<iii", head)
    if magic == _LLMC_EVAL_MAGIC:
        raise DataError(f"{path}: an llm.c evaluation file, not training tokens", "remove it from the data", shard=path)
    dtype = _LLMC_DTYPES.get((magic, version))
    if dtype is None:
        raise DataError(f"{path}: llm.c magic {magic} version {version} is not known", "prepare it again", shard=path)
    expected = LLMC_HEADER_BYTES + tokens * np.dtype(dtype).itemsize
    if size != expected:
        raise truncated(path, f"{expected} bytes for the {tokens} tokens of its header", f"{size} bytes")
    return Layout("llmc", dtype, LLMC_HEADER_BYTES, tokens, size)


def _npy(path: str, size: int, head: bytes) -> Layout:
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(stream)
    except ValueError as error:
        raise DataError(f"{path}: not a .npy file ({error})", "prepare it again", shard=path) from error
    if len(shape) != 1 or dtype.kind not in "ui":
        raise DataError(f"{path}: a {dtype} array of shape {shape}", "token shards are flat integer arrays", shard=path)
    expected = stream.tell() + shape[0] * dtype.itemsize
    if size != expected:
        raise truncated(path, f"{expected} bytes for the {shape[0]} tokens of its header", f"{size} bytes")
    return Layout("npy", dtype.str, stream.tell(), int(shape[0]), size)


def _megatron(fs: Any, path: str, size: int) -> Layout:
    index = _index_of(path)
    try:
        raw = read_range(fs, index, 0, size_of(fs, index))
    except FileNotFoundError as error:
        raise missing(index) from error
    if not raw.startswith(_MEGATRON_MAGIC) or len(raw) < _MEGATRON_HEAD_BYTES:
        raise DataError(f"{index}: not a Megatron index", "prepare it again", shard=path)
    version, code, sequences, documents = struct.unpack_from("<QBQQ", raw, len(_MEGATRON_MAGIC))
    if version != 1:
        raise DataError(f"{index}: Megatron index version {version} is not known", "prepare it again", shard=path)
    dtype = _MEGATRON_DTYPES.get(code)
    if dtype is None:
        raise DataError(f"{index}: dtype code {code} holds no tokens", "prepare it with integer tokens", shard=path)
    if len(raw) < _MEGATRON_HEAD_BYTES + 12 * sequences + 8 * documents:
        raise truncated(index, f"{sequences} sequences and {documents} documents", f"{len(raw)} bytes")
    lengths = np.frombuffer(raw, dtype="<i4", count=sequences, offset=_MEGATRON_HEAD_BYTES).astype(np.int64)
    offsets = np.frombuffer(raw, dtype="<i8", count=sequences, offset=_MEGATRON_HEAD_BYTES + 4 * sequences)
    ends = np.cumsum(lengths) * np.dtype(dtype).itemsize
    if (lengths < 0).any() or (offsets[1:] != ends[:-1]).any() or (offsets[:1] != 0).any():
        raise DataError(f"{index}: its sequences do not lie one after another", "prepare it again", shard=path)
    tokens = int(lengths.sum())
    expected = tokens * np.dtype(dtype).itemsize
    if size != expected:
        raise truncated(path, f"{expected} bytes for the {tokens} tokens of its index", f"{size} bytes")
    return Layout("megatron", dtype, 0, tokens, size)


def _raw(path: str, size: int, dtype: str, name: str) -> Layout:
    itemsize = np.dtype(dtype).itemsize
    if size % itemsize:
        raise truncated(path, f"a multiple of {itemsize} bytes", f"{size} bytes")
    return Layout(name, dtype, 0, size // itemsize, size)


def _index_of(path: str) -> str:
    return path.removesuffix(".bin") + ".idx"
