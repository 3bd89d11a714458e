"""Stopped anywhere and gone on with other batches, ranks, read-ahead: the samples that are read stay the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer_data.shards import config, corpus
from trainer.contract.config import DataConfig, SourceConfig
from trainer.contract.plan import Quarantine, SkipRange
from trainer.data.stream import Batch, DataStream

LENGTH = 16
Sample = tuple[int, ...]  # raw position, shard, tokens


def _open(data: DataConfig, position: int = 0, **plan: Any) -> DataStream:
    return DataStream(data, sample_tokens=LENGTH, position=position, **plan)


def _samples(batch: Batch, rows: slice = slice(None)) -> list[Sample]:
    parts = zip(batch.positions[rows].tolist(), batch.shards[rows].tolist(), batch.tokens[rows].tolist(), strict=True)
    return [(position, shard, *tokens) for position, shard, tokens in parts]


def _read_by_ranks(data: DataConfig, position: int, sequences: int, world: int, **plan: Any) -> list[Sample]:
    """One global batch, each rank with a stream of its own of which it keeps its contiguous part."""
    found: list[Sample] = []
    each = sequences // world
    for rank in range(world):
        batch = _open(data, position, **plan).next_batch(sequences)
        found += _samples(batch, slice(rank * each, (rank + 1) * each))
    return found


_EACH = st.tuples(st.integers(1, 24), st.sampled_from([1, 2, 3]), st.integers(1, 9))


@given(
    stretches=st.lists(_EACH, min_size=1, max_size=5),
    skip=st.tuples(st.integers(0, 150), st.integers(1, 60)),
    shut=st.one_of(st.none(), st.tuples(st.integers(0, 3), st.integers(0, 150))),
)
def test_any_change_of_shape(
    tmp_path_factory: pytest.TempPathFactory, stretches: list[tuple[int, int, int]], skip: tuple[int, int],
    shut: tuple[int, int] | None,
) -> None:  # fmt: skip
    """Each stretch resumes at the recorded position with another batch size, world size and read-ahead."""
    root = tmp_path_factory.getbasetemp() / "elastic-corpus"
    data = config(root if root.exists() else corpus(root))
    plan: dict[str, Any] = {
        "skips": (SkipRange(begin=skip[0], end=sum(skip)),),
        "quarantines": () if shut is None else (Quarantine(shard=shut[0], from_position=shut[1]),),
        "planned_samples": 200,
    }
    total = sum(size * world for size, world, _ in stretches)
    whole = _samples(_open(data, **plan).next_batch(total))
    read: list[Sample] = []
    position = 0
    for size, world, ahead in stretches:
        changed = data.model_copy(update={"read_ahead_blocks": ahead})
        read += _read_by_ranks(changed, position, size * world, world, **plan)
        position = _open(changed, position, **plan).next_batch(size * world).end
    assert read == whole


def _cut_everywhere(data: DataConfig, batches: int, sequences: int) -> None:
    stream = _open(data)
    whole = [stream.next_batch(sequences) for _ in range(batches)]
    for number, batch in enumerate(whole):
        again = _open(data, batch.begin)
        for expected in whole[number : number + 2]:
            assert _samples(again.next_batch(sequences)) == _samples(expected)


def test_cut_after_every_batch_over_two_epochs(tmp_path: Path) -> None:
    """A stop at each batch of a run that goes through its data more than twice."""
    data = config(corpus(tmp_path, (200, 90, 130)))
    per_epoch = _open(data).samples_per_epoch
    _cut_everywhere(data, 2 * per_epoch // 5 + 3, 5)


@pytest.mark.parametrize("lengths", [(17,), (17, 10, 16), (40,), (8 * 16 + 1,), (17, 17, 17)])
def test_less_data_than_a_batch(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    """One sample, shards without any, one block: batches go through as many epochs as they need, and cuts are exact."""
    data = config(corpus(tmp_path, lengths))
    per_epoch = _open(data).samples_per_epoch
    batch = _open(data).next_batch(3 * per_epoch + 1)
    counts = np.unique(batch.tokens[: 3 * per_epoch], axis=0, return_counts=True)[1]
    assert (counts == 3).all() or per_epoch > len(counts)
    _cut_everywhere(data, 6, 7)


def test_a_blend_cut_after_every_batch(tmp_path: Path) -> None:
    """Two sources of different length, each with epochs of its own."""
    sources = tuple(
        SourceConfig(source=name, url=str(corpus(tmp_path / name, lengths)), weight=weight)
        for name, lengths, weight in (("a", (90, 40), 3.0), ("b", (150,), 1.0))
    )
    _cut_everywhere(config(tmp_path, train=sources, validation=None), 20, 6)


def test_a_loader_has_no_state_to_lose(tmp_path: Path) -> None:
    """Iterating before a position is loaded cannot happen: it is given at the birth. Torch's dice are left alone.

    (torchdata's own loader silently starts at batch 0 when its iterator is made before its state is loaded.)
    """
    data = config(corpus(tmp_path))
    before = torch.get_rng_state()
    first, second = _open(data, 40), _open(data, 40)
    first.next_batch(3)
    assert _samples(second.next_batch(3))[0][0] == 40
    assert torch.equal(torch.get_rng_state(), before)
    first.close()
    first.close()
