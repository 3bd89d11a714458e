"""A run's store: does it keep its promises, and how fast is it?"""

import os
import time
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from statistics import median

from orchestrator.config import ResolvedRun
from orchestrator.findings import Finding, graded
from trainer.contract.store import Store, StoreError, open_store

_CALLS = 5
_SLOW_CALL_S = 1.0
_LARGE_BYTES = 32 << 20
_SLOW_BYTES_S = 50e6


def examine_store(run: ResolvedRun) -> list[Finding]:
    """Conditional writes, the time of small calls, the speed of large ones. Everything written is removed again."""
    config = run.config.store
    try:
        with closing(open_store(config, run.source.parent, f"{run.config.name}-doctor")) as store:
            store.make_place()
            try:
                store.probe()
                return [Finding("store", "pass", f"{store.url} is there, and create-only writes hold"), *_speeds(store)]
            finally:
                _leave_no_trace(store)
    except StoreError as error:
        return [Finding("store", "fail", str(error), "")]


def _leave_no_trace(store: Store) -> None:
    """A store in a directory has got one of its own for this."""
    place = store.local_path("probe")
    if place is not None:
        with suppress(OSError):
            place.parent.rmdir()


def _speeds(store: Store) -> list[Finding]:
    keys = [f"probe/{uuid.uuid4().hex}" for _ in range(_CALLS + 1)]
    data = os.urandom(_LARGE_BYTES)
    try:
        small_s = [_seconds(partial(store.create, key, b"{}")) for key in keys[:_CALLS]]
        listed_s = _seconds(lambda: store.list("probe/"))
        up_s = _seconds(lambda: store.create(keys[-1], data))
        down_s = _seconds(lambda: store.read(keys[-1]))
    finally:
        for key in keys:
            store.delete(key)
    call_s = median(small_s)
    seen = f"a small object takes {call_s * 1e3:.0f} ms, a listing {listed_s * 1e3:.0f} ms"
    remedy = "use a store that is nearer; every save and verdict takes several such calls"
    rate = _LARGE_BYTES / up_s
    rates = f"{rate / 1e6:.0f} MB/s up, {_LARGE_BYTES / down_s / 1e6:.0f} MB/s down"
    return [
        graded("store calls", seen, good=call_s < _SLOW_CALL_S, remedy=remedy),
        graded("store speed", rates, good=rate > _SLOW_BYTES_S, remedy="saves take long to be safe: save less often"),
    ]


def _seconds(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s
