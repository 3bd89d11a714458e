"""The preparation itself: pieces in, shards out, for the training and the held-out side, restartable at every shard.

After each shard the state says from which piece, and which token of it, the next one goes on. So a preparation that
was killed writes no finished shard again and ends with the same bytes. Memory: one shard of tokens a side.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.data.errors import PrepareError
from trainer.data.manifest import MANIFEST_NAME, UNFINISHED_NAME, DataManifest, Shard
from trainer.data.output import Output
from trainer.data.sources import Piece, Source, first_piece, pieces
from trainer.data.tokenize import Ids, Tokenizer

_GROUP_PIECES = 64  # encoded together, so that a tokenizer with threads has something to share out
_GROUP_BYTES = 8 << 20

Progress = Callable[[int, str | None], None]  # (source bytes done, shard just written)


class Mark(BaseModel):
    """Where a side goes on: the first `taken` tokens of this piece lie in finished shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: int = 0
    offset: int = 0
    taken: int = 0

    @property
    def piece(self) -> tuple[int, int]:
        """What it is ordered by."""
        return self.source, self.offset


class SideState(BaseModel):
    """What one side has finished."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: tuple[Shard, ...] = ()
    mark: Mark = Mark()


class State(BaseModel):
    """What lies beside the shards until they are all there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    prepared_from: str
    sides: dict[str, SideState]


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be prepared. Everything in `digest` decides the result; the rest does not."""

    sources: Sequence[Source]
    tokenizer: Tokenizer
    out: Output
    validation_out: Output | None
    validation_fraction: float
    shard_tokens: int
    field: str

    @property
    def digest(self) -> str:
        """SHA-256 of the sources' names and sizes and of every option that decides a byte of the result."""
        facts = [
            [[source.name, source.bytes] for source in self.sources],
            self.tokenizer.name,
            self.tokenizer.eot,
            self.validation_fraction if self.validation_out is not None else 0,
            self.shard_tokens,
            self.field,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass
class _Side:
    """Shards of one side; `held` tokens wait for the next one."""

    name: str
    out: Output
    job: Job
    state: SideState
    held: list[Ids] = field(default_factory=list)
    num_held: int = 0

    def feed(self, piece: Piece, ids: Ids) -> Iterator[str]:
        """Take a piece's tokens; yields the name of each shard that this filled, once its place is in the state."""
        begun = self.state.mark
        where = (piece.source, piece.offset)
        if where < begun.piece:
            return
        taken = begun.taken if where == begun.piece else 0
        ids = ids[taken:]
        while self.num_held + len(ids) >= self.job.shard_tokens:
            room = self.job.shard_tokens - self.num_held
            taken += room
            self._hold(ids[:room])
            ids = ids[room:]
            yield self._write(Mark(source=piece.source, offset=piece.offset, taken=taken))
        self._hold(ids)

    def finish(self) -> Iterator[str]:
        """Write what is left."""
        if self.num_held:
            yield self._write(Mark(source=len(self.job.sources)))

    def manifest(self) -> DataManifest:
        """Of the finished side."""
        return DataManifest(
            vocab_size=self.job.tokenizer.vocab_size,
            tokenizer=self.job.tokenizer.name,
            prepared_from=self.job.digest,
            shards=self.state.shards,
        )

    def _hold(self, ids: Ids) -> None:
        if len(ids):
            self.held.append(ids)
            self.num_held += len(ids)

    def _write(self, mark: Mark) -> str:
        name = f"{self.name}-{len(self.state.shards):06d}.bin"
        shard = self.out.write_shard(name, np.concatenate(self.held), self.job.tokenizer.dtype)
        self.held, self.num_held = [], 0
        self.state = SideState(shards=(*self.state.shards, shard), mark=mark)
        return name


def run(job: Job, progress: Progress) -> dict[str, DataManifest]:
    """Prepare, or go on where an earlier preparation of the same was stopped.

    Returns: the manifest of each side, by name.

    Raises:
        PrepareError: sources or output cannot be used, or the output holds something else.
    """
    finished = _finished(job)
    if finished is not None:
        return finished
    state = _state(job)
    sides = [_Side("train", job.out, job, state.sides.get("train", SideState()))]
    if job.validation_out is not None:
        sides.append(_Side("validation", job.validation_out, job, state.sides.get("validation", SideState())))
    _save(job, sides)  # at once: an output that cannot be written is told before any work
    for done_bytes, shard in chain(_fill(job, sides), _flush(sides)):
        if shard is not None:
            _save(job, sides)
        progress(done_bytes, shard)
    return _conclude(job, sides)


def _fill(job: Job, sides: list[_Side]) -> Iterator[tuple[int, str | None]]:
    """Feed every piece to its side; yields (source bytes done, shard written) as it goes."""
    start = min((side.state.mark for side in sides), key=lambda mark: mark.piece)
    sizes = [0, *np.cumsum([source.bytes for source in job.sources]).tolist()]
    for group in _groups(_from(job, start)):
        sided = [(piece, sides[side]) for piece, side in group]
        wanted = [(p, s) for p, s in sided if (p.source, p.offset) >= s.state.mark.piece]
        encoded = job.tokenizer.encode([piece.data for piece, _ in wanted])
        for (piece, side), ids in zip(wanted, encoded, strict=True):
            opened = np.concatenate([np.asarray([job.tokenizer.eot], ids.dtype), ids]) if piece.first else ids
            for shard in side.feed(piece, opened):
                yield min(sizes[piece.source] + piece.offset, sizes[piece.source + 1]), shard
        last = group[-1][0]
        yield min(sizes[last.source] + last.offset + len(last.data), sizes[last.source + 1]), None


def _flush(sides: list[_Side]) -> Iterator[tuple[int, str | None]]:
    total = sum(source.bytes for source in sides[0].job.sources)
    for side in sides:
        for shard in side.finish():
            yield total, shard


def _from(job: Job, start: Mark) -> Iterator[tuple[Piece, int]]:
    """Every piece from a mark on, with the number of its side; a document goes to one side as a whole."""
    for number in range(start.source, len(job.sources)):
        source = job.sources[number]
        offset = start.offset if number == start.source else 0
        side = _side_of(job, first_piece(source, job.field)) if offset and not source.is_jsonl else 0
        for piece in pieces(source, number, offset, job.field):
            side = _side_of(job, piece.data) if piece.first else side
            yield piece, side


def _side_of(job: Job, beginning: bytes) -> int:
    """By a hash of how the document begins: a copy of a held-out document is held out too."""
    if job.validation_out is None:
        return 0
    return int(int.from_bytes(hashlib.sha256(beginning).digest()[:8], "big") < job.validation_fraction * 2**64)


def _groups(found: Iterator[tuple[Piece, int]]) -> Iterator[list[tuple[Piece, int]]]:
    group: list[tuple[Piece, int]] = []
    size = 0
    for piece, side in found:
        group.append((piece, side))
        size += len(piece.data)
        if len(group) == _GROUP_PIECES or size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


_OPTION = {"train": "out", "validation": "validation-out"}


def _finished(job: Job) -> dict[str, DataManifest] | None:
    """The manifests of an output that holds just this already; None if there is something left to do."""
    outs = {"train": job.out} | ({"validation": job.validation_out} if job.validation_out is not None else {})
    found: dict[str, DataManifest] = {}
    for name, out in outs.items():
        names = out.names()
        if MANIFEST_NAME in names:
            manifest = _manifest_of(out)
            if manifest.prepared_from != job.digest:
                what = f"{out.url}: holds shards of other sources or options already"
                remedy = f"choose another --{_OPTION[name]} (a run blends several directories), or remove it"
                raise PrepareError(what, remedy)
            found[name] = manifest
        elif strangers := [n for n in names if n != UNFINISHED_NAME and not n.startswith(f"{name}-")]:
            what = f"{out.url}: holds other files already, such as {strangers[0]}"
            raise PrepareError(what, "choose another --out, or remove them")
    return found if len(found) == len(outs) else None


def _manifest_of(out: Output) -> DataManifest:
    try:
        return DataManifest.model_validate_json(out.read(MANIFEST_NAME))
    except ValidationError as error:
        raise PrepareError(
            f"{out.url}/{MANIFEST_NAME}: is damaged", "remove the directory and prepare again"
        ) from error


def _state(job: Job) -> State:
    """What an earlier preparation left, or nothing yet."""
    fresh = State(prepared_from=job.digest, sides={})
    if UNFINISHED_NAME not in (names := job.out.names()):
        if any(name.endswith(".bin") for name in names) and MANIFEST_NAME not in names:
            what = f"{job.out.url}: holds shards without a manifest"
            raise PrepareError(what, "choose another --out, or remove them")
        return fresh
    try:
        found = State.model_validate_json(job.out.read(UNFINISHED_NAME))
    except ValidationError as error:
        what = f"{job.out.url}/{UNFINISHED_NAME}: is damaged"
        raise PrepareError(what, "remove the directory and prepare again") from error
    if found.prepared_from != job.digest:
        what = f"{job.out.url}: an unfinished preparation of other sources or options lies here"
        raise PrepareError(what, "give the same ones again, choose another --out, or remove it")
    return found


def _save(job: Job, sides: list[_Side]) -> None:
    state = State(prepared_from=job.digest, sides={side.name: side.state for side in sides})
    job.out.write(UNFINISHED_NAME, state.model_dump_json().encode())


def _conclude(job: Job, sides: list[_Side]) -> dict[str, DataManifest]:
    """Write the manifests, the training side's last: with it, the preparation is finished."""
    for side in sides:
        if not side.state.shards:
            what = f"no document went to {side.out.url}"
            remedy = (
                "give more documents or another --validation-fraction" if len(sides) > 1 else "give a source with text"
            )
            raise PrepareError(what, remedy)
    manifests = {side.name: side.manifest() for side in sides}
    for side in reversed(sides):
        side.out.write(MANIFEST_NAME, manifests[side.name].model_dump_json(indent=1).encode())
    job.out.remove(UNFINISHED_NAME)
    return manifests
