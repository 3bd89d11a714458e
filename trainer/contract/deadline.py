"""A total deadline for one call to an fsspec file system, whatever its kind."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

T = TypeVar("T")


def protocols(fs: AbstractFileSystem) -> tuple[str, ...]:
    """The names of its kind."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def call(fs: AbstractFileSystem, method: Callable[..., Any], *args: Any, timeout_s: float, **kwargs: Any) -> Any:
    """One call of one of its methods: s3fs alone waits for ever on a server that accepts and stays silent.

    Raises:
        TimeoutError: no answer within `timeout_s`.
    """
    if isinstance(fs, AsyncFileSystem):
        return method(*args, timeout=timeout_s, **kwargs)
    if "memory" in protocols(fs):
        return method(*args, **kwargs)
    return _within(timeout_s, lambda: method(*args, **kwargs))


def _within(timeout_s: float, blocking: Callable[[], T]) -> T:
    """Run a blocking call in a thread and stop waiting at the deadline; the thread ends with the call."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(blocking())
        except BaseException as error:
            failure.append(error)
            if not isinstance(error, Exception):
                raise

    thread = threading.Thread(target=run, daemon=True, name="store-call")
    thread.start()
    thread.join(timeout_s)
    if failure:
        raise failure[0]
    if not outcome:
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    return outcome[0]
