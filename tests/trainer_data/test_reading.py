"""Reading from places that fail: tried again for a while, then said by name; what is missing is said at once."""

import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from tests.trainer_data.shards import config, corpus
from trainer.data.errors import DataError, DataUnreachableError
from trainer.data.formats import Tokens
from trainer.data.reading import Patience
from trainer.data.stream import DataStream

LENGTH = 16


class _Clock:
    """Time that passes only in sleep."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.waits_s: list[float] = []

    def read(self) -> float:
        """Now."""
        return self.now_s

    def pause(self, seconds: float) -> bool:
        """Time passes."""
        self.waits_s.append(seconds)
        self.now_s += seconds
        return False


def _failing(times: int, error: DataError) -> "Any":
    calls = iter([error] * times)

    def call() -> Tokens | str:
        for one in calls:
            raise one
        return "tokens"

    return call


def test_an_outage_that_ends_is_waited_for() -> None:
    """Ever longer pauses, and then the tokens."""
    clock = _Clock()
    patience = Patience(300.0, clock.pause, clock.read)
    assert patience.read(_failing(5, DataUnreachableError("no answer", "look", "a.bin"))) == "tokens"
    assert clock.waits_s == [0.5, 1.0, 2.0, 4.0, 8.0]


def test_an_outage_that_lasts_is_said() -> None:
    """Within the time that is given, the error names the shard."""
    clock = _Clock()
    with pytest.raises(DataUnreachableError) as caught:
        Patience(100.0, clock.pause, clock.read).read(_failing(99, DataUnreachableError("no answer", "look", "a.bin")))
    assert caught.value.shard == "a.bin"
    assert 60 < clock.now_s <= 100


def test_what_is_missing_is_no_outage() -> None:
    """Waiting would not bring it back."""
    clock = _Clock()
    with pytest.raises(DataError, match="is missing"):
        Patience(300.0, clock.pause, clock.read).read(_failing(1, DataError("a.bin is missing", "bring it back")))
    assert clock.waits_s == []


class _Flaky(LocalFileSystem):  # type: ignore[misc]
    """Local files as a remote place that fails whenever it is told to."""

    protocol = "flaky"
    failures = 0
    spared = 0  # a thread for which nothing fails

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Fail or read."""
        cls = type(self)
        if cls.failures and start and threading.get_ident() != cls.spared:
            cls.failures -= 1
            raise ConnectionResetError("connection reset")
        return bytes(super().cat_file(path, start=start, end=end, **kwargs))


@pytest.fixture
def _flaky() -> None:
    fsspec.register_implementation("flaky", _Flaky, clobber=True)
    _Flaky.failures = _Flaky.spared = 0


def _rows(stream: DataStream, batches: int) -> list[list[int]]:
    return [row for _ in range(batches) for row in stream.next_batch(8).tokens.tolist()]


@pytest.mark.usefixtures("_flaky")
def test_a_failing_place_changes_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads ahead that fail are tried again, and every token is that of the local files."""
    monkeypatch.setattr("trainer.data.reading._FIRST_WAIT_S", 0.0)
    local = config(corpus(tmp_path))
    expected = _rows(DataStream(local, sample_tokens=LENGTH), 20)
    stream = DataStream(config(f"flaky://{tmp_path}"), sample_tokens=LENGTH)
    _Flaky.failures = 7
    assert _rows(stream, 20) == expected
    assert _Flaky.failures == 0
    stream.close()


@pytest.mark.usefixtures("_flaky")
def test_a_reader_that_gives_up_is_heard(tmp_path: Path) -> None:
    """The error of a thread that reads ahead reaches whoever wants the batch, with the shard; closing does not hang."""
    stream = (
        DataStream(config(f"flaky://{tmp_path}", timeout_s=0.0), sample_tokens=LENGTH) if corpus(tmp_path) else None
    )
    assert stream is not None
    stream.next_batch(8)
    _Flaky.failures = 10_000
    with pytest.raises(DataUnreachableError, match=r"shard-\d\.bin") as caught:
        _rows(stream, 50)
    assert caught.value.shard is not None
    stream.close()


@pytest.mark.usefixtures("_flaky")
def test_closing_ends_those_who_wait(tmp_path: Path) -> None:
    """Readers that are between two tries give up; nobody waits for the outage to end."""
    corpus(tmp_path)
    stream = DataStream(config(f"flaky://{tmp_path}", timeout_s=1e6), sample_tokens=LENGTH)
    _Flaky.failures = 10_000
    _Flaky.spared = threading.get_ident()
    stream.next_batch(8)
    assert any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
    stream.close()
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
