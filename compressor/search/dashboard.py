"""A study in a browser, by optuna-dashboard, which is optional."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from compressor.errors import ConfigError
from compressor.inputs import check_has_dashboard
from compressor.search.study_file import reading_storage

HOST = "127.0.0.1"  # a study is nobody else's business
HOSTS = (HOST, "localhost", "[::1]")  # what this machine is called in a browser
READING = ("GET", "HEAD")
SILENCE_S = 10.0  # of a client, until it is left
PATIENCE_S = 0.01  # with those that are there, until the oldest is left
MAX_CLIENTS = 32  # at once; a browser opens six connections
HTTP_PORT = 80  # which browsers leave out

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@dataclass(frozen=True)
class Dashboard:
    """A page that waits to be asked for.

    Attributes:
        address: Its URL.
    """

    address: str
    _server: WSGIServer

    def serve(self) -> None:
        """Answers until it is interrupted."""
        self._server.serve_forever()


class _Server(ThreadingMixIn, WSGIServer):
    """Answers each client by itself: one that says nothing keeps nobody waiting.

    Where there are as many as may be, the one that has been there longest is left for a new one.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 4 * MAX_CLIENTS

    def __init__(self, *args: Any) -> None:
        self._clients: dict[socket.socket, None] = {}  # an ordered set
        self._room = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread for it, when there is room."""
        while not self._room.acquire(timeout=PATIENCE_S):
            with contextlib.suppress(OSError, StopIteration, RuntimeError):
                oldest = next(iter(self._clients))
                self._clients.pop(oldest, None)
                oldest.shutdown(socket.SHUT_RDWR)  # what waits for it gets nothing
        self._clients[request] = None
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread can be had
            self._left(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers it."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._left(request)

    def _left(self, request: Any) -> None:
        self._clients.pop(request, None)
        self._room.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are nobody's business either."""


class _Silent(WSGIRequestHandler):
    timeout = SILENCE_S

    def log_message(self, format: str, *args: object) -> None:
        """Requests are nobody's progress."""


def reading_only(app: App, port: int) -> App:
    """`app`, which answers requests to read that were meant for this machine.

    A page of a stranger whose name was made to lead here is asked for by that name ("DNS
    rebinding"), and could else read whatever the study says.

    Args:
        app: Answers.
        port: Where it is asked.
    """
    hosts = {f"{host}:{port}" for host in HOSTS} | (set(HOSTS) if port == HTTP_PORT else set())

    def answer(asked: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if asked.get("HTTP_HOST", "").lower() not in hosts:
            return _refused(start, "421 Misdirected Request", f"Ask for {HOST}:{port}.")
        if asked["REQUEST_METHOD"] not in READING:
            return _refused(start, "405 Method Not Allowed", "Nothing can be changed here.")
        return app(asked, start)

    return answer


def _refused(start: Callable[..., Any], status: str, why: str) -> Iterable[bytes]:
    body = f"{why}\n".encode()
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
    start(status, headers)
    return [body]


@contextmanager
def dashboard_of(study: Path, port: int) -> Iterator[Dashboard]:
    """The study in the file at `study`, which is read anew at every look and never written.

    Args:
        study: SQLite; another process may be writing to it.
        port: Of this machine; 0 for any that is free.

    Raises:
        RunFolderError: There is no study, or it cannot be read.
        ConfigError: The port cannot be had.
        CompressorError: optuna-dashboard is not installed.
    """
    check_has_dashboard()
    from optuna_dashboard import wsgi

    app = wsgi(reading_storage(study, is_live=True))
    try:
        server = make_server(HOST, port, app, _Server, _Silent)
    except (OSError, OverflowError) as err:
        raise ConfigError(f"--port {port}: {err}. Give another one, or 0 for any.") from err
    with server:
        server.set_app(reading_only(app, server.server_port))
        yield Dashboard(f"http://{HOST}:{server.server_port}/dashboard", server)
