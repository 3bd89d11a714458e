"""What the reads of a run come to, and whether they tile. Pure.

A read is what one update says it did. It *survives* if no later attempt (replays aside) loaded a checkpoint below its
step; surviving reads are what the model was made of. Positions are raw: samples in the order of the data, epochs
concatenated. What a read used up is its range less the skips in force, less the samples of quarantined shards. Which
sample lies at a position is not known here and not needed: everything is counted in positions.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from orchestrator.ledger.spans import Span, common, merged, size, without
from trainer.contract.plan import Quarantine, SkipRange


@dataclass(frozen=True, slots=True)
class Read:
    """One update. `shards` counts its samples by shard, `samples` all of them; None if its trainer did not say."""

    attempt: int
    step: int
    at_s: float
    span: Span | None
    samples: int | None
    shards: Mapping[int, int]
    survives: bool


@dataclass(frozen=True, slots=True)
class Told:
    """What an attempt was told to leave out."""

    skips: tuple[SkipRange, ...] = ()
    quarantines: tuple[Quarantine, ...] = ()

    @property
    def skipped(self) -> list[Span]:
        """The ranges of the skips."""
        return [_span(skip) for skip in self.skips]


@dataclass(frozen=True, slots=True)
class Plans:
    """What each attempt was told, by its number: (in force for updates after this step, what), in order of steps.

    `deferred_from`: the position from which deferred samples are read; None if nothing was ever skipped.
    """

    told: Mapping[int, list[tuple[int, Told]]]
    deferred_from: int | None = None

    def at(self, read: Read) -> Told:
        """What was in force when it was read."""
        known = [told for after_step, told in self.told.get(read.attempt, ()) if after_step < read.step]
        return known[-1] if known else Told()

    @property
    def newest(self) -> Told:
        """What was told last."""
        return self.told[max(self.told)][-1][1] if self.told else Told()

    def deferred(self) -> Iterator[tuple[Span, int]]:
        """Skipped ranges that are read later, each with the position at which that begins.

        In order, one behind the other from `deferred_from` on; what is dropped, and what lies behind the planned end,
        is not among them.
        """
        if self.deferred_from is None:
            return
        dropped = [_span(skip) for skip in self.newest.skips if skip.then == "drop"]
        place = self.deferred_from
        for begin, end in merged(_span(skip) for skip in self.newest.skips if skip.then == "defer"):
            for span in without((begin, min(end, self.deferred_from)), dropped):
                yield span, place
                place += span[1] - span[0]

    def later_places(self, span: Span) -> list[Span]:
        """The positions at which the deferred samples of a range are read."""
        return [
            (place + begin - source[0], place + end - source[0])
            for source, place in self.deferred()
            for begin, end in common(span, [source])
        ]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Updates in a row of one attempt that have the same fate."""

    attempt: int
    survives: bool
    first_step: int
    last_step: int
    span: Span | None
    samples: int | None
    from_s: float
    to_s: float


@dataclass(frozen=True, slots=True)
class Skipped:
    """A range that is not read where it lies. `passed` of its positions lie behind the run by now.

    `read_since`: how many of them had their turn later, None if they are dropped. What was of a quarantined shard by
    then was left out again.
    """

    skip: SkipRange
    passed: int
    read_since: int | None


@dataclass(frozen=True, slots=True)
class Account:
    """A run's reads, summed up."""

    stretches: list[Stretch]
    skipped: list[Skipped]
    quarantines: list[Quarantine]


def account(reads: Iterable[Read], plans: Plans) -> Account:
    """Sum up. `reads` come attempt by attempt, in the order of their steps."""
    stretches: list[Stretch] = []
    for read in reads:
        if stretches and (longer := _longer(stretches[-1], read)):
            stretches[-1] = longer
        else:
            facts = (read.attempt, read.survives, read.step, read.step, read.span, read.samples, read.at_s, read.at_s)
            stretches.append(Stretch(*facts))
    covered = merged(one.span for one in stretches if one.survives and one.span is not None)
    newest = plans.newest
    used = [span for one in covered for span in without(one, newest.skipped)]
    skipped = [
        Skipped(skip, size(common(_span(skip), covered)), _read_since(skip, plans, used)) for skip in newest.skips
    ]
    return Account(stretches, skipped, list(newest.quarantines))


def _longer(stretch: Stretch, read: Read) -> Stretch | None:
    """The stretch with one more update, if that goes on where it ends."""
    if (stretch.attempt, stretch.survives, stretch.last_step + 1) != (read.attempt, read.survives, read.step):
        return None
    span, samples = None, None
    if stretch.span is not None and read.span is not None:
        if stretch.span[1] != read.span[0]:
            return None
        span = (stretch.span[0], read.span[1])
    if stretch.samples is not None and read.samples is not None:
        samples = stretch.samples + read.samples
    return replace(stretch, last_step=read.step, span=span, samples=samples, to_s=read.at_s)


def _read_since(skip: SkipRange, plans: Plans, used: list[Span]) -> int | None:
    if skip.then == "drop":
        return None
    return sum(size(common(place, used)) for place in plans.later_places(_span(skip)))


def _span(skip: SkipRange) -> Span:
    return skip.begin, skip.end
