"""The ledger against histories whose truth is known: made by the trainer's own cursor, every sample written down."""

import json
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitors.records import DataRange, PlanAppliedRecord, StartedRecord, StepRecord
from orchestrator.cli.app import run
from orchestrator.journal import Batch, Folded, Journal, Spawned
from orchestrator.ledger.account import Plans, Read, Told, account
from orchestrator.ledger.check import violations
from orchestrator.ledger.read import plans, reads, surviving_reads
from orchestrator.ledger.spans import Span, common, merged, size, without
from orchestrator.policy.decisions import SendCommand, StartAttempt
from orchestrator.policy.events import RecordReceived, Ticked
from tests.orchestrator.clirun import write_journal
from tests.orchestrator.events import started_record, step_record
from trainer.contract.commands import ApplyPlan
from trainer.contract.manifest import commit_id
from trainer.contract.paths import RunPaths
from trainer.contract.plan import PlanUpdate, Quarantine, ResumePlan, SkipRange
from trainer.data.cursor import Cursor
from trainer.data.order import I64

_BATCH = 4
_SHARDS = 5
_PLANNED_STEPS = 30


def _shard_of(positions: I64) -> I64:
    return (positions // 3) % _SHARDS


@dataclass
class History:
    """A run as it happened: what each update read, sample by sample, and what the attempts were told."""

    reads: list[Read] = field(default_factory=list)
    sources: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    told: dict[int, list[tuple[int, Told]]] = field(default_factory=dict)
    skips: tuple[SkipRange, ...] = ()
    quarantines: tuple[Quarantine, ...] = ()
    positions: dict[int, int] = field(default_factory=lambda: {0: 0})

    @property
    def plans(self) -> Plans:
        """As the ledger knows them."""
        return Plans(self.told, _PLANNED_STEPS * _BATCH)

    @property
    def surviving(self) -> list[Read]:
        """In the order of steps."""
        return sorted((read for read in self.reads if read.survives), key=lambda read: read.step)

    def attempt(self, load: int, num_steps: int, update: tuple[int, Quarantine] | None) -> None:
        """Load a step, forget what lay beyond it, run on; with an update of the plan after so many steps."""
        number = len(self.told) + 1
        self.reads = [replace(read, survives=read.survives and read.step <= load) for read in self.reads]
        self.positions = {step: position for step, position in self.positions.items() if step <= load}
        self.told[number] = [(load, Told(self.skips, self.quarantines))]
        cursor = Cursor(_shard_of, self.positions[load], _PLANNED_STEPS * _BATCH)
        cursor.apply(self.skips, self.quarantines)
        for step in range(load + 1, load + num_steps + 1):
            take = cursor.take(_BATCH)
            counts = np.bincount(take.shards, minlength=_SHARDS)
            shards = {shard: int(count) for shard, count in enumerate(counts) if count}
            self.reads.append(Read(number, step, float(step), (take.begin, take.end), _BATCH, shards, True))
            self.sources[number, step] = take.sources.tolist()
            self.positions[step] = take.end
            if update is not None and step == load + update[0]:
                self.quarantines = (*self.quarantines, replace_from(update[1], take.end))
                self.told[number].append((step, Told(self.skips, self.quarantines)))
                cursor.apply(self.skips, self.quarantines)


def replace_from(quarantine: Quarantine, position: int) -> Quarantine:
    """The same from a position on."""
    return quarantine.model_copy(update={"from_position": position})


@st.composite
def histories(draw: st.DrawFn, quarantines: bool = True) -> History:
    """Crashes, rollbacks with skips, quarantines at a load and in the middle of an attempt."""
    history = History()
    shards = st.builds(Quarantine, shard=st.integers(0, _SHARDS - 2), from_position=st.just(0), incident=st.just(1))
    updates = st.none() | st.tuples(st.integers(1, 12), shards) if quarantines else st.none()
    history.attempt(0, draw(st.integers(1, 20)), draw(updates))
    for _ in range(draw(st.integers(0, 4))):
        load = draw(st.sampled_from(sorted(history.positions)))
        if draw(st.booleans()):
            begin = history.positions[load] + draw(st.integers(0, 20))
            then = draw(st.sampled_from(["defer", "drop"]))
            skip = SkipRange.model_validate(
                {"begin": begin, "end": begin + draw(st.integers(1, 30)), "then": then, "incident": 1}
            )
            history.skips = (*history.skips, skip)
        if quarantines and draw(st.booleans()):
            history.quarantines = (*history.quarantines, replace_from(draw(shards), history.positions[load]))
        history.attempt(load, draw(st.integers(0, 30)), draw(updates))
    return history


# -- the pure part ----------------------------------------------------------------------------------------------------

_SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda two: (min(two), max(two))), max_size=6)


@given(st.tuples(st.integers(0, 40), st.integers(0, 40)).filter(lambda span: span[0] <= span[1]), _SPANS)
def test_ranges_are_sets_of_positions(one: Span, others: list[Span]) -> None:
    """Merging, cutting and taking out, against sets."""

    def positions(spans: list[Span]) -> set[int]:
        return {position for begin, end in spans for position in range(begin, end)}

    union = positions(others)
    assert positions(merged(others)) == union
    assert size(merged(others)) == len(union)
    assert positions(without(one, others)) == positions([one]) - union
    assert positions(list(common(one, others))) == positions([one]) & union


@given(histories())
def test_what_the_cursor_reads_always_tiles(history: History) -> None:
    """Whatever crashes, rollbacks, skips and quarantines there were: no violation, no sample trained on twice."""
    surviving = history.surviving
    assert list(violations(surviving, history.plans)) == []
    trained = [source for read in surviving for source in history.sources[read.attempt, read.step]]
    assert len(trained) == len(set(trained))


_DAMAGES = ("lost", "twice", "shifted", "more", "fewer", "again")


@given(histories(quarantines=False).filter(lambda history: len(history.surviving) > 2), st.data())
def test_whatever_is_changed_is_noticed(history: History, data: st.DataObject) -> None:
    """A lost update, one that is there twice, a gap, an overlap, a sample too many or too few."""
    surviving = history.surviving
    index = data.draw(st.integers(0, len(surviving) - 2))
    read, damage = surviving[index], data.draw(st.sampled_from(_DAMAGES))
    assert read.span is not None
    begin, end = read.span
    match damage:
        case "lost":
            del surviving[index]
        case "twice":
            surviving.insert(index, read)
        case "shifted":
            surviving[index] = replace(read, span=(begin + data.draw(st.sampled_from([-1, 1])), end))
        case "again":
            surviving[index] = replace(read, span=(begin, end - 1), samples=_BATCH - 1)
        case "more":
            surviving[index] = replace(read, samples=_BATCH + 1)
        case "fewer":
            surviving[index] = replace(read, samples=_BATCH - 1)
    assert list(violations(surviving, history.plans)), damage


def test_reading_what_was_to_be_left_out_is_noticed() -> None:
    """A skip that was not jumped, a quarantined shard, a skip of what had been read and not rolled back."""
    one = Read(1, 1, 1.0, (0, 8), 8, {0: 4, 1: 4}, True)
    two = Read(1, 2, 2.0, (8, 16), 8, {0: 8}, True)
    skip = SkipRange(begin=10, end=12)

    def said(*told: tuple[int, Told]) -> list[str]:
        return list(violations([one, two], Plans({1: list(told)})))

    assert said((0, Told())) == []
    assert said((0, Told((skip,)))) == [
        "step 2 of attempt 1, positions 8 to 16: 8 samples were read where 6 were due: what is skipped was read"
    ]
    assert said((0, Told()), (1, Told((), (Quarantine(shard=0, from_position=8),)))) == [
        "step 2 of attempt 1: 8 samples of shard 0 were read, which is quarantined from position 8 on"
    ]
    assert said((0, Told()), (1, Told((SkipRange(begin=6, end=8),)))) == [
        "step 2 of attempt 1 skips 6 to 8, of which 2 positions had been read before"
    ]
    assert said((0, Told((skip,), (Quarantine(shard=3, from_position=0),)))) != []


@given(histories(quarantines=False))
def test_the_account_is_what_happened(history: History) -> None:
    """Samples of every fate, what of each skip was passed, and how much of it has been read since."""
    found = account(history.reads, history.plans)
    kept = sum(one.samples or 0 for one in found.stretches if one.survives)
    assert kept == _BATCH * len(history.surviving)
    assert sum(one.samples or 0 for one in found.stretches) == _BATCH * len(history.reads)

    end = max((read.span[1] for read in history.surviving if read.span), default=0)
    trained = {source for read in history.surviving for source in history.sources[read.attempt, read.step]}
    dropped = {p for skip in history.skips if skip.then == "drop" for p in range(skip.begin, skip.end)}
    for one in found.skipped:
        positions = set(range(one.skip.begin, one.skip.end))
        assert one.passed == len([position for position in positions if position < end])
        if one.skip.then == "drop":
            assert one.read_since is None
        else:
            deferred = {p for p in positions - dropped if p < _PLANNED_STEPS * _BATCH}
            assert one.read_since == len(deferred & trained)


# -- out of a journal -------------------------------------------------------------------------------------------------


def _journaled(history: History, directory: Path) -> RunPaths:
    """The history as a supervisor would have journaled it, snapshots and all."""
    paths = RunPaths(directory / "runs" / "a")
    write_journal(paths)
    with closing(Journal.open(paths.database)) as journal:
        for attempt, told in history.told.items():
            load = told[0][0]
            mine = [read for read in history.reads if read.attempt == attempt]
            candidates = (commit_id(load, 1, 1),) if attempt > 1 else ()
            plan = ResumePlan(
                run_id="r", attempt=attempt, epoch=attempt, candidates=candidates, fresh=not candidates,
                deferred_from=_PLANNED_STEPS * _BATCH, skips=told[0][1].skips, quarantines=told[0][1].quarantines,
            )  # fmt: skip
            journal.commit(Batch(folded=[Folded(Ticked(at_s=1.0), (StartAttempt(plan=plan),))]))
            journal.record_spawn(Spawned(attempt, 1, "boot", 1, 1.0, None))
            position = mine[0].span[0] if mine and mine[0].span else 0
            names = tuple(f"shard-{number}" for number in range(_SHARDS))
            _receive(journal, started_record(attempt, load, position=position, shards=names))
            for number, (after_step, update) in enumerate(told[1:], 1):
                sent = ApplyPlan(id=number, update=PlanUpdate(skips=update.skips, quarantines=update.quarantines))
                decision = SendCommand(attempt=attempt, command=sent)
                journal.commit(Batch(folded=[Folded(Ticked(at_s=1.0), (decision,))]))
                applied = {"seq": 2, "attempt": attempt, "at_s": 1.0, "step": after_step, "command": number}
                _receive(journal, PlanAppliedRecord.model_validate({**applied, "position": 0}))
            for read in mine:
                assert read.span is not None
                _receive(
                    journal,
                    step_record(
                        attempt, read.step, at_s=read.at_s, data=DataRange(begin=read.span[0], end=read.span[1]),
                        shards={shard: (count, 1.0) for shard, count in read.shards.items()},
                    ),
                )  # fmt: skip
            journal.commit(Batch(snapshot=b"{}"))
    return paths


def _receive(journal: Journal, record: StepRecord | StartedRecord | PlanAppliedRecord) -> None:
    journal.commit(Batch(folded=[Folded(RecordReceived(at_s=1.0, record=record))]))


def _typical() -> History:
    """A crash, a rollback with a skip and a quarantine, an update in place, and the run to its end."""
    history = History()
    history.attempt(0, 9, None)
    history.attempt(6, 12, (3, Quarantine(shard=2, from_position=0, incident=1)))
    history.skips = (SkipRange(begin=history.positions[10] + 4, end=history.positions[10] + 24, incident=1),)
    history.attempt(10, 25, None)
    return history


def test_the_journal_gives_back_what_was_journaled(tmp_path: Path) -> None:
    """Reads, fates and plans, also of long before the last snapshot."""
    history = _typical()
    paths = _journaled(history, tmp_path)
    with closing(Journal.read_only(paths.database)) as journal:
        assert list(reads(journal)) == sorted(history.reads, key=lambda read: (read.attempt, read.step))
        assert surviving_reads(journal) == history.surviving
        assert plans(journal) == history.plans


@pytest.fixture(name="here")
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the typical run."""
    monkeypatch.chdir(tmp_path)
    _journaled(_typical(), tmp_path)
    return tmp_path


def _json(capsys: pytest.CaptureFixture[str], *arguments: str, expect: int = 0) -> dict[str, Any]:
    assert run(["ledger", *arguments, "--json"]) == expect
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_ledger_tells_what_was_read_and_what_was_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stretches by attempt and fate; each skip and quarantine with the incident that caused it."""
    found = _json(capsys)

    fates = [(one["attempt"], one["survives"], one["steps"]) for one in found["stretches"]]
    assert fates == [
        (1, True, [1, 6]),
        (1, False, [7, 9]),
        (2, True, [7, 10]),
        (2, False, [11, 18]),
        (3, True, [11, 35]),
    ]
    (skip,) = found["skipped"]
    assert (skip["passed"], skip["then"], skip["incident"], skip["class"]) == (20, "defer", 1, "crash")
    assert 0 < skip["read_since"] <= 20
    assert [(one["shard"], one["class"]) for one in found["quarantined"]] == [("shard-2", "crash")]

    assert run(["ledger"]) == 0
    said = capsys.readouterr().out
    assert "rolled back" in said
    assert "#1 crash" in said


def test_reads_are_found_by_step_shard_and_position(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those that were rolled back, and deferred samples where they were read; the filters narrow each other."""
    of_step = _json(capsys, "--steps", "8:8")["reads"]
    assert [(read["attempt"], read["survives"]) for read in of_step] == [(1, False), (2, True)]

    of_shard = _json(capsys, "--shard", "shard-4")["reads"]
    assert of_shard == _json(capsys, "--shard", "4")["reads"]
    assert all("shard-4" in read["shards"] for read in of_shard)

    skip = _json(capsys)["skipped"][0]
    where = f"{skip['begin']}:{skip['end']}"
    survivors = [read for read in _json(capsys, "--sample-range", where)["reads"] if read["survives"]]
    assert survivors
    assert all(read["positions"][1] > _PLANNED_STEPS * _BATCH for read in survivors)
    assert _json(capsys, "--sample-range", where, "--steps", "1:3")["reads"] == []


def test_check_says_the_first_violation(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sound run exits 0, one of whose journal a step is missing exits 1."""
    assert _json(capsys, "--check") == {"ok": True, "steps": 35, "violation": None}
    with closing(Journal.open(here / "runs" / "a" / "run.db")) as journal:
        list(journal.select("DELETE FROM steps WHERE step = 5"))

    assert run(["ledger", "--check"]) == 1
    assert "steps 5 to 5 are missing" in capsys.readouterr().err
    assert not _json(capsys, "--check", expect=1)["ok"]


def test_a_check_is_of_the_whole_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What narrows a listing does not narrow the proof: said, not passed over."""
    assert run(["ledger", "--check", "--steps", "1:4"]) == 2
    assert "leave out --steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [("--steps", "9"), ("--sample-range", "9:3"), ("--shard", "nobody"), ("--shard", "99")]
)
def test_ranges_are_checked(here: Path, option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2, with how it is written."""
    assert run(["ledger", *option]) == 2
    assert option[0] in capsys.readouterr().err
