"""A real sshd on loopback: its own keys, its own port, its own configuration."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from compressor.latency.ssh import Address

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"

needs_sshd = pytest.mark.skipif(
    not (Path(SSHD).is_file() and shutil.which("ssh")),
    reason="no sshd: apt-get install openssh-server",
)


@dataclass
class Board:
    """A machine over SSH that is this one.

    Attributes:
        address: As the user would name it.
        home: What it takes for its home; the cache lies in it.
        known_hosts: What the client checks the host key with.
    """

    folder: Path
    port: int
    address: Address
    home: Path
    known_hosts: Path
    server: "subprocess.Popen[bytes] | None" = None

    def boot(self) -> None:
        """Starts sshd and waits until it answers."""
        with (self.folder / "sshd.log").open("ab") as log:
            self.server = subprocess.Popen(
                [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")],
                stdin=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError((self.folder / "sshd.log").read_text())

    def power_off(self) -> None:
        """Kills sshd and every process of its sessions, as a power cut does."""
        server, self.server = self.server, None  # another thread may boot it meanwhile
        assert server is not None
        for pid in (server.pid, *descendants(server.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.wait()

    def write_client_config(self, **options: str) -> None:
        """What ssh reads in place of the user's own configuration."""
        settings = {
            "IdentityFile": str(self.folder / "client_key"),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": str(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            **options,
        }
        lines = ["Host *", *(f"  {key} {value}" for key, value in settings.items())]
        (self.folder / "ssh_config").write_text("\n".join(lines) + "\n")


def descendants(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            child = int(path.parent.name)
            found += [child, *descendants(child)]
    return found


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    for name in ("host_key", "client_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)],
            check=True,
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "authorized_keys").write_text((tmp_path / "client_key.pub").read_text())
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host_key\nPidFile none\n"
        f"AuthorizedKeysFile {tmp_path}/authorized_keys\nStrictModes no\nUsePAM no\n"
        f"PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        # A login shell of bash reads .bashrc under sshd unless it seems to be an inner one.
        f"SetEnv XDG_CACHE_HOME={home}/.cache PATH={os.environ['PATH']} SHLVL=2\n"
    )
    known_hosts = tmp_path / "known_hosts"
    key = (tmp_path / "host_key.pub").read_text().split()[:2]
    known_hosts.write_text(f"[127.0.0.1]:{port} {' '.join(key)}\n")
    address = Address(
        "127.0.0.1", getpass.getuser(), port, tmp_path / "ssh_config", sys.executable
    )
    made = Board(tmp_path, port, address, home, known_hosts)
    made.write_client_config()
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd separates its privileges
    made.boot()
    yield made
    if made.server is not None:
        made.power_off()
