"""A run goes on in another run directory: the journal built again from its segments, and what is looked at before."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from monitors.records import CommitRecord
from orchestrator import moving
from orchestrator.errors import RunElsewhereError, ShippedJournalError
from orchestrator.journal import Batch, Folded, Journal, Outcome, Spawned
from orchestrator.policy.decisions import Notify, StartAttempt, WriteVerdict
from orchestrator.policy.events import AttemptSpawned, RecordReceived, RunOpened
from orchestrator.shipping import MOVED, Shipper
from tests.orchestrator.events import step_record
from trainer.contract import fence
from trainer.contract.config import StoreConfig
from trainer.contract.manifest import commit_id
from trainer.contract.paths import RunPaths
from trainer.contract.plan import ResumePlan
from trainer.contract.segments import JOURNAL, SIGNS, send_segments
from trainer.contract.store import Store, open_store


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> Iterator[Store]:
    """A store whose fence begins with the first event."""
    with closing(open_store(StoreConfig(url=str(tmp_path / "store")), tmp_path, "r")) as store:
        store.make_place()
        _claim(store, 1, 1)
        yield store


def _claim(store: Store, epoch: int, begin: int) -> None:
    body = fence.Fence(run_id="r", epoch=epoch, nonce="n" * 16, host="old", pid=7, base=None, journal_from=begin)
    fence.claim(store, body)


class Machine:
    """A run directory with a journal, and what a supervisor does to them."""

    def __init__(self, root: Path) -> None:
        self.paths = RunPaths(root)
        self.paths.create()
        self.paths.run_yaml.write_text("steps: 9\n")
        self.paths.data_book.write_text("[]")
        self.journal = Journal.open(self.paths.database)
        self.shipper = Shipper(self.journal, self.paths)

    def commit(self, *folded: Folded, incidents: dict[int, str] | None = None) -> None:
        """A batch, and what is cut after it."""
        self.journal.commit(Batch(folded=folded, incidents=incidents, meta={"status": "{}", "totals": '{"a": 1.0}'}))
        self.shipper.committed(folded, incidents_changed=bool(incidents))

    def steps(self, attempt: int, *steps: int) -> None:
        """Step records, which alone are no reason to cut."""
        self.commit(*(Folded(RecordReceived(at_s=1.0, record=step_record(attempt, step))) for step in steps))

    def saved(self, attempt: int, step: int) -> str:
        """A commit is on disk."""
        commit = commit_id(step, 1, attempt)
        record = CommitRecord(
            seq=1, attempt=attempt, at_s=1.0, tier="disk", step=step, commit=commit, position=step, tokens=step,
            bytes=1, seconds=0.1,
        )  # fmt: skip
        decided = (WriteVerdict(commit=commit, verdict="good", why="because"),)
        self.commit(Folded(RecordReceived(at_s=1.0, record=record), decided))
        return commit


def _rows(journal: Journal, table: str) -> list[dict[str, object]]:
    return [dict(row) for row in journal.select(f"SELECT * FROM {table} ORDER BY 1, 2")]


def _begin(machine: Machine) -> None:
    """The first attempt runs."""
    plan = ResumePlan(run_id="r", attempt=1, epoch=1, candidates=(), fresh=True)
    opened = RunOpened(at_s=0.0, run_id="r", config_digest="c", policy_digest="p", code_version="1")
    machine.commit(Folded(opened, (StartAttempt(plan=plan), Notify(level="info", title="t", text="x"))))
    assert machine.shipper.begins(1) == 1
    machine.journal.record_spawn(Spawned(1, 4242, "boot", 99, 2.0, None))
    machine.journal.commit(Batch(outcomes={1: Outcome(ok=True)}))
    machine.commit(Folded(AttemptSpawned(at_s=2.0, attempt=1, pid=4242)))


def test_the_journal_comes_back_as_it_was(store: Store, tmp_path: Path) -> None:
    """Every event, decision, incident and step that was there when the last segment was cut; files and attempts too."""
    old = Machine(tmp_path / "old")
    _begin(old)
    old.steps(1, 1, 2, 3)
    commit = old.saved(1, 3)
    old.commit(incidents={1: '{"id": 1, "v": 1}'})
    old.commit(incidents={1: '{"id": 1, "v": 2}'})
    old.journal.commit(Batch(outcomes={3: Outcome(ok=True, text="written")}, snapshot=b'{"s": 1}'))
    old.commit(Folded(AttemptSpawned(at_s=3.0, attempt=1, pid=4242)))
    old.steps(1, 4)  # not cut: nothing that matters came after it
    assert send_segments(store, old.paths.outbox) > 0
    assert not any(old.paths.outbox.iterdir())
    store.create(f"commits/{commit}.json", b"{}")

    found = moving.find(store)
    assert found is not None
    assert found.holder == "old, pid 7"
    new = RunPaths(tmp_path / "new")
    moving.build(store, found, new)

    with closing(Journal.open(new.database)) as journal:
        events = _rows(old.journal, "events")
        assert _rows(journal, "events") == [row for row in events if 'step":4' not in str(row["json"])]
        assert len(events) == len(_rows(journal, "events")) + 1
        assert _rows(journal, "decisions") == _rows(old.journal, "decisions")
        assert journal.incidents() == [{"id": 1, "v": 2}]
        assert [row["step"] for row in journal.steps()] == [1, 2, 3]
        (attempt,) = journal.attempts()
        assert (attempt["pid"], attempt["boot_id"]) == (4242, "another machine")
        assert json.loads(journal.meta(MOVED) or "") == {"claimed_epoch": 1, "commits": [commit]}
        assert journal.meta("totals") == '{"a": 1.0}'
        records = new.records(1).read_text().splitlines()
        assert [json.loads(line)["step"] for line in records] == [1, 2, 3]
        assert journal.cursor(1).offset == new.records(1).stat().st_size
        assert journal.cursor(1).seq == 3
    assert new.run_yaml.read_text() == "steps: 9\n"
    assert json.loads(new.plan(1).read_text())["attempt"] == 1


def test_what_was_about_to_start_is_not_started(store: Store, tmp_path: Path) -> None:
    """The epoch of the old machine's next attempt may be claimed already; it counts as lost, not as pending."""
    old = Machine(tmp_path / "old")
    _begin(old)
    plan = ResumePlan(run_id="r", attempt=2, epoch=2, candidates=(), fresh=True)
    opened = RunOpened(at_s=0.0, run_id="r", config_digest="c", policy_digest="p", code_version="1")
    old.commit(Folded(opened, (StartAttempt(plan=plan),)))
    send_segments(store, old.paths.outbox)
    found = moving.find(store)
    assert found is not None
    new = RunPaths(tmp_path / "new")
    moving.build(store, found, new)
    with closing(Journal.open(new.database)) as journal:
        assert [row["status"] for row in journal.decisions() if row["kind"] == "start_attempt"] == ["done", "failed"]
        assert [(row["attempt"], row["ended_at_s"]) for row in journal.attempts()] == [(1, None), (2, None)]


def test_a_superseded_machine_adds_nothing(store: Store, tmp_path: Path) -> None:
    """It was paused while another went on: what it sends when it wakes is not part of the journal."""
    old = Machine(tmp_path / "old")
    _begin(old)
    old.steps(1, 1)
    old.saved(1, 1)
    send_segments(store, old.paths.outbox)
    found = moving.find(store)
    assert found is not None
    moving.build(store, found, RunPaths(tmp_path / "new"))
    new = Machine(tmp_path / "new")
    _claim(store, 2, new.shipper.begins(2))
    new.shipper.claimed()
    assert new.journal.meta(MOVED) == ""
    new.steps(2, 5)
    new.saved(2, 5)
    old.steps(1, 2, 3)
    old.saved(1, 3)
    for machine in (new, old):
        send_segments(store, machine.paths.outbox)

    found = moving.find(store)
    assert found is not None
    third = RunPaths(tmp_path / "third")
    moving.build(store, found, third)
    with closing(Journal.open(third.database)) as journal:
        assert [(row["attempt"], row["step"]) for row in journal.steps()] == [(1, 1), (2, 5)]
        assert _rows(journal, "events") == _rows(new.journal, "events")


def test_what_is_not_shipped_is_not_forgotten(tmp_path: Path) -> None:
    """Old step events leave the journal at snapshots, but not before they are in a segment."""
    machine = Machine(tmp_path / "one")
    _begin(machine)
    machine.steps(1, *range(1, 10))
    for _ in range(3):
        machine.steps(1, 10)
        machine.journal.commit(Batch(snapshot=b"{}"))
    kinds = [row["kind"] for row in _rows(machine.journal, "events")]
    assert kinds.count("record_received") == 12
    machine.shipper.cut()
    machine.journal.commit(Batch(snapshot=b"{}"))
    machine.steps(1, 11)
    machine.journal.commit(Batch(snapshot=b"{}"))
    assert [row["kind"] for row in _rows(machine.journal, "events")].count("record_received") <= 2


def test_a_hole_or_damage_is_an_error(store: Store, tmp_path: Path) -> None:
    """Going on with half a history would be going on in silence."""
    old = Machine(tmp_path / "old")
    _begin(old)
    old.saved(1, 1)
    old.saved(1, 2)
    send_segments(store, old.paths.outbox)
    keys = [item.key for item in store.list(JOURNAL)]
    found = moving.find(store)
    assert found is not None
    body = store.read(keys[-1])
    store.delete(keys[-1])
    store.create(keys[-1], body[:-9])
    with pytest.raises(ShippedJournalError, match=r"can't be read.*--fresh"):
        moving.build(store, found, RunPaths(tmp_path / "new"))
    assert not RunPaths(tmp_path / "new").database.exists()
    store.delete(keys[0])
    with pytest.raises(ShippedJournalError, match="event 1 is missing"):
        moving.find(store)


def test_signs_of_life_are_respected(store: Store, tmp_path: Path) -> None:
    """A sign that moves says that the run is held; one that stays is that of a dead machine; none needs no wait."""
    old = Machine(tmp_path / "old")
    _begin(old)
    send_segments(store, old.paths.outbox)
    found = moving.find(store)
    assert found is not None
    waited: list[float] = []
    said: list[str] = []
    moving.ensure_nobody_lives(store, found, said.append, waited.append)
    assert (waited, said) == ([], [])
    sign = json.dumps({"host": "old", "pid": 7}).encode()
    store.create(f"{SIGNS}a-1.json", sign)
    moving.ensure_nobody_lives(store, found, said.append, waited.append)
    assert waited == [moving.LOOK_AGAIN_S]
    assert "old, pid 7" in said[0]
    with pytest.raises(RunElsewhereError, match=r"old, pid 7.*--take-over"):
        moving.ensure_nobody_lives(store, found, said.append, lambda _: store.create(f"{SIGNS}a-2.json", sign))
