"""The same failure twice from the same state is not tried a third time; anything else is."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policy.events import AttemptExited
from tests.orchestrator.simulated import World

_FRAMES = ("model.py:forward", "loop.py:run")


class _Failing(World):
    """Every attempt that trains dies at step 15, five steps after its checkpoint."""

    def fail(self, **how: Any) -> None:
        """Run one attempt to its death."""
        assert self.plan is not None
        self.load()
        while self.step < 15:
            self.take_step()
        fields = {"cause": "error", "detail": "ValueError: no", "frames": _FRAMES, **how}
        self.feed(AttemptExited(at_s=self.at_s, attempt=self.plan.attempt, **fields))


def _twice(first: dict[str, Any], second: dict[str, Any]) -> World:
    world = _Failing()
    world.open()
    world.fail()  # from the start: another state than the next two
    world.fail(**first)
    if world.ended is None:
        world.fail(**second)
    return world


def test_the_same_again_is_not_tried_again() -> None:
    """Halted, a person is paged with the failure, and no attempt follows."""
    world = _twice({}, {})
    assert world.ended is not None
    assert (world.ended.state, world.ended.exit_code) == ("halted", 3)
    assert "ValueError: no" in world.ended.because
    assert [notice.title for notice in world.notices if notice.level == "page"] == ["deterministic failure"]
    assert len(world.plans) == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"frames": ("other.py:f",)},
        {"detail": "KeyError: no"},
        {"cause": "killed"},
        {"cause": "store"},
        {"frames": ()},
    ],
)
def test_another_failure_is_tried_again(changed: dict[str, Any]) -> None:
    """Other frames, another exception, a cause that is the world's, or nothing to compare by."""
    assert _twice({}, changed).ended is None
    assert _twice(changed, {}).ended is None


@given(message=st.text(max_size=20))
def test_the_message_may_differ(message: str) -> None:
    """Addresses and sizes are in messages; type and frames tell the failure."""
    assert _twice({"detail": f"ValueError: {message}"}, {"detail": "ValueError: 0x7f"}).ended is not None


def test_a_native_crash_has_no_frames() -> None:
    """The same signal at the same step, after steps were done."""
    crash = {"cause": "native_crash", "signum": 11, "frames": (), "detail": "SIGSEGV, sent by somebody else"}
    assert _twice(crash, crash).ended is not None
    assert _twice(crash, {**crash, "signum": 7}).ended is None
