"""`python -m trainer.data.where --run-dir DIR ...`: when a sample is read, and what a step reads. Torch-free.

Reads the run directory alone. Positions are raw; a sample's epoch is its source's. What was rolled back is listed with
`survives` false. Steps ahead are told for the plan as it is now: a later skip or quarantine moves them.
Exit codes: 0 answered, 2 what was asked for is not there.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.contract.paths import RunPaths
from trainer.data.cursor import Fate
from trainer.data.errors import DataError, ExhaustedError
from trainer.data.history import History, Phase, Step, read_history
from trainer.data.order import I64
from trainer.data.whereabouts import lines_of

Answer = dict[str, Any]
_MOST_AHEAD = 1 << 24  # samples: a few seconds of looking ahead
_CHUNK_SAMPLES = 1 << 16
_BEYOND = 1 << 63


def main(argv: Sequence[str] | None = None) -> int:
    """Answer what the command line asks; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        history = read_history(RunPaths(arguments.run_dir))
        answer = _answer(history, arguments)
    except DataError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(json.dumps(answer) + "\n" if arguments.json else "".join(f"{line}\n" for line in lines_of(answer)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longwatch data where",
        description="Say at which steps a shard or a sample was or will be read, or what a step or position reads.",
        epilog="Example: longwatch data where runs/my-run --shard shard-007.bin --sample 12",
    )
    add = parser.add_argument
    add("--run-dir", type=Path, required=True, metavar="RUN", help="the run's directory")
    add("--shard", metavar="S", help="number or name of a shard: name, or source/name")
    add("--sample", type=_natural, metavar="N", help="number of a sample in the shard, or else in the source")
    add("--source", metavar="NAME", help="the source that shard or sample is of; not needed if there is one")
    add("--step", type=_positive, metavar="N", help="what this step read or will read")
    add("--position", type=_natural, metavar="P", help="what is read at this raw position")
    add("--json", action="store_true", help="print JSON, for programs")
    return parser


def _natural(text: str) -> int:
    number = int(text)
    if not 0 <= number < _BEYOND:
        raise argparse.ArgumentTypeError("must be between 0 and 2^63 - 1")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _answer(history: History, asked: argparse.Namespace) -> Answer:
    of_data = asked.shard is not None or asked.sample is not None
    if of_data + (asked.step is not None) + (asked.position is not None) != 1:
        raise DataError("one question at a time", "give --shard or --sample, or --step, or --position")
    if asked.step is not None:
        return step_answer(history, asked.step)
    if asked.position is not None:
        return position_answer(history, asked.position)
    shard, numbers = _wanted(history, asked.shard, asked.sample, asked.source)
    return reads_answer(history, shard, numbers)


# -- from a sample to steps -------------------------------------------------------------------------------------------


def reads_answer(history: History, shard: int, numbers: I64) -> Answer:
    """Every read of samples of a shard, past ones with their attempts, then those ahead."""
    forecast = Forecast(history)
    past = [row for phase in history.phases for row in _past(history, phase, shard, numbers)]
    ahead = [
        {**row, "step": forecast.step_of(position), "attempt": None, "survives": None}
        for row, position in _under(history.last, shard, numbers, forecast.begin, forecast.end)
    ]
    row = history.book.shards[shard]
    return {
        "shard": shard,
        "name": history.book.names()[shard],
        "source": row.source,
        "samples": [int(numbers[0]), int(numbers[-1]) + 1] if numbers.size else [0, 0],
        "done": {"step": forecast.done, "position": forecast.begin},
        "looked_until": {"step": forecast.last_step, "position": forecast.end},
        "reads": past + ahead,
    }


def _past(history: History, phase: Phase, shard: int, numbers: I64) -> Iterator[Answer]:
    if not phase.steps:
        return
    begin, end = phase.steps[0].begin, phase.steps[-1].end
    for row, position in _under(phase, shard, numbers, begin, end):
        step = phase.step_at(position)
        if step is not None:
            yield {**row, "step": step.step, **_state(history, phase, step)}


def _under(phase: Phase, shard: int, numbers: I64, begin: int, end: int) -> Iterator[tuple[Answer, int]]:
    """What a plan makes of the samples at positions [begin, end), in the order of the positions."""
    found = phase.timeline.positions_of(shard, numbers, end)
    positions, fates = phase.cursor.read_at(found.positions, np.full(len(found.positions), shard, dtype=np.int64))
    for row in np.argsort(positions, kind="stable").tolist():
        position = int(positions[row])
        if begin <= position < end:
            facts = {"sample": int(found.numbers[row]), "epoch": int(found.epochs[row]), "position": position}
            yield {**facts, "fate": Fate(int(fates[row])).name.lower()}, position


class Forecast:
    """The steps ahead under the plan, steps and batch size of now, as far as is looked."""

    def __init__(self, history: History) -> None:
        self._phase, self._batch = history.last, history.config.batch.sequences
        self.begin, self.done = self._phase.stands
        cursor = self._phase.cursor
        cursor.position = self.begin
        wanted = min(_MOST_AHEAD // self._batch, history.config.steps - self.done)
        ends: list[I64] = [np.empty(0, dtype=np.int64)]
        steps_a_time = max(1, _CHUNK_SAMPLES // self._batch)
        for first in range(0, wanted, steps_a_time):
            try:
                take = cursor.take(min(steps_a_time, wanted - first) * self._batch)
            except ExhaustedError:
                break
            ends.append(take.positions[self._batch - 1 :: self._batch] + 1)
        self._ends = np.concatenate(ends)

    @property
    def end(self) -> int:
        """The position up to which is looked."""
        return int(self._ends[-1]) if self._ends.size else self.begin

    @property
    def last_step(self) -> int:
        """The step up to which is looked."""
        return self.done + len(self._ends)

    def step_of(self, position: int) -> int:
        """The step that uses a position up, which lies before `end`."""
        return self.done + 1 + int(np.searchsorted(self._ends, position, side="right"))

    def range_of(self, step: int) -> Step:
        """The positions that a step will use up."""
        number = step - self.done - 1
        begin = int(self._ends[number - 1]) if number else self.begin
        return Step(step, begin, int(self._ends[number]), self._batch)


# -- from a step or a position to samples -----------------------------------------------------------------------------


def step_answer(history: History, step: int) -> Answer:
    """What every attempt that came to a step read in it; what it will read, if none has."""
    found = [(phase, taken) for phase in history.phases for taken in phase.steps if taken.step == step]
    reads = [_range_facts(history, phase, taken) for phase, taken in found]
    if not any(row["survives"] for row in reads):
        forecast = Forecast(history)
        if not forecast.done < step <= forecast.last_step:
            what = f"step {step} was not taken, and the run goes to step {forecast.last_step}"
            raise DataError(what, "ask for one that was, or that is planned")
        reads.append(_range_facts(history, history.last, forecast.range_of(step), ahead=True))
    return {"step": step, "ranges": reads}


def _range_facts(history: History, phase: Phase, step: Step, *, ahead: bool = False) -> Answer:
    phase.cursor.position = step.begin
    take = phase.cursor.take(step.sequences)
    state = {"attempt": None, "survives": None} if ahead else _state(history, phase, step)
    samples = _samples(history, phase, take.positions, take.sources)
    return {**state, "begin": step.begin, "end": step.end, "samples": samples}


def _state(history: History, phase: Phase, step: Step) -> Answer:
    return {"attempt": phase.attempt, "survives": history.survives(phase, step.step)}


def position_answer(history: History, position: int) -> Answer:
    """What is read at a raw position, and at which step; if it is left out there, what becomes of it."""
    phase, taken = history.last, None
    for other in history.phases:
        step = other.step_at(position)
        if step is not None and history.survives(other, step.step):
            phase, taken = other, step
    sources = phase.cursor.sources(np.asarray([position], dtype=np.int64))
    (sample,) = _samples(history, phase, np.asarray([position], dtype=np.int64), sources)
    positions, fates = phase.cursor.read_at(sources, np.asarray([sample["shard"]], dtype=np.int64))
    answer = {"position": position, "fate": Fate(int(fates[0])).name.lower(), "read_at": int(positions[0])}
    if taken is not None:
        return {**answer, "step": taken.step, **_state(history, phase, taken), "samples": [sample]}
    forecast = Forecast(history)
    ahead = forecast.step_of(position) if forecast.begin <= position < forecast.end else None
    return {**answer, "step": ahead, "attempt": None, "survives": None, "samples": [sample]}


def _samples(history: History, phase: Phase, positions: I64, sources: I64) -> list[Answer]:
    spots, names = phase.timeline.spots(sources), history.book.names()
    length = history.config.batch.sequence_tokens
    columns = (positions, sources, spots.shards, spots.numbers, spots.epochs)
    return [
        {
            "position": position,
            "raw": source,
            "source": history.book.shards[shard].source,
            "shard": shard,
            "name": names[shard],
            "sample": number,
            "tokens": [number * length, (number + 1) * length + 1],
            "epoch": epoch,
        }
        for position, source, shard, number, epoch in zip(*(column.tolist() for column in columns), strict=True)
    ]


# -- naming -----------------------------------------------------------------------------------------------------------


def _wanted(history: History, shard: str | None, sample: int | None, source: str | None) -> tuple[int, I64]:
    """The shard that is meant, and which of its samples."""
    sizes = history.shard_samples
    if shard is None:
        assert sample is not None
        return _in_source(history, sample, source)
    number = _shard_number(history, shard, source)
    if sample is None:
        return number, np.arange(sizes[number], dtype=np.int64)
    if sample >= sizes[number]:
        raise DataError(f"shard {shard} holds {sizes[number]} samples, none is number {sample}", "count from 0")
    return number, np.asarray([sample], dtype=np.int64)


def _in_source(history: History, sample: int, source: str | None) -> tuple[int, I64]:
    """Samples of a source are counted through its shards."""
    sources = list(history.book.places)
    name = source if source is not None else sources[0]
    if name not in sources or (source is None and len(sources) > 1):
        raise DataError(
            f"the run's sources are {', '.join(sources)}", "name one with --source, or a shard with --shard"
        )
    left = sample
    for number, size in enumerate(history.shard_samples):
        if history.book.shards[number].source == name:
            if left < size:
                return number, np.asarray([left], dtype=np.int64)
            left -= size
    raise DataError(f"source {name} holds {sample - left} samples, none is number {sample}", "count from 0")


def _shard_number(history: History, wanted: str, source: str | None) -> int:
    rows = history.book.shards
    if wanted.isdecimal() and int(wanted) < len(rows):
        return int(wanted)
    fitting = [
        number
        for number, row in enumerate(rows)
        if wanted in (row.shard.name, f"{row.source}/{row.shard.name}") and source in (None, row.source)
    ]
    if len(fitting) == 1:
        return fitting[0]
    what = f"{len(fitting)} of the run's {len(rows)} shards are called {wanted}"
    raise DataError(what, "give a number, or source/name as the records show it")


if __name__ == "__main__":
    sys.exit(main())
