"""The dashboard answers this machine only, by its own name, and lets nobody wait."""

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from compressor.search import dashboard
from compressor.search.study import Study
from compressor.values import Trial
from tests.unit.test_space import space_of

SPACE = space_of([64], step=16)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study.create(tmp_path / "study.db", SPACE)


@pytest.fixture
def port(study: Study, tmp_path: Path) -> Iterator[int]:
    """Where a dashboard answers."""
    with dashboard.dashboard_of(tmp_path / "study.db", 0) as server:
        serving = threading.Thread(target=server.serve, daemon=True)
        serving.start()
        yield server._server.server_port
        server._server.shutdown()
        serving.join()


def asked(port: int, path: str, host: str | None, method: str = "GET") -> tuple[int, bytes]:
    """Status and body."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
        client.putrequest(method, path, skip_host=True)
        if host is not None:
            client.putheader("Host", host)
        client.endheaders()
        reply = client.getresponse()
        return reply.status, reply.read()


@pytest.mark.bad_input("requests under the name of another machine")
def test_it_answers_to_its_own_name_only(port: int) -> None:
    for host in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]"):
        assert asked(port, "/api/studies", f"{host}:{port}")[0] == 200
    strangers = (
        f"evil.example:{port}", "evil.example", "127.0.0.1", f"localhost:{port + 1}", "", None,
        f"127.0.0.1:{port}.evil.example", f"localhost.:{port}",
    )  # fmt: skip
    for stranger in strangers:
        status, body = asked(port, "/api/studies", stranger)
        assert (status, b"compress" in body) == (421, False)


def test_nothing_can_be_changed(port: int, tmp_path: Path) -> None:
    before = (tmp_path / "study.db").read_bytes()
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert asked(port, "/api/studies/1", f"localhost:{port}", method)[0] == 405
    assert (tmp_path / "study.db").read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["study.db"]


@pytest.mark.bad_input("clients that say nothing")
def test_silent_clients_keep_nobody_waiting(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard._Silent, "timeout", 2.0)
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            for _ in range(20)
        ]
        silent[0].sendall(b"GET /api/stu")
        began = time.monotonic()
        assert asked(port, "/api/studies", f"localhost:{port}")[0] == 200
        assert time.monotonic() - began < 30
        assert silent[1].recv(1) == b""  # it is left


@pytest.mark.bad_input("clients that say nothing", n=300)
def test_hundreds_of_silent_clients_are_not_kept(port: int) -> None:
    """Nor those that ask and never read; a good client among them is answered."""
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        for number in range(300):
            client = socket.create_connection(("127.0.0.1", port), timeout=60)
            stack.enter_context(client)
            if number % 3 == 0:
                client.sendall(b"GET /api/studies HTTP/1.0\r\nHost: localhost\r\nX: ")
            if number % 50 == 49:
                began = time.monotonic()
                assert asked(port, "/api/studies", f"localhost:{port}")[0] == 200
                assert time.monotonic() - began < 20
                assert threading.active_count() - before <= dashboard.MAX_CLIENTS
    until = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.1)
    assert threading.active_count() == before


@pytest.mark.slow
def test_it_shows_trials_as_they_come(port: int, study: Study) -> None:
    def shown() -> bytes:
        return asked(port, "/api/studies/1", f"localhost:{port}")[1]

    assert b"it crashed" not in shown()
    study.add(Trial(0, {SPACE.names[0]: 16}, "start", failed_because="it crashed"), None)
    until = time.monotonic() + 60  # optuna-dashboard itself looks every 10 seconds
    while b"it crashed" not in shown():
        assert time.monotonic() < until
        time.sleep(0.5)
