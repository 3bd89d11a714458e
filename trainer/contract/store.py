"""The checkpoint store: create-only objects under one run's prefix, on any fsspec URL.

Owns what is true of every storage: keys are checked, an object appears whole or not at all and is never overwritten,
every call has a deadline, listings are never cached, and failures have one meaning each (`StoreError` and below).
Torch-free; knows nothing of checkpoints. Secrets come from the environment and appear in no message.
"""
# ruff: noqa: N818  (the errors are named after the state the store is in)

import errno
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

from trainer.contract.backends import Backend, LocalBackend
from trainer.contract.config import StoreConfig

T = TypeVar("T")

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_CHUNK_BYTES = 16 << 20  # of a streamed read: large enough for S3, small enough to hold
_TRANSFER_UNIT_BYTES = 64 << 20  # a transfer gets the deadline once per unit: at 60 s that is about 1 MB/s
_CREATE_TRIES = 3
_RETRY_PAUSE_S = 0.2


class StoreError(Exception):
    """The store could not do what was asked. `url` names it, without secrets; `key` the object, if there is one."""

    def __init__(self, url: str, why: str, key: str | None = None) -> None:
        self.url = url
        self.key = key
        self.why = why
        super().__init__(f"store {url}{f', object {key}' if key else ''}: {why}")


class StoreUnavailable(StoreError):
    """No answer, or one that means try later."""


class StoreDenied(StoreError):
    """The credentials are missing, wrong, or not enough."""


class StoreReadOnly(StoreError):
    """Nothing can be written here."""


class StoreFull(StoreError):
    """No space or quota left."""


class StoreUnconditional(StoreError):
    """The store overwrites an object although it was told to create it only."""


class StoreConfigInvalid(StoreError):
    """The configuration of the store cannot work."""


class ObjectMissing(StoreError):
    """There is no such object."""


class ObjectExists(StoreError):
    """There is another object of this name already."""


class KeyInvalid(ValueError):
    """A key that could leave the prefix, or that some storage would change."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One entry of a listing."""

    key: str
    bytes: int


def check_key(key: str) -> str:
    """Return the key if it is safe: relative, of plain characters, no part that starts with a dot.

    Raises:
        KeyInvalid: it is not.
    """
    if not _is_key(key):
        raise KeyInvalid(f"{key!r} is no store key; use letters, digits, '.', '_', '-' between single slashes")
    return key


def _is_key(key: str) -> bool:
    return len(key) <= 512 and _KEY.fullmatch(key) is not None


class Store:
    """Objects below one prefix. Every method raises `StoreError`, and `KeyInvalid` for a key that is none."""

    def __init__(
        self, backend: Backend, url: str, timeout_s: float, allow_unconditional: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self._sleep = sleep
        self.backend = backend
        self.url = url
        self.timeout_s = timeout_s
        self._allow_unconditional = allow_unconditional

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def create(self, key: str, data: bytes) -> None:
        """Create an object; bytes that should be told from another writer's need a nonce in them.

        A lost response looks like a failure or, after a retry, like an object that exists: so the object is read
        back, and if it holds our bytes it is ours.

        Raises:
            ObjectExists: another object has this name.
        """
        check_key(key)
        timeout_s = self._transfer_timeout(len(data))
        self._create(key, lambda: self.backend.create(key, data, timeout_s), lambda: self.read(key) == data)

    def put_file(self, key: str, path: Path) -> None:
        """Create an object from a local file, which must not change afterwards (it may be linked, not copied).

        The key must be unique to this writer: after a lost response an object of the same size counts as ours.
        """
        check_key(key)
        size = self._guard(key, lambda: path.stat().st_size)
        timeout_s = self._transfer_timeout(size)
        self._create(key, lambda: self.backend.put_file(key, path, timeout_s), lambda: self.size(key) == size)

    def read(self, key: str) -> bytes:
        """The whole object; for small ones."""
        check_key(key)
        return self._guard(key, lambda: self.backend.read(key, 0, None, self.timeout_s))

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes [start, end), fewer at the end of the object."""
        check_key(key)
        timeout_s = self._transfer_timeout(end - start)
        return self._guard(key, lambda: self.backend.read(key, start, end, timeout_s))

    def stream(self, key: str, size: int, chunk_bytes: int = _CHUNK_BYTES) -> Iterator[bytes]:
        """The first `size` bytes in chunks; ends early if the object is shorter."""
        for start in range(0, size, chunk_bytes):
            end = min(start + chunk_bytes, size)
            chunk = self.read_range(key, start, end)
            yield chunk
            if len(chunk) < end - start:
                return

    def size(self, key: str) -> int:
        """Bytes of an object."""
        check_key(key)
        return self._guard(key, lambda: self.backend.size(key, self.timeout_s))

    def list(self, prefix: str = "") -> list[StoredObject]:
        """What lies below `prefix` now, sorted by key; the prefix is empty or ends with a slash.

        Names that no key can have are somebody else's and are left out.
        """
        if prefix:
            check_key(prefix.removesuffix("/"))
            prefix = prefix.removesuffix("/") + "/"
        found = self._guard(None, lambda: self.backend.list(prefix, self.timeout_s))
        return [StoredObject(key, size) for key, size in found if _is_key(key)]

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        check_key(key)
        self._guard(key, lambda: self.backend.delete(key, self.timeout_s))

    def local_path(self, key: str) -> Path | None:
        """The file of an object, for a store on this machine's disk; None elsewhere."""
        return self.backend.local_path(check_key(key))

    def abort_unfinished(self, prefix: str) -> int:
        """Remove what transfers that died have left below `prefix`; no listing shows it. Returns how many.

        Only for the one writer of that prefix: it would end another's transfers too.
        """
        check_key(prefix.removesuffix("/"))
        return self._guard(None, lambda: self.backend.abort_unfinished(prefix, self.timeout_s))

    def close(self) -> None:
        """Release connections."""
        self.backend.close()

    def make_place(self) -> None:
        """Make the place where objects will lie, for a store in a directory. Only for a run that begins."""
        self._guard(None, self.backend.make_place)

    def probe(self) -> None:
        """Create one key twice and remove it: is the store there, writable, and does it honour create-only?

        Raises:
            StoreUnconditional: the second create succeeded, and the configuration does not allow that.
            StoreError: it is not there, not writable, or full.
        """
        key = f"probe/{uuid.uuid4().hex}.json"
        try:
            self.create(key, b'"first"')
        except ObjectMissing as error:
            why = "the bucket or directory does not exist; create it, or correct store.url"
            raise StoreUnavailable(self.url, why) from error
        try:
            self.create(key, b'"second"')
        except ObjectExists:
            return
        finally:
            self.delete(key)
        if not self._allow_unconditional:
            raise StoreUnconditional(
                self.url,
                "it ignores conditional writes (If-None-Match), so two writers could destroy each other's checkpoints; "
                "use another store, or set store.allow_unconditional: true where only one writer can ever exist",
            )

    def _create(self, key: str, attempt: Callable[[], None], is_ours: Callable[[], bool]) -> None:
        failure: StoreError | None = None
        for number in range(_CREATE_TRIES):
            self._sleep(_RETRY_PAUSE_S * number)
            try:
                return self._guard(key, attempt)
            except (ObjectExists, StoreUnavailable) as error:
                failure = error
            try:
                if is_ours():
                    return None
                raise ObjectExists(self.url, "exists already, with other content", key)
            except ObjectMissing:
                continue  # it never arrived, or was removed since: try again
        assert failure is not None
        raise failure

    def _guard(self, key: str | None, call: Callable[[], T]) -> T:
        try:
            return call()
        except self.backend.errors as error:
            raise meaning(self.url, key, error) from error

    def _transfer_timeout(self, size: int) -> float:
        return self.timeout_s * max(1, -(-size // _TRANSFER_UNIT_BYTES))


def meaning(url: str, key: str | None, error: Exception) -> StoreError:
    """Which of our errors a storage's error is. `url` and `key` say what it is about."""
    match error:
        case TimeoutError():
            return StoreUnavailable(url, "no answer within store.timeout_s; check the network and the server", key)
        case FileExistsError():
            return ObjectExists(url, "exists already", key)
        case OSError(errno=errno.EINVAL) if "pre-condition" in str(error).lower():  # how s3fs passes on a 412
            return ObjectExists(url, "exists already", key)
        case FileNotFoundError():
            return ObjectMissing(url, "does not exist", key)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG):
            return StoreFull(url, "no space left; free some, or keep fewer checkpoints (checkpoint.keep_good)", key)
        case OSError(errno=errno.EROFS):
            return StoreReadOnly(url, "the file system is read-only; remount it, or choose another store.url", key)
        case OSError(errno=errno.ENODEV) if url.startswith("file:"):
            return StoreUnavailable(url, "its directory is gone; is the file system mounted?", key)
        case PermissionError() if url.startswith("file:"):
            return StoreReadOnly(url, "the directory is not writable by this user; change its owner or store.url", key)
        case PermissionError():
            return StoreDenied(
                url, f"access denied ({first_line(error)}); check store.key_env and store.secret_env", key
            )
        case NotADirectoryError():
            return StoreReadOnly(url, "a part of the path is a file, not a directory; correct store.url", key)
        case _ if "redentials" in str(error):
            return StoreDenied(url, "no credentials found; name them with store.key_env and store.secret_env", key)
    why = f"{type(error).__name__}: {first_line(error)}; check store.url, store.endpoint_url and that the server is up"
    return StoreUnavailable(url, why, key)


def first_line(error: Exception) -> str:
    """What an error says first, short enough for a message."""
    return (str(error).splitlines() or [""])[0][:200]


def open_store(
    config: StoreConfig, base_dir: Path, prefix: str, env: Mapping[str, str] = os.environ, *, apart: bool = False
) -> Store:
    """The store of one run. Nothing is touched yet; `Store.probe` does that.

    Args:
        config: the `store:` section.
        base_dir: what a relative path in `file://./store` is relative to.
        prefix: the run's id; every object lies below it.
        env: where secrets are looked up by the names that the configuration gives.
        apart: have a process of its own talk to a remote storage, so that this one needs none of its libraries and
            memory, and cannot be held up or brought down by them.

    Raises:
        StoreConfigInvalid: an unknown protocol, a missing package, or a secret that is not in the environment.
    """
    check_key(prefix)
    protocol, _, rest = config.url.rpartition("://")
    if protocol in ("", "file", "local"):
        root = base_dir / rest / prefix
        return Store(LocalBackend(root), f"file://{root}", config.timeout_s, config.allow_unconditional)
    url = _without_secrets(config.url).rstrip("/") + f"/{prefix}"
    if "@" in urlsplit(config.url).netloc:
        raise StoreConfigInvalid(url, "credentials in the URL end up in logs; use store.key_env and store.secret_env")
    return Store(_remote(config, url, prefix, env, apart=apart), url, config.timeout_s, config.allow_unconditional)


def _remote(config: StoreConfig, url: str, prefix: str, env: Mapping[str, str], *, apart: bool) -> Backend:
    """Imported here, because of what the libraries weigh."""
    if apart:
        from trainer.contract.apart import ApartBackend

        return ApartBackend(config, url, prefix, env)
    from trainer.contract.remote import open_remote

    return open_remote(config, url, prefix, env)


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
