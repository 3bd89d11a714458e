"""The Prometheus endpoint: /metrics of one registry, on loopback unless told otherwise, and nothing else."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

_READ_TIMEOUT_S = 10.0


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

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Listen at once.

        Raises:
            ExporterError: the port is in use, or the address is not ours.
        """
        handler = type("_BoundHandler", (_Handler,), {"registry": registry})
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
    timeout = _READ_TIMEOUT_S
    server_version = "longwatch"
    sys_version = ""

    def do_GET(self) -> None:
        """Serve /metrics; everything else does not exist."""
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        body = generate_latest(self.registry)
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE_LATEST)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the standard library's signature
        """Scrapes are not worth a line."""
