"""Do the surviving reads, with what was left out on purpose, tile the raw order? Pure.

From the first position on every position is read once, or lies in a skip or a quarantined shard; no update is missing
and none is there twice; nothing that a plan left out was read. What an update does not say of itself is not judged.
"""

from collections.abc import Iterable, Iterator

from orchestrator.ledger.account import Plans, Read, Told
from orchestrator.ledger.spans import Span, common, merged, size, without


def violations(surviving: Iterable[Read], plans: Plans) -> Iterator[str]:
    """Everything that is not as it must be, in the order of steps; none at all for a sound run.

    Args:
        surviving: surviving reads in the order of their steps.
        plans: what the attempts were told.
    """
    step, position = 0, 0
    told, known = Told(), list[Span]()
    for read in surviving:
        if read.step > step + 1:
            yield f"steps {step + 1} to {read.step - 1} are missing"
        elif read.step <= step:
            yield f"step {read.step} survives twice"
        step = read.step
        if read.span is None:
            continue
        if (now := plans.at(read)) != told:
            yield from _late_skips(read, now, known, position)
            told, known = now, merged([*known, *now.skipped])
        yield from _tiled(read, read.span, position)
        position = max(position, read.span[1])
        yield from _counted(read, read.span, now)
        yield from _quarantined(read, read.span, now)


def _tiled(read: Read, span: Span, position: int) -> Iterator[str]:
    if span[0] != position:
        what = "are lost" if span[0] > position else "are read twice"
        low, high = sorted((span[0], position))
        yield f"{_place(read)} begins at {span[0]} instead of {position}: positions {low} to {high} {what}"


def _late_skips(read: Read, told: Told, known: list[Span], position: int) -> Iterator[str]:
    """A skip must not reach back into what survives: that was read, and is read again if it was deferred."""
    for skip in told.skipped:
        for begin, end in without(skip, known):
            if begin < position:
                read_before = min(position, end) - begin
                yield f"{_place(read)} skips {begin} to {end}, of which {read_before} positions had been read before"


def _counted(read: Read, span: Span, told: Told) -> Iterator[str]:
    """As many samples as positions, less those that were left out."""
    if read.samples is None:
        return
    due = span[1] - span[0] - size(common(span, merged(told.skipped)))
    what = f"{_place(read)}, positions {span[0]} to {span[1]}: {read.samples} samples were read where {due} were due"
    if read.samples > due:
        yield f"{what}: what is skipped was read"
    elif read.samples < due and not any(one.from_position < span[1] for one in told.quarantines):
        yield f"{what}: {due - read.samples} are lost"


def _quarantined(read: Read, span: Span, told: Told) -> Iterator[str]:
    for one in told.quarantines:
        if one.from_position <= span[0] and (count := read.shards.get(one.shard)):
            yield (
                f"{_place(read)}: {count} samples of shard {one.shard} were read, "
                f"which is quarantined from position {one.from_position} on"
            )


def _place(read: Read) -> str:
    return f"step {read.step} of attempt {read.attempt}"
