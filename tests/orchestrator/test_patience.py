"""A journal on a full disk: waited for, and given up only when it stays so."""

from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.errors import JournalWriteError
from orchestrator.journal import Batch, Folded, Journal
from orchestrator.patience import DiskPatience
from orchestrator.policy.events import Ticked

_ERROR = JournalWriteError(Path("run.db"), "database or disk is full")


class _Clock:
    """Passes only by sleeping, and when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """As long as it takes."""
        self.now_s += seconds


def test_one_outage_is_bounded_and_a_later_one_begins_anew() -> None:
    """A minute is waited for, not two; an hour later the disk may be full for another minute."""
    clock = _Clock()
    patience = DiskPatience(60.0, clock, clock.sleep)
    tries = 0
    while patience(_ERROR):
        tries += 1
    assert tries == 61
    clock.sleep(3600)
    assert patience(_ERROR)


@pytest.mark.parametrize("pages", [400])
def test_the_journal_goes_on_when_there_is_room_again(tmp_path: Path, pages: int) -> None:
    """Nothing of the batch that failed is there twice, or missing."""
    with closing(Journal.open(tmp_path / "run.db")) as journal:
        (row,) = journal.select("PRAGMA page_count")
        list(journal.select(f"PRAGMA max_page_count = {row[0] + 8}"))
        waited: list[str] = []

        def room(error: JournalWriteError) -> bool:
            waited.append(str(error))
            list(journal.select(f"PRAGMA max_page_count = {row[0] + pages}"))
            return True

        journal.patience = room
        for number in range(400):
            journal.commit(Batch(folded=[Folded(Ticked(at_s=float(number)))], meta={"status": "x" * 100 * number}))
        assert len(waited) == 1
        assert "full" in waited[0]
        assert [event.at_s for event in journal.events()] == [float(number) for number in range(400)]
