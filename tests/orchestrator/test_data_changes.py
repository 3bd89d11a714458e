"""Where another order of the data begins: behind what was read and decided, and never for less."""

from orchestrator.policy.events import RunOpened, StopRequested
from tests.orchestrator.simulated import BATCH, World
from trainer.contract.plan import OrderSpec, Share, SkipRange


def _order(num_shards: int = 4, **weights: float) -> OrderSpec:
    mix = tuple(Share(source=name, weight=weight) for name, weight in (weights or {"train": 1.0}).items())
    return OrderSpec(manifest=f"{num_shards}", num_shards=num_shards, mix=mix, seed=1, sample_tokens=32)


def _launch(world: World, order: OrderSpec | None) -> None:
    world.feed(
        RunOpened(
            at_s=world.at_s, run_id="sim", config_digest="c", policy_digest="p", code_version="1", order=order
        )
    )  # fmt: skip


def _steps(world: World, count: int) -> None:
    """Load, take steps, and stop with a checkpoint."""
    world.load()
    for _ in range(count):
        world.take_step()
    world.feed(StopRequested(at_s=world.at_s, by="operator"))
    world.commit()
    world.exit("preempted")


def _segments(world: World) -> list[tuple[int, int]]:
    """(begin, number of shards) of the newest plan's segments."""
    return [(segment.from_position, segment.num_shards) for segment in world.plans[-1].segments]


def test_the_first_order_holds_until_another_is_asked_for() -> None:
    """Launched again with the same data, or with data that nobody looked at: the same one segment."""
    world = World()
    for order in (_order(), _order(), None):
        _launch(world, order)
        assert _segments(world) == [(0, 4)]
        _steps(world, 7)
    assert not [notice for notice in world.notices if notice.title == "data changed"]


def test_other_data_begins_behind_what_was_read() -> None:
    """And is told; the old segment stays as it was."""
    world = World()
    _launch(world, _order())
    _steps(world, 7)
    _launch(world, _order(6, train=3.0, more=1.0))
    assert _segments(world) == [(0, 4), (7 * BATCH, 6)]
    (notice,) = [notice for notice in world.notices if notice.title == "data changed"]
    assert notice.text == "from raw position 56 on: train 3, more 1; 2 shards were added to the 4"


def test_data_that_changed_twice_before_it_was_read_changed_once() -> None:
    """Nothing was read from the second order, so the third takes its place; and back again is no change at all."""
    world = World()
    _launch(world, _order())
    _steps(world, 7)
    for order, expected in ((_order(5), [(0, 4), (56, 5)]), (_order(6), [(0, 4), (56, 6)]), (_order(), [(0, 4)])):
        _launch(world, order)
        assert _segments(world) == expected
        _steps(world, 0)


def test_before_anything_was_read_there_is_one_order() -> None:
    """The data was corrected before the first step."""
    world = World()
    _launch(world, _order())
    _steps(world, 0)
    _launch(world, _order(5))
    assert _segments(world) == [(0, 5)]


def test_a_skip_that_lies_ahead_keeps_its_meaning() -> None:
    """It was decided for samples of the old order: the new one begins behind it."""
    world = World()
    _launch(world, _order())
    _steps(world, 7)
    world.engine.state.skips.append(SkipRange(begin=60, end=90))
    _launch(world, _order(5))
    assert _segments(world) == [(0, 4), (90, 5)]


def test_a_crash_back_across_the_boundary_reads_the_old_order_again() -> None:
    """The checkpoint is older than the boundary, which stays where it is."""
    world = World()
    _launch(world, _order())
    world.load()
    for _ in range(14):
        world.take_step()
    world.exit("killed")
    assert world.plans[-1].candidates[0].startswith("000000000010")
    _steps(world, 0)
    _launch(world, _order(5))
    assert _segments(world) == [(0, 4), (80, 5)]
    _steps(world, 3)
    _launch(world, _order(5))
    assert _segments(world) == [(0, 4), (80, 5)]
