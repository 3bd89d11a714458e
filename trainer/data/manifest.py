"""The data manifest: which shards there are, in which order, and a digest of what they hold. Torch-free.

`longwatch data prepare` writes manifest.json; for a directory without one it is derived from names and headers.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any, Self

from fsspec.core import url_to_fs
from google_crc32c import value as crc32c
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.contract.config import DataConfig
from trainer.contract.secrets import SecretMissingError, with_secrets
from trainer.data.errors import DataError
from trainer.data.formats import Layout, inspect
from trainer.data.storage import ask

MANIFEST_NAME = "manifest.json"
UNFINISHED_NAME = ".prepare.json"  # lies beside the shards until they are all there
_WHOLE_SHARD_S = 3600.0  # the longest that reading all of a shard may take
_SUFFIXES = (".bin", ".npy", ".ds")


class Shard(BaseModel):
    """One file of tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    format: str
    dtype: str
    offset: int = Field(ge=0)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0)
    crc32c: str | None = None

    @property
    def layout(self) -> Layout:
        """For `formats.read_tokens`."""
        return Layout(self.format, self.dtype, self.offset, self.tokens, self.bytes)

    @property
    def identity(self) -> tuple[str, int, int, str | None]:
        """What decides which tokens it holds, beside its name."""
        return self.dtype, self.tokens, self.bytes, self.crc32c

    def is_same(self, other: "Shard") -> bool:
        """Whether it can hold what the other does; a checksum that only one of them has says nothing."""
        sums = {self.crc32c, other.crc32c} - {None}
        return self.identity[:-1] == other.identity[:-1] and len(sums) < 2


class DataManifest(BaseModel):
    """The shards in their order; a shard's index here is its number everywhere else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    vocab_size: int = Field(ge=2)
    tokenizer: str = ""
    prepared_from: str = Field("", description="digest of sources and options; no part of the data's own digest")
    shards: tuple[Shard, ...] = Field(min_length=1)

    @property
    def digest(self) -> str:
        """SHA-256 over all that decides what a raw position reads."""
        facts = [[shard.name, *shard.identity] for shard in self.shards]
        return hashlib.sha256(json.dumps([self.vocab_size, facts]).encode()).hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)


@dataclass(frozen=True, slots=True)
class Place:
    """A directory of shards on some filesystem."""

    fs: Any
    root: str
    url: str

    @classmethod
    def of(cls, url: str, storage_options: dict[str, Any]) -> Self:
        """Open the filesystem of a URL; nothing is read yet."""
        try:
            fs, root = url_to_fs(url, **with_secrets(storage_options, os.environ))
        except SecretMissingError as error:
            raise DataError(f"{url}: {error}", "set it, or correct data.storage_options") from error
        except (ValueError, ImportError) as error:
            raise DataError(f"{url}: {error}", "use a URL that fsspec knows, and install its filesystem") from error
        return cls(fs, root.rstrip("/"), url)

    def path(self, name: str) -> str:
        """Of a file in it."""
        return f"{self.root}/{name}"


def load_manifest(place: Place, config: DataConfig) -> DataManifest:
    """Read manifest.json, or derive it from the shards.

    Raises:
        DataError: nothing is there, or what is there cannot be used.
    """
    try:
        raw = ask(place.fs, place.url, place.fs.cat_file, place.path(MANIFEST_NAME))
    except FileNotFoundError:
        return _derive(place, config)
    try:
        return DataManifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{place.url}/{MANIFEST_NAME}: {where}: {first['msg']}", "prepare the data again") from error


def _derive(place: Place, config: DataConfig) -> DataManifest:
    try:
        paths = ask(place.fs, place.url, place.fs.ls, place.root, detail=False)
    except FileNotFoundError as error:
        raise DataError(f"{place.url}: no such directory", "prepare data into it, or correct the URL") from error
    names = sorted(path.rsplit("/", 1)[-1] for path in paths)
    if UNFINISHED_NAME in names:
        raise DataError(f"{place.url}: its preparation is not finished", "run the same `data prepare` again")
    names = [name for name in names if name.endswith(_SUFFIXES)]
    if not names:
        raise DataError(
            f"{place.url}: holds no token shards ({', '.join(_SUFFIXES)})", "run `longwatch data prepare` into it"
        )
    if config.vocab_size is None:
        raise DataError(f"{place.url}: has no {MANIFEST_NAME}, so the vocabulary is unknown", "set data.vocab_size")
    shards = [_entry(name, inspect(place.fs, place.path(name), config.format)) for name in names]
    return DataManifest(vocab_size=config.vocab_size, shards=tuple(shards))


def _entry(name: str, layout: Layout) -> Shard:
    return Shard(
        name=name, format=layout.format, dtype=layout.dtype, offset=layout.offset, tokens=layout.tokens,
        bytes=layout.bytes,
    )  # fmt: skip


def verify(config: DataConfig, *, deep: bool = False) -> list[DataError]:
    """Everything that is wrong with the training and validation data, all at once.

    Args:
        config: the data section.
        deep: also read every byte and compare checksums, where the manifest has them.
    """
    problems: list[DataError] = []
    for url, section in config.places():
        try:
            place = Place.of(url, config.storage_options)
            manifest = load_manifest(place, section)
        except DataError as error:
            problems.append(error)
            continue
        for shard in manifest.shards:
            problem = _shard_problem(place, shard, deep)
            problems += [problem] if problem is not None else []
    return problems


def _shard_problem(place: Place, shard: Shard, deep: bool) -> DataError | None:
    path = place.path(shard.name)
    try:
        layout = inspect(place.fs, path, shard.format)  # type: ignore[arg-type]
        if layout.tokens != shard.tokens or layout.bytes != shard.bytes:
            fact = f"{path}: has {layout.tokens} tokens, the manifest says {shard.tokens}"
            return DataError(fact, "bring back the shard that was prepared, or prepare again", shard=shard.name)
        if deep and shard.crc32c is not None and shard.crc32c != _whole_crc32c(place, path):
            return DataError(f"{path}: its checksum is not the manifest's", "bring it back whole", shard=shard.name)
    except DataError as error:
        return error
    return None


def _whole_crc32c(place: Place, path: str) -> str:
    return f"{crc32c(ask(place.fs, path, place.fs.cat_file, path, timeout_s=_WHOLE_SHARD_S)):08x}"
