"""The data of a run: every shard that it has ever used, in the order of first use, from whichever source. Torch-free.

A shard's number in this list is its number everywhere else, for the whole run: new shards and sources are appended,
wherever they sort in their directory, and what is listed may not change, since positions, quarantines and records
refer to it. Places may: data that has moved is the same data. The list lies in the run directory.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.contract.config import DataConfig
from trainer.contract.plan import OrderSpec, Segment, Share
from trainer.data.errors import DataError
from trainer.data.manifest import DataManifest, Place, Shard, load_manifest
from trainer.data.timeline import SourceShard, Timeline


class Listed(BaseModel):
    """A shard and the source that it belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    shard: Shard


class Book(BaseModel):
    """All shards of a run by number, and where each source was last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    vocab_size: int = Field(ge=2)
    tokenizer: str = ""
    places: dict[str, str]
    shards: tuple[Listed, ...]

    def digest(self, num_shards: int) -> str:
        """SHA-256 over all that decides what the first so many shards hold."""
        facts = [[row.source, row.shard.name, *row.shard.identity] for row in self.shards[:num_shards]]
        return hashlib.sha256(json.dumps([self.vocab_size, facts]).encode()).hexdigest()

    def names(self) -> tuple[str, ...]:
        """Shards by number, as people are shown them."""
        several = len(self.places) > 1
        return tuple(f"{row.source}/{row.shard.name}" if several else row.shard.name for row in self.shards)

    def spec(self, config: DataConfig, sample_tokens: int) -> OrderSpec:
        """The order that a configuration asks for, over all shards there are."""
        return OrderSpec(
            manifest=self.digest(len(self.shards)),
            num_shards=len(self.shards),
            mix=tuple(Share(source=source.source, weight=source.weight) for source in config.sources),
            seed=config.seed,
            sample_tokens=sample_tokens,
        )


def bring_up(config: DataConfig, known: Book | None) -> Book:
    """The book as it is with the configured data; what was known keeps its numbers.

    Raises:
        DataError: data is missing, has changed since it was listed, or does not belong together.
    """
    manifests = {
        source.source: load_manifest(Place.of(source.url, config.storage_options), config.of(source))
        for source in config.sources
    }
    vocab_size, tokenizer = _vocabulary(manifests, known)
    shards = list(known.shards) if known is not None else []
    listed = {(row.source, row.shard.name) for row in shards}
    for name, manifest in manifests.items():
        _refuse_changed(name, manifest, shards)
        fresh = (shard for shard in manifest.shards if (name, shard.name) not in listed)
        shards += [Listed(source=name, shard=shard) for shard in fresh]
    before = known.places if known is not None else {}
    places = {**before, **{source.source: source.url for source in config.sources}}
    return Book(vocab_size=vocab_size, tokenizer=tokenizer, places=places, shards=tuple(shards))


def changes(known: Book, book: Book) -> list[str]:
    """What is new in a book, in words."""
    found = []
    for name, url in book.places.items():
        added = sum(row.source == name for row in book.shards) - sum(row.source == name for row in known.shards)
        if name not in known.places:
            found.append(f"source {name} is new, with {added} shards")
            continue
        if added:
            found.append(f"source {name} has {added} more shards, which it reads from its next epoch on")
        if known.places[name] != url:
            found.append(f"source {name} has moved to {url}")
    return found


def read_book(path: Path) -> Book | None:
    """The book of a run directory; None if there is none yet.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return Book.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        raise DataError(f"{path}: cannot be read ({error})", "bring it back, or start from scratch") from error


def segments_of(
    segments: tuple[Segment, ...], book: Book, config: DataConfig, sample_tokens: int
) -> tuple[Segment, ...]:  # fmt: skip
    """A plan's segments, or the one that the configuration asks for.

    Raises:
        DataError: they were made for other data.
    """
    if not segments:
        return (Segment(from_position=0, **dict(book.spec(config, sample_tokens))),)
    for segment in segments:
        known = segment.num_shards <= len(book.shards) and segment.manifest == book.digest(segment.num_shards)
        if not known or segment.sample_tokens != sample_tokens:
            raise DataError(
                f"from raw position {segment.from_position} on: is not the data that this run began with (plan "
                f"{segment.manifest[:12]}, {segment.num_shards} shards of {segment.sample_tokens} tokens a sample)",
                "bring the data and the run directory back as they were, or start a new run",
            )
    return segments


def timeline_of(segments: tuple[Segment, ...], book: Book, config: DataConfig) -> Timeline:
    """The raw order of a run.

    Raises:
        DataError: a source that the segments draw from holds not even one sample.
    """
    length = segments[-1].sample_tokens
    shards = [SourceShard(row.source, max(0, (row.shard.tokens - 1) // length)) for row in book.shards]
    for segment in segments:
        full = {shard.source for shard in shards[: segment.num_shards] if shard.samples}
        for share in segment.mix:
            if share.source not in full:
                raise DataError(
                    f"{book.places[share.source]}: no shard holds even one sample of {length + 1} tokens",
                    "prepare more data, or lower batch.sequence_tokens",
                )
    return Timeline(segments, shards, block_samples=config.block_samples, window_blocks=config.window_blocks)


def _vocabulary(manifests: Mapping[str, DataManifest], known: Book | None) -> tuple[int, str]:
    tokenizers = {name: manifest.tokenizer for name, manifest in manifests.items() if manifest.tokenizer}
    if known is not None and known.tokenizer:
        tokenizers = {"what the run has read": known.tokenizer, **tokenizers}
    if len(set(tokenizers.values())) > 1:
        said = ", ".join(f"{name}: {tokenizer}" for name, tokenizer in tokenizers.items())
        raise DataError(f"data.train: made with different tokenizers ({said})", "prepare all sources with one")
    tokenizer = next(iter(tokenizers.values()), "")
    largest, name = max((manifest.vocab_size, name) for name, manifest in manifests.items())
    if known is None:
        return largest, tokenizer
    if largest > known.vocab_size:
        what = f"source {name}: has a vocabulary of {largest}, the run began with {known.vocab_size}"
        raise DataError(what, "prepare it with the run's tokenizer, or start a new run")
    return known.vocab_size, tokenizer


def _refuse_changed(name: str, manifest: DataManifest, shards: list[Listed]) -> None:
    found = {shard.name: shard for shard in manifest.shards}
    for listed in (row.shard for row in shards if row.source == name):
        now = found.get(listed.name)
        if now is not None and now.is_same(listed):
            continue
        fact = "is missing" if now is None else f"has changed ({_difference(listed, now)})"
        raise DataError(
            f"source {name}: shard {listed.name} {fact}: these are not the shards that the run began with, and every "
            "position in the data would mean another sample",
            "bring it back as it was (shards may be added, sources added, re-weighted, moved or left out), or give the "
            "run another name",
            shard=listed.name,
        )


def _difference(old: Shard, new: Shard) -> str:
    pairs = ((name, getattr(old, name), getattr(new, name)) for name in ("dtype", "tokens", "bytes", "crc32c"))
    return ", ".join(f"{name} {before} became {after}" for name, before, after in pairs if before != after)
