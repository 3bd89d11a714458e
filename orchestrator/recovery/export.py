"""The weights of a checkpoint as one safetensors file, for those who do not have Longwatch. Torch-free.

Names are the model's own, tied tensors are there once. Whatever is read is checked against its CRC32C before a byte of
it is used, the file appears whole or not at all, and no more than one object of the store is held, on disk.
"""

import json
import math
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from orchestrator.errors import OrchestratorError
from orchestrator.recovery.catalog import read_manifest
from trainer.contract.manifest import Manifest, ManifestError, ObjectEntry, TensorEntry, crc32c
from trainer.contract.store import ObjectMissing, Store

Dtype = Literal["as-is", "bf16", "fp32"]

_MODEL = "model."  # what the trainer puts before the names of weights, as against "optim."
_CHUNK_BYTES = 16 << 20  # a multiple of every element's size
_TARGETS = {"bf16": "bfloat16", "fp32": "float32"}
#: dtypes as the manifest names them: (as safetensors does, bytes of an element)
_DTYPES = {
    "float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "int64": ("I64", 8),
    "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1),
}  # fmt: skip
_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})


class ExportError(OrchestratorError):
    """The weights could not be written out; nothing was left behind."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    path: Path
    commit: str
    step: int
    tensors: int
    bytes: int


@dataclass(frozen=True, slots=True)
class _Target:
    """One tensor of the file: where it comes from, what it becomes, and its first byte behind the header."""

    source: TensorEntry
    dtype: str
    begin: int
    bytes: int

    @property
    def name(self) -> str:
        return self.source.name.removeprefix(_MODEL)


def export_weights(
    store: Store, commit: str, out: Path, *, dtype: Dtype = "as-is", force: bool = False,
    about: Mapping[str, str] | None = None,
) -> Exported:  # fmt: skip
    """Write the weights of a commit to `out`. `dtype` converts floating tensors, rounding to the nearest even.

    `about` is added to the metadata of the file: what its reader must know and no tensor shows.

    Raises:
        ExportError: the checkpoint is not there or not intact, has no weights, or `out` cannot be written or exists.
        StoreError: the store cannot be asked.
    """
    if out.exists() and not force:
        raise _taken(out)
    try:
        manifest = read_manifest(store, commit).manifest
        targets = _layout(manifest, dtype)
        header = _header(manifest, targets, about or {})
        with _appearing(out, force) as file:
            file.write(header)
            for index, entry in enumerate(manifest.objects):
                if wanted := [target for target in targets if target.source.object == index]:
                    _copy(store, entry, wanted, file, len(header))
    except ObjectMissing as error:
        raise ExportError(f"checkpoint {commit} is not whole: {error.key} is missing; choose another one") from error
    except ManifestError as error:
        raise ExportError(f"checkpoint {commit} cannot be used: {error}; choose another one") from error
    except FileExistsError as error:
        raise _taken(out) from error
    except OSError as error:
        raise ExportError(f"{out} cannot be written ({error.strerror}); choose another place") from error
    size = len(header) + sum(target.bytes for target in targets)
    return Exported(out, commit, manifest.step, len(targets), size)


def _taken(out: Path) -> ExportError:
    return ExportError(f"{out} exists already; choose another name, or replace it with --force")


# -- the file ---------------------------------------------------------------------------------------------------------


def _layout(manifest: Manifest, dtype: Dtype) -> list[_Target]:
    """Where each tensor goes. Wide elements come first, so that each lies at a multiple of its size."""
    chosen = [(source, _becomes(source.dtype, dtype)) for source in manifest.tensors if source.name.startswith(_MODEL)]
    if not chosen:
        raise ExportError(f"checkpoint {manifest.commit} holds no weights that Longwatch's trainer has named")
    if odd := {source.dtype for source, _ in chosen} - _DTYPES.keys():
        raise ExportError(f"checkpoint {manifest.commit} holds dtypes that are not exported: {', '.join(sorted(odd))}")
    targets, begin = [], 0
    for source, becomes in sorted(chosen, key=lambda pair: -_DTYPES[pair[1]][1]):
        size = math.prod(source.shape) * _DTYPES[becomes][1]
        targets.append(_Target(source, becomes, begin, size))
        begin += size
    return targets


def _becomes(dtype: str, wanted: Dtype) -> str:
    return _TARGETS[wanted] if wanted != "as-is" and dtype in _FLOATS else dtype


def _header(manifest: Manifest, targets: list[_Target], about: Mapping[str, str]) -> bytes:
    """Length as 8 bytes, then JSON, padded so that the data begins at a multiple of 8 (the safetensors format)."""
    metadata = {
        "format": "pt",  # what readers look for before they take it for weights of torch
        "step": str(manifest.step),
        "run_id": manifest.run_id,
        "commit": manifest.commit,
        "config_digest": manifest.config_digest,
        "tokens": str(manifest.tokens),
        **about,
    }
    entries: dict[str, Any] = {"__metadata__": metadata}
    for target in targets:
        entries[target.name] = {
            "dtype": _DTYPES[target.dtype][0],
            "shape": target.source.shape,
            "data_offsets": [target.begin, target.begin + target.bytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


@contextmanager
def _appearing(out: Path, force: bool) -> Iterator[IO[bytes]]:
    """A file that gets its name when all is written and durable, and never in place of another by mistake."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if force:
            part.replace(out)
        else:
            out.hardlink_to(part)
    finally:
        part.unlink(missing_ok=True)


# -- what is read -----------------------------------------------------------------------------------------------------


def _copy(store: Store, entry: ObjectEntry, targets: list[_Target], file: IO[bytes], start: int) -> None:
    with tempfile.TemporaryFile(dir=Path(file.name).parent) as fetched:
        _fetch(store, entry, fetched)
        data, spans = _spans(fetched)
        for target in targets:
            begin, end = spans[target.source.name]
            fetched.seek(data + begin)
            file.seek(start + target.begin)
            for _ in range(begin, end, _CHUNK_BYTES):
                chunk = fetched.read(min(_CHUNK_BYTES, data + end - fetched.tell()))
                file.write(_converted(chunk, target.source.dtype, target.dtype))


def _fetch(store: Store, entry: ObjectEntry, file: IO[bytes]) -> None:
    """An object as a local file. What a first reading finds wrong is read again: a bad transfer is no damage."""
    for _ in range(2):
        file.seek(0)
        file.truncate()
        crc = 0
        for chunk in store.stream(entry.key, entry.size):
            crc = crc32c(chunk, crc)
            file.write(chunk)
        if (file.tell(), crc) == (entry.size, entry.crc32c):
            return
    raise ExportError(
        f"{entry.key} does not match its size and CRC32C: it was changed after the save; "
        "choose another checkpoint (`longwatch checkpoints verify --all` says which are sound)"
    )


def _spans(file: IO[bytes]) -> tuple[int, dict[str, tuple[int, int]]]:
    """Where the data begins, and each tensor's [begin, end) in it. The CRC has vouched for the bytes."""
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    entries = json.loads(file.read(length))
    return 8 + length, {name: entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"}


def _converted(chunk: bytes, dtype: str, wanted: str) -> bytes:
    """Elements in another dtype; bfloat16, which numpy lacks, is the upper half of float32."""
    if dtype == wanted:
        return chunk
    import numpy as np  # not at the start of every command

    if dtype == "bfloat16":
        single = (np.frombuffer(chunk, "<u2").astype("<u4") << 16).view("<f4")
    else:
        single = np.frombuffer(chunk, f"<f{_DTYPES[dtype][1]}").astype("<f4")
    bits = single.view("<u4")
    if wanted == "float32":
        return bits.tobytes()
    halves: bytes = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()  # ties to even
    return halves
