"""Where a store lies: places that are gone, names of others, libraries that nobody here knows."""

from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from trainer.contract.config import StoreConfig
from trainer.contract.store import StoreUnavailable, open_store


def test_a_directory_that_is_gone_is_not_an_empty_one(tmp_path: Path) -> None:
    """A file system that was unmounted: nothing is written in its place, and nothing counts as deleted."""
    store = open_store(StoreConfig(url="file://./store"), tmp_path, "run-1")
    store.make_place()
    store.create("commits/a", b"1")
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    file = tmp_path / "file"
    file.write_bytes(b"2")
    for call in (
        lambda: store.create("commits/b", b"1"), lambda: store.put_file("data/c", file),
        lambda: store.read("commits/a"), lambda: store.size("commits/a"), store.probe,
    ):  # fmt: skip
        with pytest.raises(StoreUnavailable, match="mounted"):
            call()
    assert not (tmp_path / "store").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "store")
    assert store.read("commits/a") == b"1"


def test_names_of_others_are_not_listed(tmp_path: Path) -> None:
    """What a file server, an editor or a person leaves among the objects is nobody's object."""
    store = open_store(StoreConfig(url="file://."), tmp_path, "run-1")
    store.make_place()
    store.create("data/a", b"1")
    for name in (".nfs0001", "a copy", "a~"):
        (tmp_path / "run-1/data" / name).write_bytes(b"2")
    assert [item.key for item in store.list("data/")] == ["data/a"]


class _StrangeError(Exception):
    """What a library that we do not know raises: no OSError."""


class _StrangeFileSystem(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A file system of such a library, which is away."""

    protocol = "strange"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """No answer."""
        raise _StrangeError("503 from somewhere")


def test_errors_of_an_unknown_library_mean_no_answer(tmp_path: Path) -> None:
    """They must neither end a supervisor nor be taken for an object that is missing."""
    fsspec.register_implementation("strange", _StrangeFileSystem, clobber=True)
    store = open_store(StoreConfig(url="strange://bucket"), tmp_path, "run-1")
    with pytest.raises(StoreUnavailable, match="503 from somewhere"):
        store.read("commits/a")
