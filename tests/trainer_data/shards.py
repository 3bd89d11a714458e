"""Shards in every format, written as their own projects write them."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.contract.config import DataConfig

VOCABULARY = 1000
Tokens = npt.NDArray[Any]


def llmc(path: Path, tokens: Tokens, *, magic: int = 20240520, version: int = 1) -> Path:
    """llm.c: 256 int32 (magic, version, count), then the tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = (magic, version, len(tokens))
    path.write_bytes(header.tobytes() + tokens.astype("<u2" if magic == 20240520 else "<u4").tobytes())
    return path


def megatron(path: Path, tokens: Tokens, *, code: int = 8, dtype: str = "<u2") -> Path:
    """Megatron: flat tokens in .bin, two sequences in .idx."""
    lengths = np.asarray([len(tokens) // 2, len(tokens) - len(tokens) // 2], dtype="<i4")
    offsets = np.asarray([0, lengths[0] * np.dtype(dtype).itemsize], dtype="<i8")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 2, 3)
    documents = np.asarray([0, 1, 2], dtype="<i8")
    path.with_suffix(".idx").write_bytes(head + lengths.tobytes() + offsets.tobytes() + documents.tobytes())
    path.write_bytes(tokens.astype(dtype).tobytes())
    return path


def corpus(root: Path, lengths: tuple[int, ...] = (1000, 777, 1300, 40)) -> Path:
    """llm.c shards in which every token says where it lies: token k of shard s is (k + 37 s) mod the vocabulary."""
    root.mkdir(parents=True, exist_ok=True)
    for number, length in enumerate(lengths):
        llmc(root / f"shard-{number}.bin", token_at(number, np.arange(length)))
    return root


def token_at(shard: int, index: Tokens) -> Tokens:
    """What `corpus` holds there."""
    return (index + 37 * shard) % VOCABULARY


def config(root: Path | str, **changes: Any) -> DataConfig:
    """A data section with blocks and windows that a small corpus has several of."""
    fields = {"vocab_size": VOCABULARY, "block_samples": 8, "window_blocks": 2, "validation": str(root)}
    return DataConfig(**{"train": str(root), **fields, **changes})
