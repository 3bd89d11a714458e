"""Where each tensor of a snapshot lies: whole safetensors files one after another, so that saving is copying bytes.

Torch-free. A file is eight bytes of length, a JSON header, and the tensors without gaps, those of the widest elements
first so that each is aligned (the layout of the safetensors project, whose own reader loads them).
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pydantic import Field

from trainer.contract.manifest import Digest, Health, Parent
from trainer.contract.plan import Contract

OBJECT_BYTES = 256 << 20  # large enough for S3's throughput, small enough to be sent again

#: torch's names to those of safetensors.
_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL", "complex64": "C64",
}  # fmt: skip
_ALIGNMENT = 64
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, dtype (torch's, without prefix), shape and size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


class PlacedTensor(Contract):
    """A tensor within its object: bytes [begin, end) of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int = Field(ge=0)
    end: int = Field(ge=0)


class PlacedObject(Contract):
    """A safetensors file within the payload; its header has `header_bytes`."""

    offset: int = Field(ge=0)
    size: int = Field(ge=0)
    header_bytes: int = Field(ge=0)
    tensors: tuple[PlacedTensor, ...]


class SnapshotDescription(Contract):
    """What a slot holds: the manifest-to-be without checksums and norms, which the writer process adds."""

    run_id: str
    step: int
    epoch: int
    attempt: int
    tokens: int
    position: int
    nonce: str = Field(pattern=r"^[0-9a-f]{32}$")
    loaded: Parent | None
    config_digest: Digest | str
    health: Health
    objects: tuple[PlacedObject, ...]
    extra_json: str


@dataclass(frozen=True, slots=True)
class Layout:
    """A payload: its objects, their headers, and its size."""

    objects: tuple[PlacedObject, ...]
    headers: tuple[bytes, ...]
    bytes: int


def plan_layout(tensors: Iterable[TensorSpec], object_bytes: int = OBJECT_BYTES) -> Layout:
    """Place tensors, in order, in objects of at most `object_bytes`; a larger tensor is an object of its own.

    Raises:
        ValueError: a dtype that safetensors files do not have.
    """
    objects: list[PlacedObject] = []
    headers: list[bytes] = []
    offset = 0
    for group in _grouped(tensors, object_bytes):
        header, placed = _place(group)
        size = placed[-1].end
        objects.append(PlacedObject(offset=offset, size=size, header_bytes=len(header), tensors=placed))
        headers.append(header)
        offset += -(-size // _PAGE_BYTES) * _PAGE_BYTES
    return Layout(tuple(objects), tuple(headers), offset)


def _grouped(tensors: Iterable[TensorSpec], limit_bytes: int) -> Iterator[list[TensorSpec]]:
    group: list[TensorSpec] = []
    filled = 0
    for tensor in tensors:
        if group and filled + tensor.bytes > limit_bytes:
            yield group
            group, filled = [], 0
        group.append(tensor)
        filled += tensor.bytes
    if group:
        yield group


def _place(group: list[TensorSpec]) -> tuple[bytes, tuple[PlacedTensor, ...]]:
    widest_first = sorted(group, key=_element_bytes, reverse=True)
    described: dict[str, object] = {}
    ends: list[int] = []
    end = 0
    for tensor in widest_first:
        if tensor.dtype not in _CODES:
            raise ValueError(f"tensor {tensor.name} is {tensor.dtype}, which safetensors files do not have")
        begin, end = end, end + tensor.bytes
        ends.append(end)
        described[tensor.name] = {
            "dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    base = len(header)
    placed = tuple(
        PlacedTensor(name=t.name, dtype=t.dtype, shape=t.shape, begin=base + end - t.bytes, end=base + end)
        for t, end in zip(widest_first, ends, strict=True)
    )
    return header, placed


def _element_bytes(tensor: TensorSpec) -> int:
    count = 1
    for length in tensor.shape:
        count *= length
    return tensor.bytes // count if count else 0
