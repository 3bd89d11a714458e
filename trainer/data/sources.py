"""Texts to prepare: which files there are, and their documents in pieces of bounded size. Torch-free.

A text file is one document, a jsonl line is one. A document comes in pieces of at most about 1 MiB, cut behind a line
break where there is one, so that no file needs to fit into memory. The pieces from an offset on are the same whether
or not those before it were read: a preparation that was killed goes on from an offset.
"""

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from trainer.data.errors import PrepareError
from trainer.data.storage import storage_errors

PIECE_BYTES = 1 << 20
DEFAULT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
_COMPRESSED = (".gz", ".bz2", ".xz")


@dataclass(frozen=True, slots=True)
class Source:
    """One file of text. `name` is its path below what the user named, the same on every machine."""

    fs: Any
    path: str
    name: str
    bytes: int

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a JSON object."""
        return _plain(self.name).endswith((".jsonl", ".ndjson"))


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document: `first` opens it. `offset` is where it begins in its source, in (decompressed) bytes."""

    source: int
    offset: int
    data: bytes
    first: bool


def collect(given: Sequence[str], suffixes: Sequence[str] = DEFAULT_SUFFIXES) -> list[Source]:
    """The files that URLs, directories and patterns name: in the order given, by name within each, none twice.

    Raises:
        PrepareError: one of them names nothing that can be read.
    """
    found: dict[str, Source] = {}
    for url in given:
        new = _collect_one(url, tuple(suffixes))
        if not new:
            wanted = ", ".join(suffixes)
            raise PrepareError(
                f"{url}: no source files ({wanted})", "correct the path, or name a --suffix that is there"
            )
        for source in new:
            found.setdefault(source.path, source)
    return list(found.values())


def pieces(source: Source, number: int, offset: int, field: str) -> Iterator[Piece]:
    """The pieces of one source from an offset on, which is one that an earlier piece had.

    Raises:
        PrepareError: it cannot be read, or a line is not what jsonl should hold.
    """
    errors: tuple[type[Exception], ...] = (*storage_errors(source.fs), EOFError, zlib.error)
    try:
        with source.fs.open(source.path, "rb", compression="infer") as file:
            file.seek(offset)
            cut = _json_pieces(source, file, offset, field) if source.is_jsonl else _text_pieces(file, offset)
            for begin, data, first in cut:
                yield Piece(number, begin, data, first)
    except errors as error:
        raise PrepareError(f"{source.path}: cannot be read ({error})", "check its owner, mode and content") from error


def first_piece(source: Source, field: str) -> bytes:
    """How a text begins: by this, a document is told from others."""
    return next((piece.data for piece in pieces(source, 0, 0, field)), b"")


def _text_pieces(file: Any, offset: int) -> Iterator[tuple[int, bytes, bool]]:
    held = b""
    while True:
        held += _read(file, PIECE_BYTES - len(held))
        if not held:
            return
        length = len(held) if len(held) < PIECE_BYTES else _cut(held)
        yield offset, held[:length], offset == 0
        offset += length
        held = held[length:]


def _cut(data: bytes) -> int:
    """Behind the last line break, or else before a character that is not complete."""
    line = data.rfind(b"\n") + 1
    if line:
        return line
    end = len(data)
    while end > len(data) - 4 and data[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if data[end - 1] >= 0xC0 else len(data)


def _read(file: Any, count: int) -> bytes:
    """Exactly so many bytes, fewer only at the end."""
    parts = []
    while count > 0 and (part := file.read(count)):
        parts.append(bytes(part))
        count -= len(part)
    return b"".join(parts)


def _json_pieces(source: Source, file: Any, offset: int, field: str) -> Iterator[tuple[int, bytes, bool]]:
    """One piece a line: a line of jsonl fits into memory."""
    while line := file.readline():
        text = _text_of(source, line, offset, field) if line.strip() else b""
        if text:
            yield offset, text, True
        offset += len(line)


def _text_of(source: Source, line: bytes, offset: int, field: str) -> bytes:
    try:
        row = json.loads(line)
    except ValueError as error:
        what = f"{source.path}: the line at byte {offset} is not JSON ({error})"
        raise PrepareError(what, "correct or remove the line") from error
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        what = f"{source.path}: the line at byte {offset} has no text in {field!r}"
        raise PrepareError(what, "name the field that holds the text with --field")
    return text.encode("utf-8", errors="replace")


def _collect_one(url: str, suffixes: tuple[str, ...]) -> list[Source]:
    try:
        fs, root = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise PrepareError(f"{url}: {error}", "use a URL that fsspec knows, and install its filesystem") from error
    try:
        if fs.isfile(root):
            return [Source(fs, root, root.rsplit("/", 1)[-1], int(fs.size(root) or 0))]
        if any(mark in root for mark in "*?[") and not fs.exists(root):
            paths = sorted(path for path in fs.glob(root) if fs.isfile(path))
            return [Source(fs, path, path.rsplit("/", 1)[-1], int(fs.size(path) or 0)) for path in paths]
        if not fs.isdir(root):
            raise PrepareError(f"{url}: does not exist", "correct the path")
        return sorted(_walk(fs, root, suffixes), key=lambda source: source.name)
    except storage_errors(fs) as error:
        raise PrepareError(f"{url}: cannot be read ({error})", "check its owner and mode, or the server") from error


def _walk(fs: Any, root: str, suffixes: tuple[str, ...]) -> Iterator[Source]:
    """Files below a directory, by suffix; hidden ones are left out, and links to directories are not followed."""
    base = root.rstrip("/") + "/"
    for path, size in _local_files(root) if isinstance(fs, LocalFileSystem) else _remote_files(fs, root):
        name = path.removeprefix(base)
        if _plain(name).endswith(suffixes) and not any(part.startswith(".") for part in name.split("/")):
            yield Source(fs, path, name, size)


def _local_files(root: str) -> Iterator[tuple[str, int]]:
    def refuse(error: OSError) -> None:
        raise error

    for directory, _, names in os.walk(root, onerror=refuse):
        for name in names:
            path = Path(directory, name)
            if path.is_file():
                yield path.as_posix(), path.stat().st_size


def _remote_files(fs: Any, root: str) -> Iterator[tuple[str, int]]:
    for path, info in fs.find(root, detail=True).items():
        yield path, int(info["size"] or 0)


def _plain(name: str) -> str:
    """The name without the suffix of its compression."""
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return name
