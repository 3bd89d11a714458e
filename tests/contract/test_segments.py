"""Which segments of the shipped journal count: for any writers, those that the newest fence builds on, exactly once."""

from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.segments import Segment, counting, gap, parse_segment


class _World:
    """Writers that take over from each other; a superseded one may still cut and send, at any time."""

    def __init__(self) -> None:
        self.sent: list[Segment] = []
        self.begins: dict[int, int] = {}
        self.written: dict[int, int] = {}  # event -> the epoch under which it counts

    def take_over(self, epoch: int) -> int:
        """What the newest writer finds; returns the event from which it goes on."""
        found = [event for one in counting(self.sent, self.begins) for event in _events(one.segment, one.end)]
        begin = max(found, default=0) + 1
        self.written = {event: by for event, by in self.written.items() if event < begin}
        self.begins[epoch] = begin
        return begin

    def send(self, epoch: int, first: int, last: int) -> None:
        """A segment arrives."""
        self.sent.append(Segment(first, last, epoch))
        for event in range(first, last + 1):
            if all(event < begin for later, begin in self.begins.items() if later > epoch):
                self.written[event] = epoch


def _events(segment: Segment, end: int | None) -> range:
    return range(segment.first, end if end is not None else segment.last + 1)


@given(data=st.data())
def test_a_superseded_writer_changes_nothing(data: st.DataObject) -> None:
    """The events that count, and under which epoch, are those of the model, without a gap and each from one epoch."""
    world = _World()
    last: dict[int, int] = {}
    epochs = data.draw(st.integers(1, 4))
    for epoch in range(1, epochs + 1):
        last[epoch] = world.take_over(epoch) - 1
        for _ in range(data.draw(st.integers(0, 6))):
            writer = data.draw(st.integers(1, epoch))
            again = data.draw(st.integers(0, 2)) if last[writer] >= world.begins[writer] + 2 else 0
            first = last[writer] + 1 - again  # cut again after a death between sending and noting it
            last[writer] += data.draw(st.integers(1, 3))
            world.send(writer, first, last[writer])

    chosen = counting(world.sent, world.begins)
    counted: dict[int, int] = {}
    for one in chosen:
        counted.update(dict.fromkeys(_events(one.segment, one.end), one.segment.epoch))
    assert counted == world.written
    assert gap(chosen) is None
    assert sorted(counted) == list(range(1, len(counted) + 1))


def test_a_missing_segment_is_seen() -> None:
    """Whatever is not there although something later is."""
    chosen = counting([Segment(1, 10, 1), Segment(14, 20, 1)], {1: 1})
    assert gap(chosen) == 11


@given(first=st.integers(1, 10**12 - 1), length=st.integers(0, 1000), epoch=st.integers(0, 10**9))
def test_a_key_tells_its_segment(first: int, length: int, epoch: int) -> None:
    """And no other key is taken for one."""
    segment = Segment(first, min(first + length, 10**12 - 1), epoch)
    assert parse_segment(segment.key) == segment
    assert parse_segment(segment.key + ".tmp") is None
