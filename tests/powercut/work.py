"""What a supervisor writes into its journal, batch after batch, and whether a disk after a cut holds what was said."""

import hashlib
import random
import tempfile
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from orchestrator.journal import Batch, Cursor, Folded, Journal, Outcome, Spawned, StoredDecision
from orchestrator.policy.decisions import Notify, WriteVerdict
from orchestrator.policy.events import RecordReceived, Ticked
from tests.orchestrator.events import step_record
from tests.powercut.disk import Disk
from tests.powercut.recorder import Op, Recorder

_TABLES = ("events", "decisions", "attempts", "cursors", "incidents", "steps", "notifications", "snapshots", "meta")


@dataclass(frozen=True, slots=True)
class Work:
    """The operations of a whole life of a journal, and its content after each acknowledgement."""

    ops: list[Op]
    contents: list[str]


def content(journal: Journal) -> str:
    """A digest of everything that the journal holds."""
    digest = hashlib.sha256()
    for table in _TABLES:
        for row in journal.select(f"SELECT * FROM {table} ORDER BY 1, 2"):
            digest.update(repr(tuple(row)).encode())
    return digest.hexdigest()


def work(seed: int, batches: int, prepare: Callable[[Journal], None] = lambda _: None) -> Work:
    """Run a journal through batches of every kind, with restarts of its supervisor, and note what reaches its files."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        recorder = Recorder(Path(name))
        contents = [""]  # before the first acknowledgement nothing need be there
        with recorder.installed():
            done = 0
            while done < batches:
                with closing(Journal.open(Path(name) / "run.db")) as journal:
                    prepare(journal)
                    pending: list[StoredDecision] = []
                    for _ in range(min(batches - done, chance.randint(20, 200))):
                        _batch(journal, chance, pending)
                        done += 1
                        contents.append(content(journal))
                        recorder.acknowledge()
        return Work(recorder.ops, contents)


def _batch(journal: Journal, chance: random.Random, pending: list[StoredDecision]) -> None:
    step = chance.randint(1, 10**6)
    kind = chance.random()
    if kind < 0.1:
        journal.record_spawn(Spawned(chance.randint(1, 50), step, "boot", 7, 1.0, None))
    elif kind < 0.2 and pending:
        journal.notify(chance.choice(pending), 1.0, "info", "title", "text" * chance.randint(1, 400))
    else:
        folded = [Folded(Ticked(at_s=float(step)))]
        folded += [
            Folded(RecordReceived(at_s=1.0, record=step_record(1, step + n))) for n in range(chance.randint(0, 6))
        ]
        decided = (WriteVerdict(commit="c", verdict="good", why="w"), Notify(level="info", title="t", text="x"))
        folded.append(Folded(Ticked(at_s=2.0), decided[: chance.randint(0, 2)]))
        settled = {pending.pop().id: Outcome(ok=True, text="done")} if pending and chance.random() < 0.5 else None
        pending += journal.commit(
            Batch(
                folded=folded, incidents={chance.randint(1, 9): "{}" + " " * chance.randint(0, 3000)},
                cursors={1: Cursor(step, step)}, outcomes=settled, meta={"status": str(step)},
                snapshot=b"{}" + b" " * 20_000 if chance.random() < 0.02 else None,
            )
        )  # fmt: skip


def cut(done: Work, seed: int, cuts: int) -> Iterable[str]:
    """Cut the power at so many moments; what is wrong after each, nothing if nothing is."""
    chance = random.Random(seed)
    moments = sorted(chance.randrange(1, len(done.ops) + 1) for _ in range(cuts))
    disk, acknowledged = Disk(), 0
    for number, op in enumerate(done.ops, 1):
        disk.do(op)
        acknowledged += op.kind == "acknowledged"
        while moments and moments[0] == number:
            moments.pop(0)
            wrong = _after(disk, chance, done.contents[acknowledged : acknowledged + 2])
            if wrong:
                yield f"seed {seed}, cut after operation {number}, {acknowledged} batches acknowledged: {wrong}"


def _after(disk: Disk, chance: random.Random, expected: list[str]) -> str:
    """The journal must hold all that was acknowledged, and of the batch under way all or nothing."""
    with tempfile.TemporaryDirectory() as name:
        disk.cut(chance, Path(name))
        with closing(Journal.open(Path(name) / "run.db")) as journal:
            found = content(journal)
    if expected[0] == "" or found in expected:
        return ""
    return "what was acknowledged is not there as it was"
