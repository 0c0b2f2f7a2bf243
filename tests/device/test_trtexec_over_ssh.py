"""trtexec on another machine: a real sshd and real commands, TensorRT's program imitated."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from compressor.errors import (
    DeviceBusyError,
    DeviceLostError,
    MeasurementError,
    OutOfMemoryError,
    RuntimeCrashError,
    RuntimeMissingError,
    TimeLimitError,
    UnsupportedModelError,
)
from compressor.latency.device import open_device, patiently
from compressor.latency.ssh import devices_file
from compressor.latency.targets import load_target
from compressor.latency.timing import Effort
from compressor.values import Basis, Target
from tests.device.conftest import Board, descendants, needs_sshd
from tests.device.imitation_trtexec import install

pytestmark = needs_sshd

PROFILES = {"8.2": "jetson-nano", "10": "jetson-orin-nano"}
NUMBERS = {"8.2": "8.2.1", "10": "10.3.0"}
QUICK = Effort(min_pairs=3, max_pairs=3, budget_s=60)
LEAST = Effort(min_pairs=2, max_pairs=2, budget_s=0)  # late after two pairs
ENDLESS = Effort(min_pairs=3, max_pairs=400, budget_s=60, half_width=1e-9)

Make = Callable[..., Target]


def model(n_bytes: int, marker: str = "") -> bytes:
    """As large as asked, which is all that the imitation's times depend on."""
    node = helper.make_node("Relu", ["input"], ["output"])
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3]) for n in node.input]
    made = helper.make_model(helper.make_graph([node], "g", ends, []))
    made.doc_string = f"imitate:{marker} ".ljust(n_bytes, ".")
    made.doc_string = made.doc_string[: 2 * n_bytes - made.ByteSize()]
    content: bytes = made.SerializeToString()
    assert len(content) == n_bytes
    return content


@pytest.fixture
def make_target(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A shipped profile whose device is the board, which has the imitation at a version."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    devices_file().parent.mkdir(parents=True)
    address = board.address
    devices_file().write_text(
        f'[my-board]\naddress = "ssh://{address.user}@{address.host}:{address.port}"\n'
        f'ssh_config = "{address.ssh_config}"\n'
    )

    def make(version: str = "8.2", **changes: Any) -> Target:
        program = install(tmp_path, version, f"trtexec-{version}")
        settings: dict[str, Any] = {
            "trtexec": ("/nowhere/trtexec", program), "build_limit_s": 20.0, "run_limit_s": 20.0,
        }  # fmt: skip
        shipped = load_target(PROFILES[version], device="my-board")
        return replace(shipped, **(settings | changes))

    return make


def cache(board: Board) -> Path:
    return board.home / ".cache/compressor"


def n_built(board: Board) -> int:
    """Engines that the imitation has built there: each adds a line to its timing cache."""
    return sum(len(path.read_text().splitlines()) for path in cache(board).glob("timing-*"))


def left_running(board: Board) -> list[str]:
    """Commands on the board that name a file in its cache."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if f"Engine={cache(board)}" in command:
            found.append(command)
    return found


@pytest.mark.parametrize("version", PROFILES)
def test_a_pair_is_measured_there(make_target: Make, board: Board, version: str) -> None:
    with open_device(make_target(version)) as device:
        described = device.describe()
        pair = device.compare(model(16000), model(8000), effort=QUICK)

    assert described["runtime"] == "trtexec"
    assert described["version"] == NUMBERS[version]
    assert described["host"] == board.address.label
    assert described["precision"] == "fp16"
    assert "its model is 'x86_64" in described["unlike_profile"]
    assert pair.ratio == pytest.approx(2.0, rel=0.03)
    assert pair.ci95[0] > 1
    assert pair.original.median_ms == pytest.approx(8.0, rel=0.03)  # half of it is FP16's
    assert pair.basis is Basis.MEASURED
    assert len(pair.session_pairs) == 3
    assert not any(each.interleaved for each in pair.session_pairs)


def test_engines_are_kept_from_one_search_to_the_next(make_target: Make, board: Board) -> None:
    for _ in range(2):
        with open_device(make_target()) as device:
            device.compare(model(16000), model(8000), effort=LEAST)
    assert n_built(board) == 2
    assert len(list((cache(board) / "engines").glob("*.plan"))) == 2
    assert not list(cache(board).glob("times-*"))
    assert not list((cache(board) / "work").iterdir())  # the ONNX files, once built


def test_two_searches_never_share_a_board(make_target: Make, board: Board) -> None:
    target = make_target()
    with open_device(target) as first:
        with pytest.raises(DeviceBusyError, match="Another search uses"), open_device(target):
            pass
        assert first.describe()["runtime"] == "trtexec"
    with open_device(target):
        pass


def test_nor_with_a_search_of_another_runtime(make_target: Make, board: Board) -> None:
    with devices_file().open("a") as file:
        file.write(f'python = "{board.address.python}"\n')
    by_runner = replace(load_target("host-cpu"), device="my-board")
    with open_device(by_runner) as first:
        first.describe()
        with pytest.raises(DeviceBusyError), open_device(make_target()):
            pass
    with open_device(make_target()), open_device(by_runner) as second:  # noqa: SIM117
        with pytest.raises(DeviceBusyError):
            second.describe()


@pytest.mark.parametrize("version", PROFILES)
def test_a_refused_node_is_quoted(make_target: Make, version: str) -> None:
    with (
        open_device(make_target(version)) as device,
        pytest.raises(UnsupportedModelError, match=r'node number 12 \[Gelu -> "x"\].*Plugin not'),
    ):
        device.compare(model(4000, "unsupported"), model(4000), effort=QUICK)


@pytest.mark.parametrize(
    ("marker", "error", "words"),
    [
        ("oom", OutOfMemoryError, "killed"),
        ("cuda-oom", OutOfMemoryError, "out of memory"),
        ("segfault", RuntimeCrashError, "SIGSEGV"),
        ("half-json", MeasurementError, "cut off"),
    ],
)
def test_what_a_model_does_is_not_the_connection_s_fault(
    make_target: Make, board: Board, marker: str, error: type[MeasurementError], words: str
) -> None:
    """A process that a signal ends makes ssh say 255, as a lost connection does."""
    with open_device(make_target()) as device:
        with pytest.raises(error, match=words):
            device.compare(model(4000, marker), model(4000, marker), effort=QUICK)
        assert device.describe()["version"] == "8.2.1"
    assert not list((cache(board) / "engines").glob("*.part"))
    assert not list(cache(board).glob("times-*"))


def test_a_hang_ends_at_its_limit_and_there_too(make_target: Make, board: Board) -> None:
    with open_device(make_target(build_limit_s=1.0, run_limit_s=6.0)) as device:
        with pytest.raises(TimeLimitError, match=r"1 s.*--saveEngine.*build_s"):
            device.compare(model(4000, "build-hang"), model(4000), effort=QUICK)
        assert not left_running(board)
        with pytest.raises(TimeLimitError, match=r"3 s.*--loadEngine.*run_s"):
            device.compare(model(8000, "run-hang"), model(4000, "run-hang"), effort=QUICK)
        assert not left_running(board)
        assert device.compare(model(8000), model(4000), effort=LEAST).ratio > 1


def test_so_does_one_that_will_not_be_ended_gently(
    make_target: Make, board: Board, tmp_path: Path
) -> None:
    """timeout(1) then kills itself too, and that is no lost connection either."""
    real, stubborn = install(tmp_path, "8.2"), tmp_path / "stubborn"
    stubborn.write_text(
        f"#!/bin/sh\n[ \"$1\" = --help ] && exec '{real}' --help\n"
        "trap '' TERM; while :; do sleep 1; done\n"
    )
    stubborn.chmod(0o755)
    target = make_target(trtexec=(str(stubborn),), build_limit_s=1.0)
    with open_device(target) as device, pytest.raises(TimeLimitError, match="build_s"):
        device.compare(model(8000), model(4000), effort=QUICK)
    assert not left_running(board)


def test_no_trtexec_there(make_target: Make, board: Board) -> None:
    with (
        pytest.raises(RuntimeMissingError, match=r"No trtexec on .*/nowhere/trtexec") as caught,
        open_device(make_target(trtexec=("/nowhere/trtexec", "no-such-trtexec"))),
    ):
        pass
    assert board.address.label in str(caught.value)
    assert "no-such-trtexec" in str(caught.value)
    with open_device(make_target()):  # the lock of the one that failed is free
        pass


def test_a_board_that_reboots_is_waited_for(make_target: Make, board: Board) -> None:
    waits: list[str] = []
    target = make_target()

    def power_on_again(_seconds: float) -> None:
        if len(waits) == 2:
            board.boot()

    with open_device(target) as device:
        device.describe()
        threading.Timer(1.5, board.power_off).start()
        pair = patiently(
            device,
            lambda: device.compare(
                model(16000), model(8000), effort=LEAST if len(waits) > 1 else ENDLESS
            ),
            on_wait=waits.append,
            sleep=power_on_again,
        )
        assert len(waits) == 2
        assert pair.ratio == pytest.approx(2.0, rel=0.03)
        with pytest.raises(DeviceBusyError), open_device(target):  # it is locked again
            pass


def test_without_the_lock_nothing_is_measured(make_target: Make, board: Board) -> None:
    """The connection broke between two commands, and the next one opened another without it."""
    with open_device(make_target()) as device:
        device.describe()
        cut(board)
        with pytest.raises(DeviceLostError, match=r"lock|connection"):
            device.compare(model(16000), model(8000), effort=LEAST)


def cut(board: Board) -> None:
    """Breaks every connection; the server goes on."""
    assert board.server is not None
    for pid in descendants(board.server.pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended by itself
            if Path(f"/proc/{pid}/comm").read_text().startswith("sshd"):
                os.kill(pid, signal.SIGKILL)


def test_a_connection_that_breaks_is_opened_again(make_target: Make, board: Board) -> None:
    """The board stays on, and with it, for a moment, the lock of the broken connection."""
    waits: list[str] = []

    with open_device(make_target()) as device:
        device.describe()
        threading.Timer(1.5, cut, [board]).start()
        pair = patiently(
            device,
            lambda: device.compare(model(16000), model(8000), effort=LEAST if waits else ENDLESS),
            on_wait=waits.append,
            sleep=lambda _: None,
        )
    assert waits
    assert pair.ratio > 1
