"""What `longwatch data where` prints for people: a line for each read, the first of many. Pure."""

from collections.abc import Iterator
from typing import Any

_SHOWN = 40
_FATES = {"read": "", "deferred": ", deferred", "skipped": ", left out by a skip", "quarantined": ", quarantined"}


def lines_of(answer: dict[str, Any]) -> list[str]:
    """An answer in words; programs ask for JSON and get everything."""
    if "reads" in answer:
        return list(_reads(answer))
    if "ranges" in answer:
        return [line for found in answer["ranges"] for line in _range(answer["step"], found)]
    (sample,) = answer["samples"]
    when = f"step {answer['step']}{_state(answer)}" if answer["step"] is not None else "not looked so far ahead"
    moved = f", read at position {answer['read_at']}" if answer["fate"] == "deferred" else ""
    return [f"position {answer['position']}: {_sample(sample)}; {when}{_FATES[answer['fate']]}{moved}"]


def _reads(answer: dict[str, Any]) -> Iterator[str]:
    first, end = answer["samples"]
    which = f"sample {first}" if end == first + 1 else f"{end - first} samples"
    yield f"{answer['name']} (shard {answer['shard']} of source {answer['source']}): {which}"
    for read in answer["reads"][:_SHOWN]:
        number = f"sample {read['sample']}, " if end > first + 1 else ""
        state = _state(read) + _FATES[read["fate"]]
        yield f"  step {read['step']}: {number}epoch {read['epoch']}, position {read['position']}{state}"
    if len(answer["reads"]) > _SHOWN:
        yield f"  and {len(answer['reads']) - _SHOWN} more: --json has them all"
    if not answer["reads"]:
        yield "  not read, neither so far nor in what is planned"
    done, until = answer["done"], answer["looked_until"]
    yield f"done are {done['step']} steps (position {done['position']}); looked ahead to step {until['step']}"


def _range(step: int, found: dict[str, Any]) -> Iterator[str]:
    yield f"step {step}: positions {found['begin']} to {found['end']}{_state(found)}"
    for sample in found["samples"]:
        yield f"  {sample['position']}: {_sample(sample)}"


def _sample(sample: dict[str, Any]) -> str:
    first, end = sample["tokens"]
    where = f"{sample['name']} (shard {sample['shard']}), sample {sample['sample']}, tokens {first} to {end}"
    return f"{where}, epoch {sample['epoch']}"


def _state(read: dict[str, Any]) -> str:
    if read["attempt"] is None:
        return ", ahead"
    return f", attempt {read['attempt']}" + ("" if read["survives"] else ", does not count (replayed or rolled back)")
