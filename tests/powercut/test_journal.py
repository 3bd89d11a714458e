"""Power cuts under the real journal. `make powercuts` cuts 10,000 times; here fewer, and that the check can fail."""

import sqlite3

from orchestrator.journal import Journal
from tests.powercut.work import cut, work


def test_nothing_that_was_acknowledged_is_lost() -> None:
    """At any moment, with any part of what was not synced: the journal opens and holds every acknowledged batch."""
    assert list(cut(work(seed=1, batches=260), seed=2, cuts=150)) == []


def test_a_journal_that_does_not_sync_is_caught() -> None:
    """The same journal told not to sync loses what it acknowledged, or does not open at all."""

    def careless(journal: Journal) -> None:
        journal._db.execute("PRAGMA synchronous = OFF")

    done = work(seed=1, batches=60, prepare=careless)
    found = 0
    for seed in range(40):
        try:
            found += len(list(cut(done, seed, cuts=1)))
        except (sqlite3.Error, Exception) as error:  # noqa: BLE001  however it fails, it is caught
            found += bool(str(error))
    assert found > 10
