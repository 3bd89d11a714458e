"""Where prepared shards go: whole files, or none of that name, on any fsspec URL. Torch-free."""

import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from google_crc32c import value as crc32c

from trainer.data.errors import PrepareError
from trainer.data.formats import LLMC_HEADER_BYTES
from trainer.data.manifest import Shard
from trainer.data.storage import storage_errors
from trainer.data.tokenize import Ids

_MAGIC = {"<u2": (20240520, 1), "<u4": (20240801, 7)}
_PART = ".part-"


class Output:
    """A directory that shards are written into."""

    def __init__(self, url: str) -> None:
        try:
            self._fs, root = url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise PrepareError(f"{url}: {error}", "use a URL that fsspec knows, and install its filesystem") from error
        self._root = str(root).rstrip("/")
        self.url = url
        self._errors = storage_errors(self._fs)

    def names(self) -> list[str]:
        """Files in it, sorted; none if there is no such directory. Left-overs of a killed writer do not count."""
        try:
            self._fs.invalidate_cache(self._root)
            found = [str(path).rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        except self._errors as error:
            raise self._failed(error) from error
        return sorted(name for name in found if not name.startswith(_PART))

    def read(self, name: str) -> bytes:
        """A small file."""
        try:
            return bytes(self._fs.cat_file(f"{self._root}/{name}"))
        except self._errors as error:
            raise self._failed(error) from error

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file: never a half-written one under its name, whenever this process dies.

        Raises:
            PrepareError: it cannot be written.
        """
        try:
            if isinstance(self._fs, LocalFileSystem):
                _write_local(Path(self._root, name), data)
            else:
                self._fs.pipe_file(f"{self._root}/{name}", data)
        except self._errors as error:
            raise self._failed(error) from error

    def write_shard(self, name: str, tokens: Ids, dtype: str) -> Shard:
        """A shard in llm.c's format, and its line in the manifest."""
        magic, version = _MAGIC[dtype]
        header = np.zeros(LLMC_HEADER_BYTES // 4, dtype="<i4")
        header[:3] = (magic, version, len(tokens))
        data = header.tobytes() + tokens.astype(dtype, copy=False).tobytes()
        self.write(name, data)
        return Shard(
            name=name, format="llmc", dtype=dtype, offset=LLMC_HEADER_BYTES, tokens=len(tokens), bytes=len(data),
            crc32c=f"{crc32c(data):08x}",
        )  # fmt: skip

    def remove(self, name: str) -> None:
        """Remove a file that is there."""
        try:
            self._fs.rm_file(f"{self._root}/{name}")
        except self._errors as error:
            raise self._failed(error) from error

    def _failed(self, error: Any) -> PrepareError:
        reason = getattr(error, "strerror", None) or error
        return PrepareError(f"{self.url}: {reason}", "free space, change its owner, or choose another --out")


def _write_local(target: Path, data: bytes) -> None:
    """Write a private file, sync it, rename it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left_over in target.parent.glob(f"{_PART}{target.name}-*"):
        left_over.unlink(missing_ok=True)
    part = target.with_name(f"{_PART}{target.name}-{uuid.uuid4().hex}")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
