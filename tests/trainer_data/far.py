"""A place of shards that is far away: local files behind a protocol of its own, which fails or is silent as told."""

import threading
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tests.trainer_data.shards import config
from trainer.contract.config import DataConfig


class FarFileSystem(LocalFileSystem):  # type: ignore[misc]
    """`far://` paths are local ones. Its state is that of the class, since fsspec makes the instances."""

    protocol = "far"
    failures: ClassVar[int] = 0  # reads of tokens that fail from now on
    reads: ClassVar[list[tuple[str, int, int]]] = []  # of tokens: shard and bytes, failed ones too
    answers: ClassVar[threading.Event] = threading.Event()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Tokens lie behind a header, so reads that begin at 0 are of headers: they never fail."""
        cls = type(self)
        if start:
            cls.reads.append((Path(path).name, start, end or 0))
            cls.answers.wait()
            if cls.failures:
                cls.failures -= 1
                raise ConnectionResetError("connection reset")
        return bytes(super().cat_file(path, start=start, end=end, **kwargs))

    @classmethod
    def settle(cls) -> None:
        """Everything answers again, nothing has been read."""
        cls.failures = 0
        cls.reads = []
        cls.answers.set()


fsspec.register_implementation("far", FarFileSystem, clobber=True)


def far(root: Path, **changes: Any) -> DataConfig:
    """A data section whose shards lie far away."""
    return config(f"far://{root}", **changes)
