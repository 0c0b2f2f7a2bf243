"""A study in a browser, by optuna-dashboard, which is optional."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from compressor.errors import ConfigError
from compressor.inputs import check_has_dashboard
from compressor.search.study import reading_storage

HOST = "127.0.0.1"  # a study is nobody else's business


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


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Requests are nobody's progress."""


@contextmanager
def dashboard_of(study: Path, port: int) -> Iterator[Dashboard]:
    """The study in the file at `study`, opened for reading only.

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

    try:
        server = make_server(HOST, port, wsgi(reading_storage(study)), handler_class=_Silent)
    except (OSError, OverflowError) as err:
        raise ConfigError(f"--port {port}: {err}. Give another one, or 0 for any.") from err
    with server:
        yield Dashboard(f"http://{HOST}:{server.server_port}/dashboard", server)
