"""The stream: the right tokens, the same after a restart, nothing shut out is read, bad data is named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from tests.trainer_data.shards import VOCABULARY, config, corpus, llmc, token_at
from trainer.contract.config import DataConfig
from trainer.contract.plan import Quarantine, Segment, SkipRange
from trainer.data.errors import DataError, ExhaustedError, TokenRangeError
from trainer.data.stream import Batch, DataStream, validation_batches

LENGTH = 16


def _open(data: DataConfig, position: int = 0, skips: tuple[SkipRange, ...] = (),
          quarantines: tuple[Quarantine, ...] = (), segments: tuple[Segment, ...] = ()) -> DataStream:  # fmt: skip
    return DataStream(
        data, sample_tokens=LENGTH, segments=segments, skips=skips, quarantines=quarantines, position=position
    )


def _rows(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(row) for row in batch.tokens.tolist()]


def test_an_epoch_reads_every_token_once_as_a_target(tmp_path: Path) -> None:
    """Samples are windows of T + 1 tokens with stride T: inputs and targets tile each shard."""
    stream = _open(config(corpus(tmp_path)))
    batch = stream.next_batch(stream.samples_per_epoch)
    assert batch.tokens.shape == (stream.samples_per_epoch, LENGTH + 1)
    assert batch.tokens.dtype == np.int64
    for shard, samples in enumerate(stream.shard_samples):
        rows = sorted(_rows(batch)[i] for i in np.flatnonzero(batch.shards == shard))
        index = np.arange(LENGTH + 1)
        assert rows == sorted(tuple(token_at(shard, index + n * LENGTH).tolist()) for n in range(samples))


def test_batches_tile_and_a_restart_goes_on(tmp_path: Path) -> None:
    """From the position alone, with other batch sizes, over the end of the epoch."""
    data = config(corpus(tmp_path))
    whole = _rows(_open(data).next_batch(400))
    read, position = [], 0
    for size in (1, 7, 64, 128, 200):
        batch = _open(data, position).next_batch(size)
        assert (batch.begin, batch.end) == (position, position + size)
        read += _rows(batch)
        position = batch.end
    assert read == whole


def test_torchs_generator_is_left_alone(tmp_path: Path) -> None:
    """Opening and reading draw nothing, or dropout would differ after a resume."""
    before = torch.get_rng_state()
    stream = _open(config(corpus(tmp_path)))
    stream.next_batch(4)
    assert torch.equal(torch.get_rng_state(), before)


def test_skipped_and_quarantined_are_left_out_from_the_next_batch_on(tmp_path: Path) -> None:
    """`apply` on a running stream gives what a restart under the new plan gives."""
    data = config(corpus(tmp_path))
    stream = _open(data)
    stream.next_batch(20)
    skips, shut = (SkipRange(begin=30, end=90),), (Quarantine(shard=2, from_position=20),)
    stream.apply(skips=skips, quarantines=shut)
    batch = stream.next_batch(40)
    assert _rows(batch) == _rows(_open(data, 20, skips, shut).next_batch(40))
    assert not set(batch.positions.tolist()) & set(range(30, 90))
    assert 2 not in batch.shards
    assert stream.position == batch.end


def test_a_quarantined_shard_is_not_touched(tmp_path: Path) -> None:
    """Its file may hold garbage or be gone: blocks that it shares with neighbours are read without it."""
    data = config(corpus(tmp_path))
    stream = _open(data, quarantines=(Quarantine(shard=1, from_position=0),))
    (tmp_path / "shard-1.bin").unlink()
    expected = stream.samples_per_epoch - stream.shard_samples[1]
    assert 1 not in stream.next_batch(expected).shards


def test_a_shard_that_vanished_is_named(tmp_path: Path) -> None:
    """The error says which and what to do."""
    stream = _open(config(corpus(tmp_path)))
    (tmp_path / "shard-1.bin").unlink()
    with pytest.raises(DataError, match=r"shard-1\.bin") as caught:
        stream.next_batch(stream.samples_per_epoch)
    assert caught.value.remedy


def test_a_token_outside_the_vocabulary_is_named_before_it_reaches_a_model(tmp_path: Path) -> None:
    """Shard and sample, so that it can be looked at."""
    data = config(corpus(tmp_path))
    tokens = token_at(1, np.arange(777))
    tokens[5 * LENGTH + 3] = VOCABULARY
    llmc(tmp_path / "shard-1.bin", tokens)
    with pytest.raises(TokenRangeError, match=r"shard-1\.bin, sample 5: token 1000") as caught:
        _open(data).next_batch(190)
    assert (caught.value.sample, caught.value.token, caught.value.vocab_size) == (5, VOCABULARY, VOCABULARY)


def test_a_bad_sample_that_is_skipped_stops_nobody(tmp_path: Path) -> None:
    """Only what is handed out is judged, though blocks are read whole."""
    data = config(corpus(tmp_path))
    probe = _open(data).next_batch(20)
    shard = int(probe.shards[7])
    first = int(probe.tokens[7, 0]) - 37 * shard
    bad = token_at(shard, np.arange((1000, 777, 1300, 40)[shard]))
    bad[first + 5] = 60_000
    llmc(tmp_path / f"shard-{shard}.bin", bad)
    batch = _open(data, skips=(SkipRange(begin=7, end=8),)).next_batch(19)
    assert _rows(batch) == [row for i, row in enumerate(_rows(probe)) if i != 7]


def test_negative_tokens_are_outside_too(tmp_path: Path) -> None:
    """A signed .npy can hold them."""
    np.save(tmp_path / "a.npy", np.full(100, -1, dtype=np.int32))
    with pytest.raises(TokenRangeError, match="token -1"):
        _open(config(tmp_path)).next_batch(1)


def test_all_shards_quarantined(tmp_path: Path) -> None:
    """An error at the first batch that finds nothing."""
    shut = tuple(Quarantine(shard=shard, from_position=0) for shard in range(4))
    with pytest.raises(ExhaustedError):
        _open(config(corpus(tmp_path)), quarantines=shut).next_batch(1)


def test_the_plans_segment_gives_the_seed(tmp_path: Path) -> None:
    """Of matching data the segment's seed rules, not the configuration's."""
    data = config(corpus(tmp_path))
    (segment,) = _open(data.model_copy(update={"seed": 99})).segments
    rows = _rows(_open(data, segments=(segment,)).next_batch(30))
    assert rows == _rows(_open(data.model_copy(update={"seed": 99})).next_batch(30))
    assert rows != _rows(_open(data).next_batch(30))


@pytest.mark.parametrize("change", [{"manifest": "0" * 64}, {"sample_tokens": LENGTH + 1}, {"num_shards": 9}])
def test_data_that_is_not_the_plans_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    """Another digest, length or number of shards would silently read something else."""
    data = config(corpus(tmp_path))
    (segment,) = _open(data).segments
    with pytest.raises(DataError, match="not the data that this run began with"):
        _open(data, segments=(segment.model_copy(update=change),))


def test_too_little_data_for_one_sample(tmp_path: Path) -> None:
    """Said when it is opened."""
    with pytest.raises(DataError, match="even one sample"):
        _open(config(corpus(tmp_path, (LENGTH,))))


def test_any_filesystem_of_fsspec(tmp_path: Path) -> None:
    """The same rows from memory:// as from disk."""
    root = corpus(tmp_path)
    memory = MemoryFileSystem()
    for path in root.iterdir():
        memory.pipe_file(f"/stream-test/{path.name}", path.read_bytes())
    try:
        stream = _open(config("memory://stream-test"))
        assert _rows(stream.next_batch(50)) == _rows(_open(config(root)).next_batch(50))
        stream.close()
    finally:
        memory.rm("/stream-test", recursive=True)


def test_validation_is_the_same_every_time_and_from_all_shards(tmp_path: Path) -> None:
    """Fixed samples, spread over the shards; the last batch may be short."""
    data = config(corpus(tmp_path))
    one, two = ([b.tolist() for b in validation_batches(data, LENGTH, 50, 16)] for _ in range(2))
    assert one == two
    assert [len(batch) for batch in one] == [16, 16, 16, 2]
    assert all(len(row) == LENGTH + 1 for batch in one for row in batch)
    assert len({tuple(row) for batch in one for row in batch}) == 50


def test_validation_takes_all_there_is_if_that_is_less(tmp_path: Path) -> None:
    """Asked for more than the shards hold."""
    data = config(corpus(tmp_path))
    total = _open(data).samples_per_epoch
    assert sum(len(batch) for batch in validation_batches(data, LENGTH, 10 * total, 64)) == total


def test_no_validation_data(tmp_path: Path) -> None:
    """Names the key."""
    with pytest.raises(DataError, match=r"data\.validation"):
        next(iter(validation_batches(config(corpus(tmp_path), validation=None), LENGTH, 8, 8)))
