"""Every operation of a save and a restore fails once, in every way that a store can fail; and in pairs.

After each: what is committed loads to the last bit, nothing half-written can be chosen, nothing sound is condemned, and
the next save works.
"""

import contextlib
import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.stores import claimed
from tests.trainer.saving import Saving, full_state, trained
from trainer.checkpoint import load_checkpoint
from trainer.contract import fence
from trainer.contract.backends import Backend, LocalBackend
from trainer.contract.manifest import commit_id
from trainer.contract.store import Store, StoreError

T = TypeVar("T")

Failure = Literal["before", "after", "timeout", "403", "409", "412", "503", "truncated", "stale"]
_FAILURES: tuple[Failure, ...] = get_args(Failure)
_MORE_THAN_ANY = 200
#: Two bad transfers of one object in a row are beyond what a reader can tell from damage.
_PLANS = st.dictionaries(st.integers(1, 40), st.sampled_from(_FAILURES), min_size=2, max_size=3).filter(
    lambda plan: list(plan.values()).count("truncated") < 2
)


def _error(failure: Failure) -> Exception:
    match failure:
        case "timeout":
            return TimeoutError("no answer")
        case "403":
            return PermissionError(errno.EACCES, "Forbidden")
        case "412":  # as s3fs passes it on
            return OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold")
        case "409":
            return OSError(errno.EIO, "ConditionalRequestConflict")
        case _:
            return OSError(errno.EIO, "SlowDown: please reduce your request rate")


@dataclass
class Failing:
    """A real backend whose calls number so-and-so fail."""

    inner: Backend
    plan: dict[int, Failure] = field(default_factory=dict)
    calls: int = 0
    errors: tuple[type[Exception], ...] = (OSError,)

    def _call(self, run: Callable[[], T], spoil: Callable[[T], T], *, kind: str) -> T:
        self.calls += 1
        failure = self.plan.get(self.calls)
        match failure:
            case None:
                return run()
            case "after" | "timeout":  # the effect is there, the answer is not
                run()
                raise _error(failure)
            case "truncated":
                return spoil(run()) if kind == "read" else run()
            case "stale":
                return spoil(run()) if kind == "list" else run()
            case "409" | "412":
                if kind != "create":
                    return run()
                raise _error(failure)
            case _:
                raise _error(failure)

    def create(self, key: str, data: bytes, timeout_s: float) -> None:
        """Fail or create."""
        self._call(lambda: self.inner.create(key, data, timeout_s), _same, kind="create")

    def put_file(self, key: str, path: Path, timeout_s: float) -> None:
        """Fail or store."""
        self._call(lambda: self.inner.put_file(key, path, timeout_s), _same, kind="create")

    def read(self, key: str, start: int, end: int | None, timeout_s: float) -> bytes:
        """Fail, read, or read half."""
        return self._call(lambda: self.inner.read(key, start, end, timeout_s), _half, kind="read")

    def size(self, key: str, timeout_s: float) -> int:
        """Fail or tell."""
        return self._call(lambda: self.inner.size(key, timeout_s), _same, kind="size")

    def list(self, prefix: str, timeout_s: float) -> list[tuple[str, int]]:
        """Fail, list, or list all but the newest."""
        return self._call(lambda: self.inner.list(prefix, timeout_s), lambda found: found[:-1], kind="list")

    def delete(self, key: str, timeout_s: float) -> None:
        """Fail or delete."""
        self._call(lambda: self.inner.delete(key, timeout_s), _same, kind="delete")

    def abort_unfinished(self, prefix: str, timeout_s: float) -> int:
        """Fail or abort."""
        return self._call(lambda: self.inner.abort_unfinished(prefix, timeout_s), _same, kind="delete")

    def make_place(self) -> None:
        """Make it."""
        self.inner.make_place()

    def local_path(self, key: str) -> Path | None:
        """As if it were remote."""
        return None

    def close(self) -> None:
        """Nothing to close."""


def _same(value: T) -> T:
    return value


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _state(step: int) -> dict[str, Tensor]:
    return full_state(*trained(steps=step))


def _save(store: Store, root: Path, step: int) -> bool:
    """A save as the uploader does it: what is left unfinished first, then one try, and one more if that failed."""
    with Saving(store, root, object_bytes=700) as saving:
        commit = saving.snapshot(_state(step), step)
        saving.persist()
        for _ in range(2):
            with contextlib.suppress(StoreError):
                store.abort_unfinished("data/")
                saving.upload(commit)
                return True
    return False


def _assert_intact(store: Store, commit: str, step: int) -> None:
    loaded = load_checkpoint(store, commit).tensors
    expected = _state(step)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def _round(root: Path, plan: dict[int, Failure]) -> int:
    """One commit on a sound store, a second one and its restore on a failing one; returns how many calls were made."""
    backend = LocalBackend(root / "store")
    sound = claimed(Store(backend, "file://sound", 5.0))
    assert _save(sound, root / "first", 3)
    failing = Failing(backend, plan)
    shaky = Store(failing, "file://shaky", 5.0)

    arrived = _save(shaky, root / "second", 6)

    present = fence.commits_present(sound)
    assert commit_id(3, 1, 1) in present
    for commit in present:
        _assert_intact(sound, commit, int(commit[:12]))
    if arrived:
        assert commit_id(6, 1, 1) in present
        with contextlib.suppress(StoreError):  # that says nothing of the commit; nothing else may come
            _assert_intact(shaky, commit_id(6, 1, 1), 6)
    calls = failing.calls
    assert _save(sound, root / "third", 9)
    return calls


@pytest.fixture
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.contract.store._RETRY_PAUSE_S", 0.0)


@pytest.mark.usefixtures("_no_pauses")
@pytest.mark.parametrize("failure", _FAILURES)
def test_every_single_failure(tmp_path: Path, failure: Failure) -> None:
    """The n-th call fails, for n = 1, 2, ... until a whole save and restore makes fewer calls than n."""
    for number in range(1, _MORE_THAN_ANY):
        if _round(tmp_path / str(number), {number: failure}) < number:
            assert number > 10, "a save and a restore make more calls than that"
            return
    raise AssertionError("it never came to its end")


@pytest.mark.usefixtures("_no_pauses")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=_PLANS)
def test_failures_in_pairs(tmp_path_factory: pytest.TempPathFactory, plan: dict[int, Failure]) -> None:
    """Two or three at random places."""
    _round(tmp_path_factory.mktemp("pair"), plan)


@pytest.mark.usefixtures("_no_pauses")
def test_a_lost_response_of_the_manifest_is_our_own_commit(tmp_path: Path) -> None:
    """The last call of a save creates the manifest: its answer is lost, its object is recognised by its bytes."""
    backend = LocalBackend(tmp_path / "store")
    claimed(Store(backend, "file://sound", 5.0))
    counted = Failing(backend)
    assert _save(Store(counted, "file://a", 5.0), tmp_path / "a", 3)
    failing = Failing(backend, {counted.calls: "after"})

    assert _save(Store(failing, "file://b", 5.0), tmp_path / "b", 6)
    assert failing.calls == counted.calls + 1, "read back, and not sent again"
