"""Several sources: blended as weighed, added and left out while a run goes on, one shut out; and very little data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer_data.shards import VOCABULARY, config, corpus, llmc, token_at
from trainer.contract.config import DataConfig, SourceConfig
from trainer.contract.plan import Quarantine, Segment
from trainer.data.book import Book, bring_up, changes
from trainer.data.errors import DataError, ExhaustedError
from trainer.data.stream import Batch, DataStream

LENGTH = 16


def _blended(root: Path, **weights: float) -> DataConfig:
    """Sources a, b, c ... of `root`, made where they are not there; each shard's tokens say which it is."""
    for name in weights:
        if not (root / name).exists():
            corpus(root / name)
    sources = tuple(SourceConfig(source=name, url=str(root / name), weight=weight) for name, weight in weights.items())
    return config(root, train=sources, validation=None)


def _open(data: DataConfig, book: Book | None = None, position: int = 0, **plan: Any) -> DataStream:
    return DataStream(data, sample_tokens=LENGTH, book=book, position=position, **plan)


def _samples(batch: Batch) -> list[tuple[int, ...]]:
    return [(shard, *row) for shard, row in zip(batch.shards.tolist(), batch.tokens.tolist(), strict=True)]


def _segment(begin: int, data: DataConfig, book: Book) -> Segment:
    return Segment(from_position=begin, **dict(book.spec(data, LENGTH)))


def test_sources_are_blended_as_weighed_and_named(tmp_path: Path) -> None:
    """Shards are numbered through all sources and shown as source/shard; tokens are those of their shard."""
    stream = _open(_blended(tmp_path, a=3, b=1))
    batch = stream.next_batch(1024)
    assert stream.shard_names[:5] == (
        "a/shard-0.bin",
        "a/shard-1.bin",
        "a/shard-2.bin",
        "a/shard-3.bin",
        "b/shard-0.bin",
    )
    assert int((batch.shards >= 4).sum()) == 256
    first = (batch.tokens[:, 0] - 37 * (batch.shards % 4)) % VOCABULARY
    expected = token_at(0, first[:, None] + np.arange(LENGTH + 1)) + 37 * (batch.shards % 4)[:, None]
    assert (batch.tokens == expected % VOCABULARY).all()


def test_a_blend_resumes_anywhere_with_any_batch_size(tmp_path: Path) -> None:
    """From the position alone."""
    data = _blended(tmp_path, a=0.7, b=0.2, c=0.1)
    whole = _samples(_open(data).next_batch(500))
    read: list[tuple[int, ...]] = []
    for size in (1, 7, 64, 128, 300):
        read += _samples(_open(data, position=len(read)).next_batch(size))
    assert read == whole


def test_a_source_is_added_and_left_out_without_moving_the_others(tmp_path: Path) -> None:
    """Three segments: each source's samples come in the order in which they would have come alone."""
    one, two = _blended(tmp_path, a=1), _blended(tmp_path, a=1, b=1)
    book = bring_up(one, None)
    later = bring_up(two, book)
    segments = (_segment(0, one, book), _segment(100, two, later), _segment(220, one, later))
    samples = _samples(_open(one, later, segments=segments).next_batch(400))
    alone = _samples(_open(one).next_batch(400))
    of_a = [row for row in samples if row[0] < 4]
    assert of_a == alone[: len(of_a)]
    assert samples[:100] == alone[:100]
    of_b = [row for row in samples[100:220] if row[0] >= 4]
    assert abs(len(of_b) - 60) < 30
    assert not any(row[0] >= 4 for row in samples[220:])
    assert [row[1:] for row in of_b] == [
        row[1:] for row in _samples(_open(_blended(tmp_path, b=1)).next_batch(len(of_b)))
    ]


def test_a_shut_source_leaves_the_others_their_proportions(tmp_path: Path) -> None:
    """All its shards are quarantined: the blend goes on with the rest, each in its order."""
    data = _blended(tmp_path, a=4, b=2, c=1)
    shut = tuple(Quarantine(shard=shard, from_position=50) for shard in range(4))
    samples = _samples(_open(data, quarantines=shut).next_batch(950))
    assert all(row[0] >= 4 for row in samples[60:])
    later = [row[0] for row in samples[60:]]
    assert abs(sum(shard >= 8 for shard in later) - len(later) / 3) < 12
    free = [row for row in _samples(_open(data).next_batch(3000)) if 4 <= row[0] < 8]
    shut_b = [row for row in samples if 4 <= row[0] < 8]
    assert shut_b == free[: len(shut_b)]


def test_everything_shut_is_an_error_though_a_source_that_was_left_out_is_not(tmp_path: Path) -> None:
    """What no later segment reads from cannot be waited for."""
    one, two = _blended(tmp_path, a=1), _blended(tmp_path, a=1, b=1)
    later = bring_up(two, bring_up(one, None))
    segments = (_segment(0, two, later), _segment(10, one, later))
    shut = tuple(Quarantine(shard=shard, from_position=0) for shard in range(4))
    stream = _open(one, later, segments=segments, quarantines=shut, position=10)
    with pytest.raises(ExhaustedError, match="all 4 shards are quarantined"):
        stream.next_batch(1)


def test_what_is_listed_keeps_its_number(tmp_path: Path) -> None:
    """New shards come behind all that is known, though they sort before it; the digest of the known ones stands."""
    data = _blended(tmp_path, a=1, b=1)
    book = bring_up(data, None)
    llmc(tmp_path / "a" / "shard--0.bin", token_at(0, np.arange(500)))
    later = bring_up(data, book)
    assert later.shards[: len(book.shards)] == book.shards
    assert [row.shard.name for row in later.shards[len(book.shards) :]] == ["shard--0.bin"]
    assert later.digest(len(book.shards)) == book.digest(len(book.shards)) != later.digest(len(later.shards))
    assert changes(book, later) == ["source a has 1 more shards, which it reads from its next epoch on"]


@pytest.mark.parametrize("length", [900, 1001])
def test_what_is_listed_may_not_change(tmp_path: Path, length: int) -> None:
    """A shard that became longer or shorter is named, with what is allowed."""
    data = _blended(tmp_path, a=1, b=1)
    book = bring_up(data, None)
    llmc(tmp_path / "b" / "shard-0.bin", np.arange(length))
    with pytest.raises(DataError, match=rf"source b: shard shard-0.bin has changed \(tokens 1000 became {length}"):
        bring_up(data, book)


def test_a_larger_vocabulary_or_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """The model has the shape of the first data."""
    data = _blended(tmp_path, a=1)
    book = bring_up(data, None)
    with pytest.raises(DataError, match=r"vocabulary of 2000, the run began with 1000"):
        bring_up(data.model_copy(update={"vocab_size": 2000}), book)
    with pytest.raises(DataError, match="different tokenizers"):
        bring_up(_with_manifests(tmp_path), None)


def _with_manifests(root: Path) -> DataConfig:
    data = _blended(root, a=1, b=1)
    for source in data.sources:
        alone = bring_up(DataConfig(train=source.url, vocab_size=VOCABULARY), None)
        shards = [row.shard.model_dump() for row in alone.shards]
        manifest = {"vocab_size": VOCABULARY, "tokenizer": f"bpe-{source.source}", "shards": shards}
        (Path(source.url) / "manifest.json").write_text(json.dumps(manifest))
    return data


def test_sources_need_names_of_their_own() -> None:
    """Said when the configuration is read."""
    twice = [{"source": "a", "url": "x"}, {"source": "a", "url": "y"}]
    for train in (twice, []):
        with pytest.raises(ValueError, match="each with a name of its own"):
            DataConfig.model_validate({"train": train})


@pytest.mark.parametrize("samples", [1, 3, 8, 9])
def test_very_little_data_is_read_epoch_by_epoch(tmp_path: Path, samples: int) -> None:
    """One sample, fewer than a batch, one block, a block and one: each epoch is whole, in one batch or over several."""
    llmc(tmp_path / "a.bin", np.arange(samples * LENGTH + 1))
    data = config(tmp_path, validation=None)
    rows = [row[1] // LENGTH for row in _samples(_open(data).next_batch(10 * samples))]
    epochs = [rows[n * samples : (n + 1) * samples] for n in range(10)]
    assert all(sorted(epoch) == list(range(samples)) for epoch in epochs)
    assert samples < 3 or len({tuple(epoch) for epoch in epochs}) > 1
    again = [row[1] // LENGTH for row in _samples(_open(data, position=3).next_batch(10 * samples - 3))]
    assert again == rows[3:]
