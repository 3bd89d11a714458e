"""The catalogue of seeded bugs fits the sources; `make mutants` plants them."""

from pathlib import Path

import pytest

from tests.mutants.catalogue import MUTANTS, Mutant

_ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_bug_can_be_planted_and_looked_for(mutant: Mutant) -> None:
    """Its place is there exactly once, the change is one, and its tests exist."""
    text = (_ROOT / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, mutant.old
    assert mutant.new != mutant.old
    assert mutant.tests
    assert all((_ROOT / test).exists() for test in mutant.tests)


def test_there_are_enough_with_names_of_their_own() -> None:
    """At least twenty-five, each told from the others."""
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names)) >= 25
