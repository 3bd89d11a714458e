"""Everything that fsspec knows beside the local disk: S3 above all.

Imported only where such a store is used: its libraries take more memory than the rest of a supervisor, which talks to
them through a process of their own (`trainer.contract.apart`).
"""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from trainer.contract.config import StoreConfig
from trainer.contract.deadline import call, protocols
from trainer.contract.store import StoreConfigInvalid, first_line

_MEMORY_LOCK = threading.Lock()  # fsspec's memory file system is one object per process, so is its lock


class FsspecBackend:
    """Objects of any fsspec file system. Its listing cache must be off: a stale listing hides commits."""

    def __init__(self, fs: AbstractFileSystem, root: str, errors: tuple[type[Exception], ...] = (OSError,)) -> None:
        self._fs = fs
        self._root = root.rstrip("/")
        self._in_memory = "memory" in protocols(fs)
        self.errors = errors

    def create(self, key: str, data: bytes, timeout_s: float) -> None:
        """`pipe_file(mode="create")`, on S3 If-None-Match; never `open(..., "xb")`, which overwrites if empty."""
        if self._in_memory:
            self._create_in_memory(key, data)
            return
        self._call(self._fs.pipe_file, self._path(key), data, mode="create", timeout_s=timeout_s)

    def put_file(self, key: str, path: Path, timeout_s: float) -> None:
        """`put_file(mode="create")`; large objects go in parts, of which at most four are in memory."""
        if self._in_memory:
            self._create_in_memory(key, path.read_bytes())
            return
        extra = {"max_concurrency": 4} if "s3" in protocols(self._fs) else {}
        self._call(self._fs.put_file, str(path), self._path(key), mode="create", timeout_s=timeout_s, **extra)

    def read(self, key: str, start: int, end: int | None, timeout_s: float) -> bytes:
        """A ranged read unless the whole object is wanted."""
        limits = {} if start == 0 and end is None else {"start": start, "end": end}
        return bytes(self._call(self._fs.cat_file, self._path(key), timeout_s=timeout_s, **limits))

    def size(self, key: str, timeout_s: float) -> int:
        """Ask for the object's head."""
        info = self._call(self._fs.info, self._path(key), timeout_s=timeout_s)
        if info.get("type") == "directory":
            raise FileNotFoundError(key)
        return int(info["size"])

    def list(self, prefix: str, timeout_s: float) -> list[tuple[str, int]]:
        """One flat listing; nothing there is an empty one."""
        where = self._path(prefix.rstrip("/")) if prefix else self._root
        try:
            found = self._call(self._fs.find, where, detail=True, timeout_s=timeout_s)
        except FileNotFoundError:
            return []
        files = ((name, info) for name, info in found.items() if info.get("type") != "directory")
        keys = ((name[len(self._root) :].lstrip("/"), int(info["size"] or 0)) for name, info in files)
        return sorted((key, size) for key, size in keys if key and key.startswith(prefix))

    def make_place(self) -> None:
        """A bucket is made by a person; a prefix needs no making."""

    def delete(self, key: str, timeout_s: float) -> None:
        """Remove one object."""
        try:
            self._call(self._fs.rm_file, self._path(key), timeout_s=timeout_s)
        except FileNotFoundError:
            return

    def abort_unfinished(self, prefix: str, timeout_s: float) -> int:
        """Multipart uploads below our own prefix; s3fs itself could only end those of the whole bucket."""
        if "s3" not in protocols(self._fs):
            return 0
        bucket, _, root = self._root.partition("/")
        ours = f"{root}/{prefix}"
        answer = self._call(self._fs.call_s3, "list_multipart_uploads", Bucket=bucket, Prefix=ours, timeout_s=timeout_s)
        stale = answer.get("Uploads", [])
        for upload in stale:
            self._call(self._fs.abort_mpu, bucket, upload["Key"], upload["UploadId"], timeout_s=timeout_s)
        return len(stale)

    def local_path(self, key: str) -> Path | None:
        """Remote objects lie on no disk of ours."""
        return None

    def close(self) -> None:
        """Close the connections that s3fs keeps in its event loop thread."""
        close_session = getattr(self._fs, "close_session", None)
        client = getattr(self._fs, "_s3", None)
        if close_session is not None and client is not None:
            close_session(self._fs.loop, client)

    def _create_in_memory(self, key: str, data: bytes) -> None:
        with _MEMORY_LOCK:
            if self._fs.exists(self._path(key)):
                raise FileExistsError(key)
            self._fs.pipe_file(self._path(key), data)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _call(self, method: Callable[..., Any], *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        return call(self._fs, method, *args, timeout_s=timeout_s, **kwargs)


def open_remote(config: StoreConfig, url: str, prefix: str, env: Mapping[str, str]) -> FsspecBackend:
    """The objects below `prefix` of the configured URL; `url` is how messages name them.

    Raises:
        StoreConfigInvalid: an unknown protocol, a missing package, or a secret that is not in the environment.
    """
    protocol = config.url.rpartition("://")[0]
    options = _options(config, protocol, url, env)
    try:
        fs = fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError) as error:
        raise StoreConfigInvalid(url, f"{first_line(error)}; correct the protocol or install its package") from error
    root = f"{fs._strip_protocol(config.url)}".rstrip("/") + f"/{prefix}"
    return FsspecBackend(fs, root, _errors_of(protocol))


def _options(config: StoreConfig, protocol: str, url: str, env: Mapping[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol not in ("s3", "s3a"):
        return options
    for option, name in (("key", config.key_env), ("secret", config.secret_env)):
        if name is not None:
            if not env.get(name):
                raise StoreConfigInvalid(url, f"environment variable {name} is not set; store.{option}_env names it")
            options[option] = env[name]
    # botocore's own retries multiply with those of s3fs; ours in `Store.create` look before they repeat
    settings: dict[str, Any] = {"retries": {"total_max_attempts": 2}, "connect_timeout": min(10.0, config.timeout_s)}
    if config.endpoint_url is not None:
        options["endpoint_url"] = config.endpoint_url
        settings["s3"] = {"addressing_style": "path"}  # a private server rarely has a name for every bucket
    return {**options, "config_kwargs": settings}


def _errors_of(protocol: str) -> tuple[type[Exception], ...]:
    """What a protocol's library raises beside OSError; imported only where it is used.

    Of a library that we do not know, whatever it raises means that there was no answer.
    """
    if protocol not in ("s3", "s3a"):
        return (OSError,) if protocol == "memory" else (Exception,)
    from aiohttp import ClientError as TransportError
    from botocore.exceptions import BotoCoreError, ClientError

    return (OSError, BotoCoreError, ClientError, TransportError)
