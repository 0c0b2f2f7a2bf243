"""A device over SSH: a real sshd on loopback, the real runner, the real ONNX Runtime."""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from compressor.errors import (
    AuthenticationError,
    ConfigError,
    DeviceBusyError,
    DeviceError,
    DeviceLostError,
    HostKeyError,
    ProtocolError,
    RuntimeMissingError,
    TimeLimitError,
    UnreachableError,
)
from compressor.export import export_onnx
from compressor.latency import host as hosts
from compressor.latency import ssh
from compressor.latency.by_runner import RunnerDevice
from compressor.latency.device import open_device, patiently
from compressor.latency.ssh import Address, SshHost, devices_file, find_device, parse_address
from compressor.latency.targets import load_target
from compressor.latency.timing import Effort
from compressor.values import Target
from tests.conftest import ConvNet
from tests.device.conftest import Board, descendants, needs_sshd

pytestmark = needs_sshd

QUICK = Effort(min_pairs=3, max_pairs=3, budget_s=5, pair_s=0.05)
HOSTILE = ["a b", "$(touch x)", "`touch x`", "; touch x", "'", '"', "\\", "*", "é\n"]


@pytest.fixture
def host(board: Board) -> Iterator[SshHost]:
    opened = SshHost(board.address)
    yield opened
    opened.close()


@pytest.fixture
def exported(conv_net: ConvNet, example: Tensor, tmp_path: Path) -> Path:
    return export_onnx(conv_net, example, tmp_path / "net.onnx")


def target(board: Board) -> Target:
    """As `--device my-board` would give it, without the user's own devices.toml."""
    return replace(load_target("host-cpu"), device="my-board")


@pytest.fixture
def named(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    """A target whose device is called "my-board" in the user's devices.toml."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    devices_file().parent.mkdir(parents=True)
    address = board.address
    devices_file().write_text(
        f'[my-board]\naddress = "ssh://{address.user}@{address.host}:{address.port}"\n'
        f'ssh_config = "{address.ssh_config}"\npython = "{address.python}"\n'
    )
    return replace(load_target("host-cpu"), device="my-board")


def test_every_argument_arrives_as_it_was(host: SshHost) -> None:
    done = host.run(["printf", "%s|", *HOSTILE], limit_s=20)
    assert done.stdout.decode() == "".join(f"{text}|" for text in HOSTILE)
    assert host.run(["sh", "-c", "exit 7"], limit_s=20).code == 7
    assert host.run(["cat"], limit_s=20, stdin=b"\x00\xffbytes").stdout == b"\x00\xffbytes"


def test_an_answer_that_was_cut_off_is_a_lost_device(
    host: SshHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that dies after it told the exit status, before all of the output was sent.

    The moment is too short to be hit, so what ssh then does is imitated: exit status 0, half an
    answer.
    """
    monkeypatch.setattr(host, "_ssh", lambda command: ["printf", "half an ans"])
    with pytest.raises(DeviceLostError, match="cut off"):
        host.run(["cat", "times.json"], limit_s=20)


def test_files_are_uploaded_once_and_whole(host: SshHost, board: Board) -> None:
    content = bytes(range(256)) * 4096
    path = host.put(content, "model.onnx")
    assert path.startswith(str(board.home))
    written = Path(path).stat()
    assert host.get(path) == content
    assert host.put(content, "model.onnx") == path
    assert Path(path).stat().st_ino == written.st_ino  # it was not written again
    assert host.put(content + b".", "model.onnx") != path
    host.remove(path)
    assert not Path(path).exists()
    host.remove(path)


def test_a_long_command_is_ended_there_too(host: SshHost) -> None:
    with pytest.raises(TimeLimitError, match="sleep did not end in 1 s"):
        host.run(["sleep", "4711"], limit_s=1)
    found = subprocess.run(["pgrep", "-f", "sleep 4711"], capture_output=True, check=False)
    assert not found.stdout


def test_a_pair_is_measured_there(named: Target, exported: Path, board: Board) -> None:
    with open_device(named) as device:
        described = device.describe()
        assert described["runtime"] == "onnxruntime"
        assert described["host"] == board.address.label
        pair = device.compare(exported, exported, effort=QUICK)
    assert 0.5 < pair.ratio < 2
    assert len(pair.session_pairs) == 3
    assert [p.name for p in (board.home / ".cache/compressor").iterdir()] != []


def test_two_searches_never_share_a_board(named: Target) -> None:
    with open_device(named) as first, open_device(named) as second:
        first.describe()
        with pytest.raises(DeviceBusyError, match="another search uses this device: process"):
            second.describe()
    with open_device(named) as third:
        third.describe()


def is_runner(pid: int) -> bool:
    """Whether the process is Python with our runner; one that has ended is not."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(word.endswith(b"runner.py") for word in words)


def test_a_lock_outlives_no_process(named: Target, board: Board) -> None:
    """A runner that is killed leaves the lock file, and no lock."""
    with open_device(named) as first:
        assert isinstance(first, RunnerDevice)
        first.describe()
        assert board.server is not None
        runners = [pid for pid in descendants(board.server.pid) if is_runner(pid)]
        assert runners
        for pid in runners:  # this board's alone: other tests have theirs meanwhile
            os.kill(pid, signal.SIGKILL)
        with open_device(named) as second:
            second.describe()


def test_what_killed_runners_left_is_swept(named: Target, exported: Path, board: Board) -> None:
    """Under the lock, so nothing that is in use; uploads by their age."""
    cache = board.home / ".cache" / "compressor"
    with open_device(named) as device:
        device.describe()
        left = cache / "lock.tmp" / "onnx"
        left.mkdir()  # as of a runner that is busy
        with open_device(named) as second, pytest.raises(DeviceBusyError):
            second.describe()
        assert left.is_dir()
        board.power_off()
    board.boot()
    (cache / "work" / "old-model.onnx").write_text("x")
    (cache / "work" / "new-model.onnx").write_text("x")
    (cache / "else").write_text("x")
    for name in ("work/old-model.onnx", "else"):
        os.utime(cache / name, (0, time.time() - 9 * 24 * 3600))
    with open_device(named) as device:
        device.describe()
        assert not left.exists()
        assert left.parent.is_dir()
        names = {each.name for each in (cache / "work").iterdir()}
        assert "new-model.onnx" in names
        assert "old-model.onnx" not in names
        assert (cache / "else").exists()
        assert device.compare(exported, exported, effort=QUICK).original.n > 0


def test_what_is_asked_for_again_is_as_good_as_new(host: SshHost) -> None:
    path = host.put(b"content", "model.onnx")
    os.utime(path, (0, time.time() - 9 * 24 * 3600))
    assert host.put(b"content", "model.onnx") == path
    host.reconnect()
    SshHost(host._address).close()
    assert Path(path).is_file()


@pytest.mark.bad_input("a device that sends without end")
@pytest.mark.parametrize("door", ["connect", "run", "complain", "get"])
def test_endless_answers_are_refused(
    door: str, board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "MAX_ANSWER_BYTES", 2**20)
    with contextlib.closing(SshHost(board.address)) as host:
        (tmp_path / "long").write_bytes(b"x" * (2**20 + 1))
        does: dict[str, Callable[[], object]] = {
            "connect": host.reconnect,
            "run": lambda: host.run(["yes"], limit_s=30),
            "complain": lambda: host.run(["sh", "-c", "yes >&2"], limit_s=30),
            "get": lambda: host.get(str(tmp_path / "long")),
        }
        if door == "connect":
            monkeypatch.setattr(ssh, "FIND_CACHE", "yes")
        with pytest.raises(ProtocolError, match="sent more than 1 MiB"):
            does[door]()


@pytest.mark.fault("sshd goes away in a search and comes back")
def test_a_board_that_reboots_is_waited_for(named: Target, exported: Path, board: Board) -> None:
    waits: list[str] = []

    def power_on_again(_seconds: float) -> None:
        if len(waits) == 2:
            board.boot()

    with open_device(named) as device:
        device.describe()
        threading.Timer(0.3, board.power_off).start()
        long = Effort(min_pairs=4, max_pairs=4, budget_s=60, pair_s=1.0, max_rounds=10**6)
        began = time.monotonic()
        pair = patiently(
            device,
            lambda: device.compare(exported, exported, effort=long if not waits else QUICK),
            on_wait=waits.append,
            sleep=power_on_again,
        )
        assert time.monotonic() - began < 60
    assert len(waits) == 2
    assert pair.original.n > 0


def test_a_board_that_stays_away_ends_the_wait(named: Target, board: Board) -> None:
    slept: list[float] = []
    with open_device(named) as device:
        device.describe()
        board.power_off()
        with pytest.raises(DeviceLostError, match=r"stayed away for 65 s"):
            patiently(
                device, device.describe, on_wait=lambda _: None, patience_s=60, sleep=slept.append
            )
    assert slept == [5.0, 10.0, 20.0, 30.0]


def test_nobody_at_the_other_end(board: Board) -> None:
    board.power_off()
    with pytest.raises(UnreachableError, match="Connection refused"):
        SshHost(board.address)
    with pytest.raises(UnreachableError, match="Is the device on"):
        SshHost(Address("no-such-host.invalid", ssh_config=board.address.ssh_config))


def test_a_key_that_is_not_let_in(board: Board) -> None:
    (board.folder / "authorized_keys").write_text("")
    with pytest.raises(AuthenticationError, match="ssh-copy-id"):
        SshHost(board.address)


@pytest.mark.parametrize("known", ["", "another"])
def test_host_keys_are_checked_whatever_the_configuration_says(board: Board, known: str) -> None:
    if known:
        key = (board.folder / "client_key.pub").read_text().split()[:2]
        known = f"[127.0.0.1]:{board.port} {' '.join(key)}\n"
    board.known_hosts.write_text(known)
    board.write_client_config(StrictHostKeyChecking="no")
    with pytest.raises(HostKeyError, match="accept it once"):
        SshHost(board.address)


def test_a_runtime_that_is_not_there(board: Board, named: Target, tmp_path: Path) -> None:
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec {shutil.which("python3")} -I -S "$@"\n')
    bare.chmod(0o755)
    text = devices_file().read_text().replace(board.address.python, str(bare))
    devices_file().write_text(text)
    with open_device(named) as device, pytest.raises(RuntimeMissingError, match="pip install"):
        device.describe()
    devices_file().write_text(text.replace(str(bare), "no-such-python"))
    with open_device(named) as device, pytest.raises(DeviceError, match="no-such-python"):
        device.describe()


@pytest.mark.bad_input("a device that answers garbage")
@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("echo hello", ProtocolError),
        ("printf '{\"protocol\": 1'", RuntimeMissingError),  # and no more
        ("echo '[1]'", ProtocolError),
        ("echo '{\"protocol\": 99}'", ProtocolError),
        ("echo '{\"error\": 3}'", ProtocolError),
        ("head -c 300000 /dev/zero; echo", ProtocolError),
    ],
)
def test_a_board_that_answers_garbage(
    board: Board, named: Target, tmp_path: Path, line: str, error: type[DeviceError]
) -> None:
    babbler = tmp_path / "babbler"
    babbler.write_text(f"#!/bin/sh\n{line}\n")
    babbler.chmod(0o755)
    devices_file().write_text(
        devices_file().read_text().replace(board.address.python, str(babbler))
    )
    with open_device(named) as device, pytest.raises(error):
        device.describe()


@pytest.mark.bad_input("addresses of devices")
@pytest.mark.parametrize(
    "url",
    [
        "ssh://-oProxyCommand=touch", "ssh://-l", "ssh://a b", "ssh://host;reboot", "ssh://$(id)",
        "ssh://user@-x", "ssh://-u@host", "ssh://host:99999", "ssh://host:0", "ssh://host:x",
        "ssh://", "ssh://@host", "ssh://host/path", "ssh://ho\nst", "http://host", "ssh://`id`",
        "ssh://user:secret@host", "ssh://ho'st",
    ],
)  # fmt: skip
def test_hostile_addresses_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="ssh://"):
        find_device(url)


def test_addresses_are_read() -> None:
    assert parse_address("ssh://nano") == Address("nano")
    assert parse_address("ssh://pi@10.0.0.7:2222/") == Address("10.0.0.7", "pi", 2222)
    assert parse_address("ssh://pi@[fe80::1%eth0]:22") == Address("fe80::1%eth0", "pi", 22)


def test_broken_device_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="Unknown device 'nano'"):
        find_device("nano")
    devices_file().parent.mkdir()
    for text, match in (
        ("[nano", "cannot be read"),
        ("[nano]\n", "needs address"),
        ("nano = 3\n", "needs address"),
        ('[nano]\naddress = "ssh://-x"\n', "got 'ssh://-x'"),
        ('[nano]\naddress = "ssh://x"\nport = 3\n', "port = 3"),
        ('[nano]\naddress = "ssh://x"\npython = 3\n', "python = 3"),
        ('[nanos]\naddress = "ssh://x"\n', "Did you mean 'nanos'"),
    ):
        devices_file().write_text(text)
        with pytest.raises(ConfigError, match=match):
            find_device("nano")


@pytest.mark.fault("Ctrl-C while a device measures")
def test_ctrl_c_during_a_measurement_leaves_a_device_that_works(
    named: Target, exported: Path
) -> None:
    """The answer to the request that was given up is not taken for the next one's."""
    # In a shell's background job, as these tests may be, Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open_device(named) as device:
        device.describe()
        long = Effort(min_pairs=4, max_pairs=4, budget_s=60, pair_s=3.0, max_rounds=10**6)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            device.compare(exported, exported, effort=long)
        time.sleep(0.5)
        assert device.compare(exported, exported, effort=QUICK).original.n > 0
