"""A runner whose answers are none, or too many; and one that is stopped for a while."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.errors import DeviceError, MeasurementError, ProtocolError
from compressor.export import export_onnx
from compressor.latency import process, runner
from compressor.latency.by_runner import RunnerDevice
from compressor.latency.host import LocalHost
from compressor.latency.process import Runner
from compressor.latency.targets import load_target
from compressor.latency.timing import Effort
from compressor.values import PairedLatency

ROOT = Path(__file__).parents[2]
QUICK = Effort(min_pairs=3, max_pairs=3, budget_s=5, pair_s=0.05)
HELLO = {"protocol": runner.PROTOCOL, "version": "1", "machine": "m", "model": "x"}
ANSWERS = {"hello": json.dumps(HELLO), "state": "{}", "pair": '{"original_ms": [2.0, 2.0]}'}
RUNNER = """
import json, sys
answers = json.load(open(sys.argv[1]))
print(answers["hello"], flush=True)
for line in sys.stdin:
    print(answers[json.loads(line)["do"]], flush=True)
"""
HUGE = "1" + "0" * 400


class Strange(LocalHost):
    """This machine, where another program stands for the runner."""

    command: tuple[str, ...] = ()

    def python(self) -> tuple[str, ...]:
        return (sys.executable, *self.command)


def device_that_says(folder: Path, **answers: str) -> RunnerDevice:
    (folder / "runner.py").write_text(RUNNER)
    (folder / "answers.json").write_text(json.dumps(ANSWERS | answers))
    host = Strange()
    host.command = (str(folder / "runner.py"), str(folder / "answers.json"))
    return RunnerDevice(host, load_target("host-cpu"))


def pair_of(**more: object) -> str:
    times = [2.0, 2.0, 2.0]
    whole: dict[str, object] = {
        "original_ms": times, "candidate_ms": times, "original_cpu_ms": times,
        "candidate_cpu_ms": times, "original_interruptions": [0, 0, 0],
        "candidate_interruptions": [0, 0, 0],
    }  # fmt: skip
    return json.dumps(whole | more)


@pytest.mark.bad_input("a runner's answers of another form")
@pytest.mark.parametrize(
    "answers",
    [
        {"hello": "[]"}, {"hello": "null"}, {"hello": '{"protocol": []}'},
        {"hello": '{"error": {}}'}, {"hello": '{"error": {"kind": [], "message": "x"}}'},
        {"hello": '{"error": false}'}, {"hello": '{"error": "text"}'},
        {"state": '{"clocks": [1]}'}, {"state": '{"clocks": {"cpu": "fast"}}'},
        {"state": f'{{"stolen_ticks": {HUGE}}}'}, {"state": '{"busy_ticks": null}'},
        {"pair": "{}"}, {"pair": '{"original_ms": NaN}'}, {"pair": pair_of(original_ms="x")},
        {"pair": pair_of().replace("2.0", HUGE)}, {"pair": pair_of().replace("2.0", "NaN")},
        {"pair": pair_of().replace("2.0", "1e999")}, {"pair": pair_of().replace("2.0", "-0.0")},
        {"pair": pair_of(original_interruptions=["a"])}, {"pair": "[" * 100_000},
        {"pair": '{"error": {"kind": "out-of-memory", "message": 7}}'},
    ],
    ids=lambda answers: str(answers)[:60],
)  # fmt: skip
def test_an_answer_of_another_form_is_the_devices_fault(
    answers: dict[str, str], tmp_path: Path, conv_onnx: Path
) -> None:
    device = device_that_says(tmp_path, **answers)
    try:
        with pytest.raises((DeviceError, MeasurementError)):
            device.compare(conv_onnx, conv_onnx, effort=QUICK)
    finally:
        device.close()


def test_the_imitation_is_believed_where_its_answers_are_right(
    tmp_path: Path, conv_onnx: Path
) -> None:
    """Or the test above would show nothing."""
    device = device_that_says(tmp_path, pair=pair_of())
    try:
        assert device.compare(conv_onnx, conv_onnx, effort=QUICK).ratio == 1.0
    finally:
        device.close()


@pytest.fixture(scope="module")
def conv_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    return export_onnx(nn.Conv2d(3, 4, 3).eval(), torch.zeros(1, 3, 8, 8), path)


@pytest.mark.bad_input("a runner that never ends its line, or its lines")
@pytest.mark.parametrize(
    ("says", "match"),
    [
        ("while True: os.write(1, b'x' * 2**20)", "a line of more than 16 MiB"),
        ("while True: os.write(1, b'{}\\n' * 2**16)", "speaks protocol None"),
        (
            f"os.write(1, {json.dumps(HELLO)!r}.encode() + b'\\n')\n"
            "while True: os.write(1, b'{}\\n' * 2**16)",
            "nothing was asked",
        ),
    ],
)
def test_endless_answers_are_refused_and_take_no_memory(says: str, match: str) -> None:
    host = LocalHost()
    made = Runner(
        lambda log: host.start([sys.executable, "-c", f"import os\n{says}"], log=log), "x"
    )

    def ask() -> None:
        made.begin()
        time.sleep(0.5)
        made.ask({"do": "state"}, limit_s=10)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with pytest.raises(ProtocolError, match=match):
            ask()
    finally:
        made.close()
        host.close()
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 6 * process.MAX_LINE_BYTES / 2**20
    for _ in range(50):  # no thread is left that waits for room
        if not any(t.name.endswith("(_pump)") for t in threading.enumerate()):
            return
        time.sleep(0.1)
    raise AssertionError("a reader lives on")


def measured(
    models: tuple[Path, Path], meanwhile: Callable[[int], None] = lambda _pid: None
) -> PairedLatency:
    """While `meanwhile` does something to the process that measures."""
    device = RunnerDevice(LocalHost(), load_target("host-cpu"))
    try:
        device.describe()
        running = device._runner._process
        assert running is not None
        beside = threading.Thread(target=meanwhile, args=(running.pid,))
        beside.start()
        effort = Effort(min_pairs=8, max_pairs=8, budget_s=4, pair_s=0.2)
        pair = device.compare(*models, effort=effort)
        beside.join()
        return pair
    finally:
        device.close()


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    example = torch.randn(1, 16, 48, 48)
    nets = [nn.Sequential(*[nn.Conv2d(16, 16, 3) for _ in range(n)]) for n in (4, 2)]
    first, second = (export_onnx(net.eval(), example, folder / f"{len(net)}.onnx") for net in nets)
    return first, second


def stop_and_go(pid: int) -> None:
    """Stops the process for 0.2 s, ten times."""
    for _ in range(10):
        with contextlib.suppress(ProcessLookupError):
            time.sleep(0.05)
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.2)
            os.kill(pid, signal.SIGCONT)


@pytest.mark.slow  # 8 s
@pytest.mark.fault("measuring process stopped and continued", n=10)
def test_a_process_that_is_stopped_for_a_while_measures_the_same(
    two_models: tuple[Path, Path],
) -> None:
    quiet, stopped = measured(two_models), measured(two_models, stop_and_go)
    assert stopped.ratio == pytest.approx(quiet.ratio, rel=0.15)
    assert stopped.original.median_ms == pytest.approx(quiet.original.median_ms, rel=0.3)
    longest = max(ms for pair in stopped.session_pairs for ms in pair.original_ms)
    assert max(longest, *(max(p.candidate_ms) for p in stopped.session_pairs)) > 100  # it was


@pytest.mark.slow  # 8 s
@pytest.mark.fault("system clock set back while measuring")
@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs faketime")
def test_a_clock_that_is_set_back_harms_no_figure(
    two_models: tuple[Path, Path], tmp_path: Path
) -> None:
    """The wall's clock runs an hour back in the middle; monotonic clocks are left alone."""
    times = tmp_path / "offset"
    times.write_text("+0s")
    environment = {"FAKETIME_TIMESTAMP_FILE": str(times), "FAKETIME_NO_CACHE": "1"}
    before = subprocess.run(
        ["faketime", "-f", "+0s", "env"], capture_output=True, text=True, check=True
    ).stdout
    library = next(line for line in before.splitlines() if line.startswith("LD_PRELOAD="))
    environment |= {
        "LD_PRELOAD": library.partition("=")[2], "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    host = Strange()
    names = [f"{name}={value}" for name, value in environment.items()]
    shim = tmp_path / "python"
    shim.write_text(f'#!/bin/sh\nexec env {" ".join(names)} {sys.executable} "$@"\n')
    shim.chmod(0o755)
    host.python = lambda: (str(shim),)  # type: ignore[method-assign]
    device = RunnerDevice(host, load_target("host-cpu"))
    try:
        device.describe()
        timer = threading.Timer(0.6, lambda: times.write_text("-3600s"))
        timer.start()
        effort = Effort(min_pairs=8, max_pairs=8, budget_s=4, pair_s=0.2)
        moved = device.compare(*two_models, effort=effort)
        timer.join()
    finally:
        device.close()
    assert moved.ratio == pytest.approx(measured(two_models).ratio, rel=0.15)
    assert all(ms > 0 for pair in moved.session_pairs for ms in pair.original_ms)


@pytest.fixture(autouse=True)
def _in_the_sources() -> Iterator[None]:
    """Where the runner's module is found."""
    with contextlib.chdir(ROOT):
        yield
