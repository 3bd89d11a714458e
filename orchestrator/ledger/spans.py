"""Half-open ranges of raw positions. Pure."""

from collections.abc import Iterable, Iterator

Span = tuple[int, int]


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same positions in order, ranges that touch or overlap as one."""
    result: list[Span] = []
    for begin, end in sorted(spans):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        elif begin < end:
            result.append((begin, end))
    return result


def common(one: Span, others: Iterable[Span]) -> Iterator[Span]:
    """What a range shares with each of the others."""
    for begin, end in others:
        shared = max(one[0], begin), min(one[1], end)
        if shared[0] < shared[1]:
            yield shared


def without(one: Span, others: Iterable[Span]) -> list[Span]:
    """What is left of a range when others are taken out of it."""
    left, begin = [], one[0]
    for gone_begin, gone_end in merged(common(one, others)):
        left.append((begin, gone_begin))
        begin = gone_end
    return [span for span in [*left, (begin, one[1])] if span[0] < span[1]]


def size(spans: Iterable[Span]) -> int:
    """Positions in ranges that do not overlap."""
    return sum(end - begin for begin, end in spans)
