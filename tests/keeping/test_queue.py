"""What goes to the store next and what leaves the local disk, for any inventory."""

from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.manifest import commit_id
from trainer.keeping.tier import Inventory, choose_doomed, choose_next

_COMMITS = tuple(commit_id(10 * number, 1, 1) for number in range(12))


@st.composite
def inventories(draw: st.DrawFn) -> Inventory:
    """Any split of commits into waiting and uploaded, one of those that wait perhaps on its way, some needed."""
    waits = draw(st.lists(st.booleans(), min_size=12, max_size=12))
    waiting = tuple(name for name, wait in zip(_COMMITS, waits, strict=True) if wait)
    uploaded = tuple(name for name, wait in zip(_COMMITS, waits, strict=True) if not wait)
    needed = draw(st.frozensets(st.sampled_from(_COMMITS), max_size=3))
    return Inventory(waiting, uploaded, draw(st.sampled_from([None, *waiting])), needed)


@given(inventory=inventories(), keep=st.integers(1, 5), behind=st.booleans())
def test_what_goes_next(inventory: Inventory, keep: int, behind: bool) -> None:
    """Something goes if anything waits; the newest is never passed over; nothing is, while few enough wait."""
    chosen, passed_over = choose_next(inventory, keep, behind=behind)
    assert (chosen is None) == (not inventory.waiting)
    if inventory.waiting:
        assert inventory.waiting[-1] not in passed_over
        assert chosen not in passed_over
        many = len(inventory.waiting) > keep
        assert set(passed_over) == (set(inventory.spare) if many else set())
        assert inventory.needed.isdisjoint(passed_over)
        assert chosen == inventory.waiting[-1 if behind or many else 0]


@given(inventory=inventories(), keep=st.integers(1, 5))
def test_what_leaves_the_disk(inventory: Inventory, keep: int) -> None:
    """The newest uploaded ones stay, what is on its way stays, the newest that waits stays; the rest is bounded."""
    surplus, passed_over = choose_doomed(inventory, keep)
    assert set(surplus).isdisjoint(inventory.uploaded[-keep:])
    assert len(inventory.uploaded) - len(surplus) <= keep
    assert passed_over is None or passed_over in inventory.waiting[:-1]
    assert passed_over not in inventory.needed
    assert passed_over != inventory.uploading or passed_over is None
    others = [name for name in inventory.waiting if name != inventory.uploading]
    assert (passed_over is not None) == (len(others) > keep and bool(inventory.spare))
    assert len(inventory.spare) >= len(inventory.waiting) - len(inventory.needed) - 2
