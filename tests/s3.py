"""S3 servers for tests, on loopback and free ports: SeaweedFS (real) and moto (fast, forgiving)."""

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from time import monotonic

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from trainer.contract.config import StoreConfig

ACCESS_KEY = "AKTEST"
SECRET_KEY = "SKTEST-canary-5d1f"
KEY_ENV = "LONGWATCH_TEST_S3_KEY"
SECRET_ENV = "LONGWATCH_TEST_S3_SECRET"
BUCKET = "checkpoints"
_READY_S = 60.0


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running server with one empty bucket. The secrets are in the environment under `KEY_ENV`, `SECRET_ENV`."""

    endpoint_url: str
    bucket: str
    pid: int | None

    def config(self, timeout_s: float = 30.0, prefix: str = "") -> StoreConfig:
        """The `store:` section of a run that uses this server."""
        url = f"s3://{self.bucket}" + (f"/{prefix}" if prefix else "")
        return StoreConfig(
            url=url, endpoint_url=self.endpoint_url, key_env=KEY_ENV, secret_env=SECRET_ENV, timeout_s=timeout_s
        )


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nothing listens on, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


class Weed:
    """A SeaweedFS server (one process: master, volume, filer, S3) with its data below `directory`.

    `more_keys`: further access keys with their secrets, beside `ACCESS_KEY`. It can be killed and started again on the
    same ports with the same data.
    """

    def __init__(self, directory: Path, more_keys: Mapping[str, str] | None = None) -> None:
        self._directory = directory
        data = directory / "data"
        data.mkdir(parents=True)
        keys = {ACCESS_KEY: SECRET_KEY, **(more_keys or {})}
        identity = {
            "name": "checkpoints",
            "credentials": [{"accessKey": access, "secretKey": secret} for access, secret in keys.items()],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config = directory / "s3.json"
        config.write_text(json.dumps({"identities": [identity]}))
        names = ("master", "master", "volume", "volume", "filer", "filer", "s3", "s3")
        ports = free_ports(len(names))
        flags = [f"-{n}.port{'.grpc' if i % 2 else ''}={p}" for i, (n, p) in enumerate(zip(names, ports, strict=True))]
        self._command = [
            str(Path(sys.executable).with_name("weed")), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-dir={data}", "-master.volumeSizeLimitMB=64", "-volume.max=50", "-filer", "-s3", f"-s3.config={config}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", *flags,
        ]  # fmt: skip
        self.endpoint_url = f"http://127.0.0.1:{ports[6]}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        with (self._directory / "weed.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, cwd=self._directory, start_new_session=True
            )
        _await_ready(self.endpoint_url, self.process, self._directory / "weed.log")

    def kill(self) -> None:
        """End it: asked politely it takes 10 s, and what it has acknowledged is in its files."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None


@contextmanager
def seaweedfs(directory: Path, more_keys: Mapping[str, str] | None = None) -> Iterator[S3Server]:
    """A `Weed` that runs while the block does, with one empty bucket."""
    weed = Weed(directory, more_keys)
    try:
        weed.start()
        assert weed.process is not None
        yield with_bucket(weed.endpoint_url, weed.process.pid)
    finally:
        weed.kill()


@contextmanager
def moto() -> Iterator[S3Server]:
    """A moto server in a thread of this process. It accepts any secret and wrong checksums."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        yield with_bucket(f"http://127.0.0.1:{port}", None)
    finally:
        server.stop()


def client(endpoint_url: str):  # type: ignore[no-untyped-def]  # boto3 makes its clients at run time
    """A boto3 client, for what a test does behind the store's back."""
    settings = Config(s3={"addressing_style": "path"}, connect_timeout=3, read_timeout=10, retries={"max_attempts": 2})
    return boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=settings,
    )


def with_bucket(endpoint_url: str, pid: int | None) -> S3Server:
    """Make the bucket, and wait until it takes writes."""
    os.environ[KEY_ENV], os.environ[SECRET_ENV] = ACCESS_KEY, SECRET_KEY
    deadline = monotonic() + _READY_S
    with closing(client(endpoint_url)) as s3:
        while True:  # the gateway answers before its filer takes writes
            try:
                s3.create_bucket(Bucket=BUCKET)
                s3.put_object(Bucket=BUCKET, Key="ready", Body=b"1")
                s3.delete_object(Bucket=BUCKET, Key="ready")
                return S3Server(endpoint_url, BUCKET, pid)
            except (ClientError, BotoCoreError):
                if monotonic() > deadline:
                    raise
                Event().wait(0.1)


def _await_ready(endpoint_url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = monotonic() + _READY_S
    while monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"weed ended with {process.returncode}: {log.read_text()[-2000:]}")
        try:
            urllib.request.urlopen(endpoint_url, timeout=2).close()
        except urllib.error.HTTPError as error:
            error.close()
            return  # 403: it is up and wants credentials
        except OSError:
            Event().wait(0.1)
        else:
            return
    raise TimeoutError(f"weed did not answer at {endpoint_url} within {_READY_S:g} s: {log.read_text()[-2000:]}")
