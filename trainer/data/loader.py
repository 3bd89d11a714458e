"""torchdata's StatefulDataLoader around our sampler: the loader fetches, the plan decides what.

Without worker processes: for pretokenised shards they are 5 to 10 times slower than reading in place (measured).
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

T = TypeVar("T")
B = TypeVar("B")


class _Plan(Sampler[Any]):
    """Hands out one batch description after another, for ever."""

    def __init__(self, take: Callable[[], Any]) -> None:
        self._take = take

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self._take()


class _Fetch(Dataset[Any]):
    """Turns a batch description into a batch."""

    def __init__(self, fetch: Callable[[Any], Any]) -> None:
        self._fetch = fetch

    def __getitem__(self, index: Any) -> Any:
        return self._fetch(index)

    def __getitems__(self, index: Any) -> Any:
        """The whole batch at once."""
        return self._fetch(index)


def batches_of(take: Callable[[], T], fetch: Callable[[T], B]) -> Iterator[B]:
    """Batches without end: `take` says what comes next at the moment it is asked for, `fetch` reads it."""
    with warnings.catch_warnings():  # torchdata 0.11 calls torch.set_vital, which torch 2.13 warns of
        warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)
        loader = StatefulDataLoader(
            _Fetch(fetch),
            batch_sampler=_Plan(take),
            num_workers=0,
            collate_fn=_as_is,
            snapshot_every_n_steps=1 << 40,
            # Its own: an iterator draws a seed at its birth, and a draw from torch's generator would move dropout
            # after a resume.
            generator=torch.Generator(),
        )
        return iter(loader)


def _as_is(batch: Any) -> Any:
    return batch
