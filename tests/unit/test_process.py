"""A runner as a child process: what it measures, and what becomes of its host when it dies."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from compressor.errors import (
    CompressorError,
    DeviceBusyError,
    MeasurementError,
    OutOfMemoryError,
    ProtocolError,
    RuntimeCrashError,
    RuntimeMissingError,
    TimeLimitError,
    UnreachableError,
    UnstableClockError,
    UnsupportedModelError,
)
from compressor.export import export_onnx
from compressor.latency import runner as runner_module
from compressor.latency.by_runner import RunnerDevice
from compressor.latency.device import compare_latency, open_device
from compressor.latency.host import LocalHost
from compressor.latency.process import Runner
from compressor.latency.targets import load_target
from compressor.latency.timing import Effort
from compressor.values import Target
from tests.conftest import ConvNet

QUICK = Effort(min_pairs=3, max_pairs=3, budget_s=5, pair_s=0.05)
PAIR = {
    "do": "pair", "options": {}, "seed": 0, "seconds": 0.01, "min_rounds": 2, "max_rounds": 5,
    "n_warmup": 1, "warmup_s": 0.1, "limit_s": 1.0,
}  # fmt: skip
RUNNER = Path(runner_module.__file__)

# A backend whose models are what they do.
FAULTY = """
import os, signal, sys, time
from compressor.latency import runner

class Faulty:
    def hello(self):
        return {"runtime": "faulty", "version": "1"}

    def runs_in_one_thread(self, options):
        return False

    def open(self, path, options):
        if path == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if path == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if path == "hang":
            time.sleep(1000)
        if path == "memory":
            bytearray(2**40)
        if path == "unsupported":
            raise runner.RunnerError(runner.UNSUPPORTED, "no kernel for node 12 (Resize)")
        if path == "exit":
            sys.stderr.write("terminate called")
            sys.stderr.flush()
            os._exit(3)
        if path == "prints":
            os.write(1, b"a library says something on stdout")
        if path == "backwards":
            return lambda: -1
        return runner.timed(lambda: time.sleep(0.001))

raise SystemExit(runner.serve(Faulty))
"""


@pytest.fixture
def host() -> Iterator[LocalHost]:
    made = LocalHost()
    yield made
    made.close()


@pytest.fixture
def faulty(host: LocalHost) -> Iterator[Runner]:
    made = Runner(lambda log: host.start([sys.executable, "-c", FAULTY], log=log), "this machine")
    yield made
    made.close()


@pytest.mark.fault("measuring process segfaults, hangs, eats memory, is killed, exits")
@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        ("segfault", RuntimeCrashError, "SIGSEGV"),
        ("killed", OutOfMemoryError, "killed on this machine"),
        ("hang", TimeLimitError, "no answer in 1 s"),
        ("memory", OutOfMemoryError, "no memory left"),
        ("unsupported", UnsupportedModelError, r"node 12 \(Resize\)"),
        ("exit", RuntimeCrashError, "exit status 3. terminate called"),
        ("backwards", UnstableClockError, "-1 ns"),
    ],
)
def test_what_ends_a_runtime_ends_one_trial(
    faulty: Runner, model: str, error: type[MeasurementError], match: str
) -> None:
    request = PAIR | {"original": "fine", "candidate": model}
    with pytest.raises(error, match=match):
        faulty.ask(request, limit_s=1.0)
    again = faulty.ask(PAIR | {"original": "fine", "candidate": "fine"}, limit_s=30)
    assert len(again["original_ms"]) >= 2


def test_what_libraries_print_does_not_disturb_the_answers(faulty: Runner) -> None:
    answer = faulty.ask(PAIR | {"original": "prints", "candidate": "fine"}, limit_s=30)
    assert len(answer["original_ms"]) >= 2


def test_requests_that_are_none_are_refused(faulty: Runner) -> None:
    with pytest.raises(ProtocolError, match="unknown request 'dance'"):
        faulty.ask({"do": "dance"}, limit_s=30)


@pytest.mark.fault("host killed while its device measures")
def test_a_host_that_is_killed_takes_its_busy_runner_along(tmp_path: Path) -> None:
    """SIGKILL gives the host no chance to say anything."""
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    host = subprocess.Popen(
        [
            sys.executable, "-c",
            "import subprocess, sys, json\n"
            f"p = subprocess.Popen([sys.executable, {str(script)!r}], stdin=subprocess.PIPE,"
            " stdout=subprocess.PIPE)\n"
            "p.stdout.readline()\n"
            f"request = {PAIR | {'original': 'hang', 'candidate': 'hang'}!r}\n"
            "p.stdin.write(json.dumps(request).encode() + b'\\n'); p.stdin.flush()\n"
            "print(p.pid, flush=True)\n"
            "p.wait()\n",
        ],
        stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert host.stdout is not None
    child = int(host.stdout.readline())
    time.sleep(0.2)
    host.send_signal(signal.SIGKILL)
    host.wait()
    host.stdout.close()
    for _ in range(100):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the runner lives on")


def test_one_lock_for_one_runner(host: LocalHost, tmp_path: Path) -> None:
    def make() -> Runner:
        return Runner(
            lambda log: host.start(
                [
                    sys.executable,
                    "-m",
                    "compressor.latency.runner",
                    "--lock",
                    f"{tmp_path}/a/lock",
                ],
                log=log,
            ),
            "this machine",
        )

    first, second = make(), make()
    try:
        first.begin()
        with pytest.raises(DeviceBusyError, match=r"process \d+ since"):
            second.begin()
        first.stop()
        second.begin()
    finally:
        first.close()
        second.close()


# ---- the real ONNX Runtime


@pytest.fixture
def target() -> Target:
    return load_target("host-cpu")


@pytest.fixture
def exported(conv_net: ConvNet, example: Tensor, tmp_path: Path) -> Path:
    return export_onnx(conv_net, example, tmp_path / "net.onnx")


def test_a_network_of_eight_times_the_work_is_measured_as_slower(
    tmp_path: Path, target: Target
) -> None:
    """No figure is asserted, only the sign, at a distance noise does not reach."""
    example = torch.randn(1, 16, 32, 32)
    small = nn.Sequential(nn.Conv2d(16, 16, 3))
    large = nn.Sequential(*[nn.Conv2d(16, 16, 3) for _ in range(8)])
    original = export_onnx(large.eval(), example, tmp_path / "large.onnx")
    candidate = export_onnx(small.eval(), example, tmp_path / "small.onnx")
    pair = compare_latency(original, candidate, target, effort=QUICK)
    assert pair.ci95[0] > 1.5
    assert pair.original.median_ms > pair.candidate.median_ms


def test_a_provider_that_is_missing_is_refused_with_its_package(
    exported: Path, target: Target
) -> None:
    """ONNX Runtime itself would run on the CPU and say nothing."""
    for provider, package in runner_module.PACKAGES.items():
        if provider == runner_module.CPU:
            continue
        wanted = replace(target, provider=provider)
        with pytest.raises(RuntimeMissingError, match=package.split()[0]):
            compare_latency(exported, exported, wanted, effort=QUICK)


def one_node(
    op: str, shape: list[int | str], kind: int = TensorProto.FLOAT, opset: int = 13
) -> bytes:
    node = helper.make_node(op, ["input"], ["output"], name="the_node")
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("input", kind, shape)],
        [helper.make_tensor_value_info("output", kind, shape)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)
    content: bytes = model.SerializeToString()
    return content


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (b"not a model", MeasurementError, "cannot load the model"),
        (one_node("Relu", ["batch", 3]), UnsupportedModelError, "Export with a fixed batch size"),
        (one_node("Abs", [1, 3], TensorProto.INT8), UnsupportedModelError, r"tensor\(int8\)"),
        (one_node("NoSuchOp", [1, 3]), MeasurementError, "NoSuchOp"),
        (one_node("Relu", [1, 3], opset=99), UnsupportedModelError, "opset"),
    ],
)
def test_models_that_cannot_be_timed_are_refused(
    exported: Path, target: Target, model: bytes, error: type[MeasurementError], match: str
) -> None:
    with open_device(target) as device:
        with pytest.raises(error, match=match):
            device.compare(model, model, effort=QUICK)
        assert device.compare(exported, exported, effort=QUICK).original.n > 0


def test_models_of_other_inputs_are_not_compared(exported: Path, target: Target) -> None:
    with pytest.raises(MeasurementError, match=r"\(1, 1, \d+, \d+\).*candidate of \[\(1, 3\)\]"):
        compare_latency(exported, one_node("Relu", [1, 3]), target, effort=QUICK)
    with pytest.raises(UnsupportedModelError, match="The candidate is no ONNX file"):
        compare_latency(exported, b"not a model", target, effort=QUICK)


@pytest.mark.fault("model larger than the memory limit")
def test_a_model_that_needs_more_memory_than_there_is(exported: Path, target: Target) -> None:
    """An allocation of 2 TiB, in the real runtime, is a failed trial."""
    size = onnx.numpy_helper.from_array(torch.tensor([2**39]).numpy(), "size")
    node = helper.make_node("ConstantOfShape", ["size"], ["big"])
    total = helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0)
    last = helper.make_node("Add", ["input", "sum"], ["output"])
    graph = helper.make_graph(
        [node, total, last], "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1])],
        [size],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    content = model.SerializeToString()
    with open_device(target) as device:
        with pytest.raises(OutOfMemoryError):
            device.compare(content, content, effort=QUICK)
        assert device.compare(exported, exported, effort=QUICK).original.n > 0


def test_a_file_that_is_not_there(target: Target, tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="cannot be read"):
        compare_latency(tmp_path / "a.onnx", tmp_path / "a.onnx", target)


def test_another_machine_is_not_taken_for_the_device(target: Target) -> None:
    nano = replace(target, models=("Jetson Nano",))
    with (
        pytest.raises(UnreachableError, match=r"Jetson Nano.*--device.*--estimate"),
        open_device(nano),
    ):
        pass


def test_the_runner_says_what_it_is(target: Target) -> None:
    with open_device(target) as device:
        assert isinstance(device, RunnerDevice)
        described = device.describe()
    assert described["host"] == "this machine"
    assert described["runtime"] == "onnxruntime"
    assert described["memory_mib"] > 100
    assert "CPUExecutionProvider" in described["providers"]


# ---- Python 3.6, which a stock Jetson Nano has


def python_36() -> str | None:
    found = sorted(Path.home().glob(".pyenv/versions/3.6.*/bin/python"))
    return str(found[0]) if found else shutil.which("python3.6")


def test_the_runner_is_written_in_python_3_6() -> None:
    ast.parse(RUNNER.read_text(encoding="utf-8"), feature_version=(3, 6))
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(RUNNER.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else
                     [alias.name for alias in node.names])
    }  # fmt: skip
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


@pytest.mark.skipif(python_36() is None, reason="no Python 3.6 on this machine")
def test_the_runner_runs_on_python_3_6(tmp_path: Path) -> None:
    """With stand-ins for numpy and ONNX Runtime, whose real ones the slow test installs."""
    (tmp_path / "numpy.py").write_text(
        "class random:\n"
        "    class RandomState:\n"
        "        def __init__(self, seed): pass\n"
        "        def standard_normal(self, shape): return Array()\n"
        "class Array:\n"
        "    def astype(self, kind): return self\n"
    )
    (tmp_path / "onnxruntime.py").write_text(
        "import time\n"
        "__version__ = 'imitation'\n"
        "def get_available_providers(): return ['CPUExecutionProvider']\n"
        "class ExecutionMode: ORT_SEQUENTIAL = 0\n"
        "class SessionOptions: pass\n"
        "class Node:\n"
        "    name, shape, type = 'x', [1, 3], 'tensor(float)'\n"
        "class InferenceSession:\n"
        "    def __init__(self, path, options, providers): pass\n"
        "    def get_providers(self): return ['CPUExecutionProvider']\n"
        "    def get_inputs(self): return [Node]\n"
        "    def get_outputs(self): return [Node]\n"
        "    def run(self, outputs, inputs): time.sleep(0.001)\n"
    )
    python = python_36()
    assert python is not None
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        [python, str(RUNNER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None
    hello = json.loads(process.stdout.readline())
    assert hello["python"].startswith("3.6.")
    answers = []
    for request in (PAIR | {"original": "a", "candidate": "b"}, {"do": "state"}, {"do": "x"}):
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        answers.append(json.loads(process.stdout.readline()))
    process.stdin.close()
    assert process.wait(timeout=10) == 0
    process.stdout.close()
    assert len(answers[0]["original_ms"]) >= 2
    assert "clocks" in answers[1]
    assert answers[2]["error"]["kind"] == "request"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(python_36() is None, reason="no Python 3.6 on this machine")
def test_the_newest_onnxruntime_for_python_3_6_measures(
    host: LocalHost, exported: Path, tmp_path: Path
) -> None:
    """ONNX Runtime 1.10, installed from the registry, reads what is exported for a Nano."""
    python = python_36()
    assert python is not None
    subprocess.run([python, "-m", "venv", str(tmp_path / "venv")], check=True)
    pip = [str(tmp_path / "venv/bin/python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--upgrade", "pip<22"], check=True)
    subprocess.run([*pip, "onnxruntime==1.10.0"], check=True)
    made = Runner(
        lambda log: host.start(
            [str(tmp_path / "venv/bin/python"), str(RUNNER), "--memory-mib", "0"], log=log
        ),
        "Python 3.6",
    )
    try:
        assert made.begin()["version"] == "1.10.0"
        answer = made.ask(
            PAIR | {"original": str(exported), "candidate": str(exported)}, limit_s=60
        )
        assert len(answer["original_ms"]) >= 2
    finally:
        made.close()


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="no sharing by session")
def test_precedence_is_the_runners_own_and_not_that_of_who_started_it() -> None:
    """Linux shares cores by session, and this one starts in ours."""
    before = Path("/proc/self/autogroup").read_text()
    process = subprocess.Popen(
        [sys.executable, str(RUNNER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    hello = json.loads(process.stdout.readline())
    assert Path("/proc/self/autogroup").read_text() == before
    assert os.getpriority(os.PRIO_PROCESS, 0) == 0
    if hello["niceness"] == runner_module.PRECEDENCE:
        theirs = Path(f"/proc/{process.pid}/autogroup").read_text()
        assert theirs.endswith(f"nice {runner_module.PRECEDENCE}\n")
        assert theirs.split()[:1] != before.split()[:1]  # a container's first session has none
    process.communicate()


@pytest.mark.parametrize("niceness", ["low", "-21", "20", "5\n", ""])
def test_a_niceness_that_is_none_is_refused(
    host: LocalHost, monkeypatch: pytest.MonkeyPatch, niceness: str
) -> None:
    monkeypatch.setenv(runner_module.PRECEDENCE_VARIABLE, niceness)
    made = Runner(lambda log: host.start([sys.executable, str(RUNNER)], log=log), "this machine")
    with pytest.raises(CompressorError, match="expected a niceness from -20 to 19"):
        made.begin()
    made.close()
