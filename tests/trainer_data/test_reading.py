"""Reading from places that fail, fall silent or change: waited for, then said by name; nothing hangs."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer_data.far import FarFileSystem, far
from tests.trainer_data.shards import config, corpus, llmc, token_at
from trainer.data.errors import DataError, DataUnreachableError
from trainer.data.patience import Patience
from trainer.data.stream import DataStream

LENGTH = 16
OUTAGE = DataUnreachableError("a.bin: no answer", "look", "a.bin")
DAMAGE = DataError("a.bin: truncated", "bring it back", "a.bin")


class _Clock:
    """Time that passes only in sleep."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pauses_s: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Time passes."""
        self.pauses_s.append(seconds)
        self.now_s += seconds

    def patience(self, timeout_s: float, **more: Any) -> Patience:
        """That keeps this time."""
        return Patience(timeout_s, clock=self, sleep=self.sleep, **more)


class _Attempts:
    """Fails with these errors one after another, then succeeds."""

    def __init__(self, *errors: DataError) -> None:
        self._errors = iter(errors)
        self.limits_s: list[float] = []

    def __call__(self, timeout_s: float) -> str:
        self.limits_s.append(timeout_s)
        for error in self._errors:
            raise error
        return "tokens"


@pytest.fixture(autouse=True)
def _settled() -> Iterator[None]:
    FarFileSystem.settle()
    yield
    FarFileSystem.settle()


@given(failures=st.integers(0, 12), timeout_s=st.floats(0, 500))
def test_an_outage_is_waited_for_up_to_the_deadline(failures: int, timeout_s: float) -> None:
    """Ever longer pauses that never pass the deadline; an error means that all the time was used."""
    clock, attempts = _Clock(), _Attempts(*[OUTAGE] * failures)
    outcome = ""
    with suppress(DataUnreachableError):
        outcome = clock.patience(timeout_s).outlast(attempts)
    if outcome:
        assert len(clock.pauses_s) == failures
    else:
        assert clock.now_s >= timeout_s - 1e-6
    assert sum(clock.pauses_s) <= timeout_s + 1e-6
    assert all(pause <= min(10.0, 0.5 * 2**number) for number, pause in enumerate(clock.pauses_s))
    assert all(1.0 <= limit <= max(1.0, min(60.0, timeout_s)) for limit in attempts.limits_s)


def test_an_outage_without_end_is_said() -> None:
    """With the shard, and how long it was tried."""
    clock = _Clock()
    with pytest.raises(DataUnreachableError, match=r"no answer \(tried for 300 s\)") as caught:
        clock.patience(300.0).outlast(_Attempts(*[OUTAGE] * 10_000))
    assert caught.value.remedy == "look"


def test_damage_is_looked_at_twice() -> None:
    """Once more at once, since a proxy may have cut the answer; and then it is no outage to be waited for."""
    clock = _Clock()
    assert clock.patience(300.0).outlast(_Attempts(DAMAGE)) == "tokens"
    with pytest.raises(DataError, match="truncated"):
        clock.patience(300.0).outlast(_Attempts(DAMAGE, DAMAGE))
    assert clock.pauses_s == []


def test_who_is_asked_to_leave_waits_no_longer() -> None:
    """The next failure is the last."""
    clock = _Clock()
    patience = clock.patience(300.0, give_up=lambda: len(clock.pauses_s) >= 3)
    with pytest.raises(DataUnreachableError):
        patience.outlast(_Attempts(*[OUTAGE] * 100))
    assert len(clock.pauses_s) == 3


def _rows(stream: DataStream, batches: int = 20) -> list[list[int]]:
    return [row for _ in range(batches) for row in stream.next_batch(8).tokens.tolist()]


def _open_far(root: Path, **more: Any) -> DataStream:
    return DataStream(far(root), sample_tokens=LENGTH, **more)


def test_a_failing_place_changes_no_token(tmp_path: Path) -> None:
    """Whichever reads fail, those ahead or those that are needed now: the tokens are those of the local files."""
    expected = _rows(DataStream(config(corpus(tmp_path)), sample_tokens=LENGTH))
    stream = _open_far(tmp_path, patience=_Clock().patience(1e6))
    FarFileSystem.failures = 17
    assert _rows(stream) == expected
    assert FarFileSystem.failures == 0
    stream.close()


def test_each_block_is_fetched_once_an_epoch(tmp_path: Path) -> None:
    """What is read ahead is what is handed out afterwards."""
    stream = _open_far(corpus(tmp_path))
    stream.next_batch(stream.samples_per_epoch)
    blocks = {(shard, start) for shard, start, _ in FarFileSystem.reads}
    one_epoch = len(FarFileSystem.reads)
    stream.close()
    assert one_epoch <= len(blocks) + 8  # and what the next epoch begins with
    assert len(blocks) >= 190 // 8


def test_an_error_of_a_reader_ahead_is_heard(tmp_path: Path) -> None:
    """With the shard's name, as soon as its block is wanted."""
    stream = _open_far(corpus(tmp_path), patience=_Clock().patience(3.0))
    stream.next_batch(8)
    FarFileSystem.failures = 10_000
    with pytest.raises(DataUnreachableError, match=r"shard-\d\.bin: connection reset") as caught:
        _rows(stream, 50)
    assert caught.value.shard is not None
    stream.close()


def _readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_a_silent_place_is_no_hang(tmp_path: Path) -> None:
    """It takes connections and never answers: an error by the deadline, and closing does not wait for it either."""
    stream = _open_far(corpus(tmp_path), patience=Patience(0.0))
    stream.next_batch(8)
    FarFileSystem.answers.clear()
    with pytest.raises(DataUnreachableError, match="no answer within 1 s"):
        _rows(stream, 50)
    stream.close()
    stream.close()
    assert _readers(), "no read was in flight"
    FarFileSystem.answers.set()
    for thread in _readers():
        thread.join(10)
    assert not _readers()


_FORK = """
import os, sys
from pathlib import Path
from tests.trainer_data.far import FarFileSystem, far
from tests.trainer_data.shards import config
from trainer.data.stream import DataStream
FarFileSystem.settle()
root = Path(sys.argv[1])
local, remote = (DataStream(data, sample_tokens=16) for data in (config(root), far(root)))
expected = local.next_batch(8).tokens, remote.next_batch(8).tokens
child = os.fork()
if child == 0:
    code = 1
    try:
        local.next_batch(8)
        remote.next_batch(8)
    except RuntimeError as error:
        code = 7 if "does not survive a fork" in str(error) else 2
    os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
remote.next_batch(8)
"""


def test_a_fork_is_refused_where_it_would_hang(tmp_path: Path) -> None:
    """Threads stay with the parent: a remote stream says so in the child; a local one has none and goes on."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _FORK, str(corpus(tmp_path))]
    done = subprocess.run(command, cwd=root, timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("damage", ["shorter", "replaced", "written"])
def test_a_local_shard_that_changes_under_the_run(tmp_path: Path, damage: str) -> None:
    """Cut short, replaced by another file, or written in place: an error that names it, no bus error."""
    stream = DataStream(config(corpus(tmp_path, (3000,))), sample_tokens=LENGTH)
    stream.next_batch(8)
    path = tmp_path / "shard-0.bin"
    match damage:
        case "shorter":
            os.truncate(path, 1500)
        case "replaced":
            llmc(tmp_path / "other", token_at(1, np.arange(3000))).rename(path)
        case "written":
            path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(DataError, match=r"shard-0\.bin: was written to") as caught:
        stream.next_batch(stream.samples_per_epoch)
    assert caught.value.remedy
