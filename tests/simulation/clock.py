"""The simulated time: a queue of what is to happen, and a wall clock that may be set wrong. Seconds."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

_BEGAN_S = 1_700_000_000.0  # unix time at which every simulation begins


@dataclass(slots=True)
class Clock:
    """`now_s` is true time since the beginning; `wall_s` is what the machine believes."""

    now_s: float = 0.0
    wrong_by_s: float = 0.0
    _queue: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _number: int = 0

    @property
    def wall_s(self) -> float:
        """Unix time as the machine's clock shows it."""
        return _BEGAN_S + self.now_s + self.wrong_by_s

    def at(self, at_s: float, call: Callable[[], None]) -> None:
        """Have something happen at a moment; of two of the same moment, in the order of the asking."""
        self._number += 1
        heapq.heappush(self._queue, (max(at_s, self.now_s), self._number, call))

    def after(self, wait_s: float, call: Callable[[], None]) -> None:
        """Have something happen in so many seconds."""
        self.at(self.now_s + wait_s, call)

    def advance(self) -> bool:
        """Let the next thing happen; False if there is none."""
        if not self._queue:
            return False
        self.now_s, _, call = heapq.heappop(self._queue)
        call()
        return True
