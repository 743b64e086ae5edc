"""A small web server that shows the report of runs that still go on.

It makes the page anew when a run has written something, and the open page asks for that by itself.
"""

import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from kalmagrove.config import ConfigError, KalmaGroveError
from kalmagrove.track.report.source import version


class Server(ThreadingHTTPServer):
    """Serves `make(version)`, called again when the files of one of `folders` have changed.

    `version` is told before the files are read: a page can be newer than what it says it is, and is
    then made once more, never older.
    """

    daemon_threads = True

    def __init__(
        self, host: str, port: int, folders: Sequence[Path], make: Callable[[str], str]
    ) -> None:
        """Bind; port 0 takes any free one.

        Raises:
            ConfigError: the port is taken, or the host is not of this machine.
        """
        self._folders = list(folders)
        self._make, self._lock = make, threading.Lock()
        self._made: tuple[str, bytes] = "", b""
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                "--serve", f"{host}:{port}", f"cannot be served ({error})", "try --serve 0"
            ) from None

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}/"

    def version(self) -> str:
        """Another one whenever a file that the page is made of has changed."""
        return version(self._folders)

    def page(self) -> bytes:
        with self._lock:  # two readers share one making
            version = self.version()
            if self._made[0] != version:
                self._made = version, self._make(version).encode()
            return self._made[1]


class Handler(BaseHTTPRequestHandler):
    """`/` is the page, `/version` says which it is."""

    server: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        place = self.path.partition("?")[0]
        try:
            if place == "/":
                self._answer(HTTPStatus.OK, self.server.page(), "text/html")
            elif place == "/version":
                self._answer(HTTPStatus.OK, self.server.version().encode(), "text/plain")
            else:
                self._answer(HTTPStatus.NOT_FOUND, b"not found\n", "text/plain")
        except (KalmaGroveError, OSError) as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode(), "text/plain")

    def _answer(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            if status == HTTPStatus.SERVICE_UNAVAILABLE:
                self.send_header("Refresh", "5")  # it may be well again
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
        except ConnectionError:
            self.close_connection = True  # the reader has gone

    def log_message(self, format: str, *args: object) -> None:
        """Readers are not written down."""
