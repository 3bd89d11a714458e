"""A real Prometheus, a real Alertmanager and a webhook that keeps what it gets, on loopback and free ports."""

import json
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import URLError

from ruamel.yaml import YAML

from tests.deploy.tools import DEPLOY, tool
from tests.s3 import free_ports

_WITHIN_S = 60.0


def until(condition: Callable[[], bool], tell: Callable[[], str], within_s: float = _WITHIN_S) -> None:
    """Poll until it is so."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, tell()
        time.sleep(0.1)


class Prometheus:
    """Scrapes one run every second; `instance` is the target's address."""

    def __init__(self, port: int, instance: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.instance = instance

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The vector that an expression gives now."""
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expr})}") as response:
            found: list[dict[str, Any]] = json.load(response)["data"]["result"]
            return found

    def value(self, expr: str) -> float | None:
        """Of the only series, None if there is none."""
        found = self.query(expr)
        return float(found[0]["value"][1]) if found else None

    def firing(self) -> set[str]:
        """Names of alerts."""
        return {one["metric"]["alertname"] for one in self.query('ALERTS{alertstate="firing"}')}


class Webhook:
    """What came, by the path it came to."""

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, Any]]] = []
        got = self.got

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                got.append((self.path, json.loads(body)))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the library's signature
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def pages(self) -> list[tuple[str, set[str]]]:
        """Status and alerts of each notification to the pager."""
        return [
            (body["status"], {alert["labels"]["alertname"] for alert in body["alerts"]})
            for path, body in self.got
            if path == "/page"
        ]

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def started(directory: Path, *command: str, ready: str) -> Iterator[None]:
    """A server that answers at a URL when it is ready."""
    log = directory / f"{Path(command[0]).name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=directory, stdout=output, stderr=output)
    try:
        until(lambda: _answers(ready), log.read_text)
        yield
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except (URLError, ConnectionError):
        return False
    return True


@contextmanager
def prometheus(directory: Path, target: str, alertmanager_url: str | None = None) -> Iterator[Prometheus]:
    """The shipped configuration, every second instead of every fifteen, for one target."""
    program = tool("prometheus")
    directory.mkdir()
    config = YAML(typ="safe", pure=True).load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    config["rule_files"] = [str(DEPLOY / "prometheus" / "longwatch.rules.yml")]
    alertmanagers = [] if alertmanager_url is None else [alertmanager_url.removeprefix("http://")]
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = alertmanagers
    (directory / "prometheus.yml").write_text(json.dumps(config))
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with started(
        directory, program, "--config.file=prometheus.yml", "--storage.tsdb.path=data",
        f"--web.listen-address=127.0.0.1:{port}", ready=f"{url}/-/ready",
    ):  # fmt: skip
        yield Prometheus(port, target)


@contextmanager
def alertmanager(directory: Path, webhook: str) -> Iterator[str]:
    """The shipped routes and inhibitions, hurried, with every receiver a webhook. Yields its URL."""
    program = tool("prometheus-alertmanager")
    directory.mkdir()
    config = YAML(typ="safe", pure=True).load((DEPLOY / "alertmanager" / "alertmanager.yml").read_text())
    for route in (config["route"], *config["route"]["routes"]):
        route |= {"group_wait": "2s", "group_interval": "2s"}
    paths = {"pager": "/page", "chat": "/chat", "dead-man": "/dead-man"}
    config["receivers"] = [
        {"name": one["name"], "webhook_configs": [{"url": webhook + paths[one["name"]], "send_resolved": True}]}
        for one in config["receivers"]
    ]
    (directory / "alertmanager.yml").write_text(json.dumps(config))
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with started(
        directory, program, "--config.file=alertmanager.yml", "--storage.path=data",
        f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=", ready=f"{url}/-/ready",
    ):  # fmt: skip
        yield url
