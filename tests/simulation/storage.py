"""A storage in memory that fails as real ones do: away, slow to show what is new, cut short, silent on success."""

import builtins
import errno
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.simulation.clock import Clock
from trainer.contract.store import Store, StoredObject, StoreUnavailable


@dataclass(slots=True)
class SimBackend:
    """Objects by room (the first part of a key), so that listing commits does not walk through all else.

    Armed faults count down: `stale` listings miss the object that was created last, `torn` reads end early, `silent`
    creates are done and answered by a timeout. `fired` counts what has really happened.
    """

    clock: Clock
    errors: tuple[type[Exception], ...] = (OSError,)
    away_until_s: float = -1.0
    stale: int = 0
    torn: int = 0
    silent: int = 0
    drop_commits: bool = False
    fired: Counter[str] = field(default_factory=Counter)
    _rooms: dict[str, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    _listed: dict[str, list[StoredObject]] = field(default_factory=dict)
    _newest: str = ""

    def _room(self, key: str) -> dict[str, bytes]:
        if self.clock.now_s < self.away_until_s:
            self.fired["store_away"] += 1
            raise TimeoutError
        return self._rooms[key.partition("/")[0]]

    def create(self, key: str, data: bytes, timeout_s: float) -> None:
        """Whole or not at all."""
        room = self._room(key)
        if key in room:
            raise FileExistsError(errno.EEXIST, key)
        room[key] = data
        self._listed.pop(f"{key.partition('/')[0]}/", None)
        self._newest = key
        if self.drop_commits and key.startswith("commits/"):
            del room[key]
        if self.silent:
            self.silent -= 1
            self.fired["lost_response"] += 1
            raise TimeoutError

    def put_file(self, key: str, path: Path, timeout_s: float) -> None:
        """The same from a file."""
        self.create(key, path.read_bytes(), timeout_s)

    def read(self, key: str, start: int, end: int | None, timeout_s: float) -> bytes:
        """Bytes of an object, fewer if this read is torn."""
        room = self._room(key)
        if key not in room:
            raise FileNotFoundError(key)
        data = room[key][start:end]
        if self.torn and len(data) > 1:
            self.torn -= 1
            self.fired["torn_read"] += 1
            return data[: len(data) // 2]
        return data

    def size(self, key: str, timeout_s: float) -> int:
        """Of an object."""
        room = self._room(key)
        if key not in room:
            raise FileNotFoundError(key)
        return len(room[key])

    def list(self, prefix: str, timeout_s: float) -> list[tuple[str, int]]:
        """What is below a prefix; a stale listing misses the newest object."""
        room = self._room(prefix)
        hidden = ""
        if self.stale and self._newest.startswith(prefix):
            self.stale -= 1
            self.fired["stale_listing"] += 1
            hidden = self._newest
        return sorted((key, len(data)) for key, data in room.items() if key.startswith(prefix) and key != hidden)

    def listed(self, prefix: str) -> Sequence[StoredObject]:
        """The same as the store would say it, remembered for as long as nothing changes: fences are many, and asked
        for at each step of the way."""
        room = self._room(prefix)
        if prefix.count("/") > 1 or (self.stale and self._newest.startswith(prefix)):
            return [StoredObject(key, size) for key, size in self.list(prefix, 0.0)]
        if prefix not in self._listed:
            self._listed[prefix] = [StoredObject(key, len(room[key])) for key in sorted(room)]
        return self._listed[prefix]

    def make_place(self) -> None:
        """There is always a place."""

    def delete(self, key: str, timeout_s: float) -> None:
        """One that is not there is no error."""
        self._room(key).pop(key, None)
        self._listed.pop(f"{key.partition('/')[0]}/", None)

    def abort_unfinished(self, prefix: str, timeout_s: float) -> int:
        """Nothing is ever half there."""
        return 0

    def local_path(self, key: str) -> Path | None:
        """In no file."""
        return None

    def close(self) -> None:
        """Nothing is held."""

    def truth(self, room: str) -> dict[str, bytes]:
        """What is really there, whatever fails."""
        return self._rooms[room]


class SimStore(Store):
    """The real store over it, but for listings, and its short pauses between tries take no time."""

    def __init__(self, backend: SimBackend) -> None:
        super().__init__(backend, "sim://store", 60.0, sleep=lambda seconds: None)
        self._sim = backend

    def list(self, prefix: str = "") -> builtins.list[StoredObject]:
        """As the real one, whose keys are all ours here."""
        try:
            return builtins.list(self._sim.listed(prefix))
        except TimeoutError as error:
            raise StoreUnavailable(self.url, "no answer") from error
