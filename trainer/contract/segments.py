"""The journal in the store: what its segments are called, and which of them count. Torch-free.

The supervisor cuts segments into the outbox of its run directory, the uploader sends them, create-only; a supervisor
on another machine builds the journal again from them. A fence says with which event its epoch begins, so that what a
superseded supervisor still sends is inert, as its commits are (DESIGN 4).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.store import Store

JOURNAL = "journal/"
SIGNS = "alive/"
_KEY = re.compile(r"journal/e(\d{1,10})-(\d{12})-(\d{12})\.jsonl\.gz")


@dataclass(frozen=True, slots=True, order=True)
class Segment:
    """Events [first, last] of the journal, cut under an epoch."""

    first: int
    last: int
    epoch: int

    @property
    def key(self) -> str:
        """Where it lies in the store."""
        return f"{JOURNAL}e{self.epoch}-{self.first:012d}-{self.last:012d}.jsonl.gz"


@dataclass(frozen=True, slots=True)
class Counting:
    """A segment that counts, up to the event before `end` (None: whole)."""

    segment: Segment
    end: int | None


def parse_segment(key: str) -> Segment | None:
    """The segment of a key; None if it is no segment's."""
    found = _KEY.fullmatch(key)
    return Segment(int(found[2]), int(found[3]), int(found[1])) if found else None


def counting(segments: Iterable[Segment], begins: Mapping[int, int]) -> list[Counting]:
    """Of all segments, those that count, in the order in which they are applied. Pure.

    Args:
        segments: in any order; two may overlap, where a death came between sending one and noting it.
        begins: epoch -> its first event, as its fence says.
    """
    chosen = []
    for segment in sorted(segments):
        end = min((first for epoch, first in begins.items() if epoch > segment.epoch), default=None)
        if end is None or segment.first < end:
            chosen.append(Counting(segment, end if end is not None and end <= segment.last else None))
    return chosen


def gap(chosen: Iterable[Counting]) -> int | None:
    """The first event that no segment holds although a later one is there; None if there is none. Pure."""
    expected = 1
    for one in chosen:
        if one.segment.first > expected:
            return expected
        expected = max(expected, (one.end or one.segment.last + 1))
    return None


def segments_present(store: Store) -> list[Segment]:
    """Every segment in the store, of whatever epoch."""
    return [segment for item in store.list(JOURNAL) if (segment := parse_segment(item.key)) is not None]


def send_segments(store: Store, outbox: Path) -> int:
    """Send what lies in the outbox, oldest first, and remove what has arrived; returns how many.

    Raises:
        StoreError: the store fails; the rest stays where it is.
    """
    found = [(segment, path) for path in outbox.glob("*.jsonl.gz") if (segment := parse_segment(JOURNAL + path.name))]
    for segment, path in sorted(found):
        store.create(segment.key, path.read_bytes())
        path.unlink()
    return len(found)
