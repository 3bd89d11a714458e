"""The Prometheus endpoint: /metrics of one run, /healthz and /readyz, on loopback unless told otherwise."""

import threading
import time
from collections import deque
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from monitors.health import Check, checks_of
from monitors.metrics import Metrics

_READ_TIMEOUT_S = 10.0
_LINGERS_S = 120.0  # two scrape intervals of the slowest who still wants alerts
_LATE_S = 1.0


class _Scrapes:
    """When the metrics were asked for, by CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self.count = 0
        self.again = threading.Condition()
        self._last: deque[float] = deque(maxlen=2)

    def note(self) -> None:
        """Once more."""
        with self.again:
            self.count += 1
            self._last.append(time.monotonic())
            self.again.notify_all()

    def next_within_s(self) -> float:
        """How long the next one may take to come, by the last two; 0 if nobody asks regularly, or not any more."""
        if len(self._last) < 2:
            return 0.0
        earlier_s, last_s = self._last
        return max(0.0, last_s + 2 * (last_s - earlier_s) + _LATE_S - time.monotonic())


class ExporterError(Exception):
    """The endpoint can't be served."""

    def __init__(self, host: str, port: int, why: str) -> None:
        self.host = host
        self.port = port
        super().__init__(
            f"metrics can't be served on {host}:{port}: {why}; set metrics.port to another port, to 0 for a free one, "
            "or to null for none"
        )


class Exporter:
    """Serves until `close`. `port` is the one that was really taken."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Listen at once.

        Raises:
            ExporterError: the port is in use, or the address is not ours.
        """
        self._scrapes = _Scrapes()
        served = {"registry": metrics.registry, "checks": checks_of(metrics), "scrapes": self._scrapes}
        handler = type("_BoundHandler", (_Handler,), served)
        try:
            self._server = _Server((host, port), handler)
        except OSError as error:
            raise ExporterError(host, port, error.strerror or str(error)) from error
        self.host = host
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where Prometheus finds it."""
        return f"http://{self.host}:{self.port}/metrics"

    @property
    def scrapes(self) -> int:
        """How often the metrics were asked for."""
        return self._scrapes.count

    def linger(self, most_s: float = _LINGERS_S) -> None:
        """Wait until somebody who asks for the metrics regularly has done so once more, and seen the last state."""
        with self._scrapes.again:
            before, within_s = self._scrapes.count, min(most_s, self._scrapes.next_within_s())
            self._scrapes.again.wait_for(lambda: self._scrapes.count > before, within_s)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True  # a supervisor that restarts takes its port again


class _Handler(BaseHTTPRequestHandler):
    registry: CollectorRegistry
    checks: Mapping[str, Check]
    scrapes: _Scrapes
    timeout = _READ_TIMEOUT_S
    server_version = "longwatch"
    sys_version = ""

    def do_GET(self) -> None:
        """Serve the metrics and the checks; everything else does not exist."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, CONTENT_TYPE_LATEST, generate_latest(self.registry))
            self.scrapes.note()
        elif path in self.checks:
            wrong = self.checks[path](time.time())
            self._answer(503 if wrong else 200, "text/plain; charset=utf-8", f"{wrong or 'ok'}\n".encode())
        else:
            self.send_error(404)

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the standard library's signature
        """Scrapes are not worth a line."""
