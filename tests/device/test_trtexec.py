"""TensorRT's own program, imitated: the real commands on the real host, made-up times."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import compressor
from compressor.errors import (
    MeasurementError,
    OutOfMemoryError,
    RuntimeCrashError,
    RuntimeMissingError,
    TimeLimitError,
    UnstableClockError,
    UnsupportedModelError,
)
from compressor.export import export_onnx
from compressor.graph.costs import ran
from compressor.latency import trtexec_text as trtexec
from compressor.latency.host import Done, LocalHost
from compressor.latency.layers import Profiled, layer_rows
from compressor.latency.precision import half_onnx
from compressor.latency.timing import Effort
from compressor.latency.trtexec import COOL_STEP_S, TrtexecDevice, find_trtexec
from compressor.latency.trtexec_text import MachineState
from compressor.values import SessionPair, Target
from tests.conftest import ConvNet
from tests.device.imitation_trtexec import install

VERSIONS = {"8.2": (8, 2, 1), "8.5": (8, 5, 2), "10": (10, 3, 0), "11": (11, 4, 0)}
EFFORT = Effort(2, 2, 1.0)
TARGET = Target(
    "nano", "A Nano", "trtexec", "", 1, "fp32", 8, "", 13, 13, 7, workspace_mib=512,
    build_limit_s=20, run_limit_s=20,
)  # fmt: skip
STILL = MachineState("MAXN", {"57000000.gpu": 921_600_000}, (), {"GPU-therm": 40.0})


class Board(LocalHost):
    """This machine with a sysfs of its own; remembers what ran."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.cache, self.sys = str(folder / "cache"), folder / "sys"
        self.ran: list[list[str]] = []

    def run(self, command: Sequence[str], *, limit_s: float, stdin: bytes = b"") -> Done:
        self.ran.append(list(command))
        here = [part.replace("/sys/", f"{self.sys}/") for part in command]
        return super().run(here if command[0] == "sh" else command, limit_s=limit_s, stdin=stdin)

    def set(self, path: str, value: object) -> None:
        (self.sys / path).parent.mkdir(parents=True, exist_ok=True)
        (self.sys / path).write_text(f"{value}\n")

    def count(self, flag: str) -> int:
        return sum(any(part.startswith(flag) for part in command) for command in self.ran)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    board = Board(tmp_path)
    yield board
    board.close()


def device(board: Board, version: str = "8.2", **changes: object) -> TrtexecDevice:
    path = install(Path(board.cache).parent, version)
    target = replace(TARGET, trtexec=("/nowhere/trtexec", path), **changes)  # type: ignore[arg-type]
    return TrtexecDevice(board, target, sleep=lambda _: None)


def model(n_bytes: int, marker: str = "") -> bytes:
    """As large as asked; the imitation reads nothing else but the marker."""
    return f"imitate:{marker} ".encode().ljust(n_bytes, b".")


def rows_json(version: str) -> str:
    """What version writes for a warm-up of 500 ms: 9 ms before it, then 3.0 and 3.5 ms."""
    starts = [499.5, 501.0, 505.0] if version == "8.2" else [501.0, 505.0]
    took = {499.5: 9.0, 501.0: 3.0, 505.0: 3.5}
    more = ', "endToEndMs" : 99' if version == "8.2" else ""
    rows = [
        f'{{ "startEnqMs" : {s}, "endEnqMs" : {s}, "startH2dMs" : {s}, "endH2dMs" : {s}, '
        f'"startComputeMs" : {s}, "endComputeMs" : {s + took[s]}, "startD2hMs" : {s}, '
        f'"endD2hMs" : {s}, "h2dMs" : 0, "computeMs" : {took[s]}, "d2hMs" : 0, '
        f'"latencyMs" : {took[s]}{more} }}'
        for s in starts
    ]
    return "[\n  " + "\n, ".join(rows) + "\n]\n"


@pytest.mark.parametrize("version", VERSIONS)
def test_times_are_those_after_the_warm_up(version: str) -> None:
    assert trtexec.read_times(rows_json(version), 500) == (3.0, 3.5)


@pytest.mark.parametrize("version", VERSIONS)
def test_layers_are_those_of_the_network(
    version: str, board: Board, conv_net: ConvNet, example: torch.Tensor, tmp_path: Path
) -> None:
    """As TensorRT fuses and calls them; each is led back to the layer it came from."""
    small = compressor.prune(conv_net, example, 0.5)
    there, models = device(board, version), []
    for network in (conv_net, small):
        content = export_onnx(network, example, tmp_path / "m.onnx", opset=13).read_bytes()
        models.append(Profiled(content, there.profile(content), ran(network, example)))
    assert any("Relu" in kernel.name and "Conv" in kernel.name for kernel in models[0].kernels)
    rows = {row["name"]: row for row in layer_rows(*models)}
    layers = {n for n, m in conv_net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert layers <= set(rows)
    assert rows["stem"]["kind"] == "Conv + Relu"
    assert rows["between layers (Reformatting CopyNode)"]["original_macs"] == 0
    for network, key in ((conv_net, "original_macs"), (small, "compressed_macs")):
        counted = compressor.cost(network, example).macs
        assert sum(row[key] for row in rows.values()) == counted  # type: ignore[literal-required]


@pytest.mark.bad_input("a profile of trtexec's")
@pytest.mark.parametrize(
    "text", ["", "{}", '[{"name": "a"}]', '[{"name": "a", "averageMs": "1"}]']
)
def test_a_profile_that_is_none_is_named(text: str) -> None:
    with pytest.raises(MeasurementError, match=r"profile|has no number"):
        trtexec.read_profile(text)


def test_flags_follow_the_version(board: Board) -> None:
    built = {}
    for version, number in VERSIONS.items():
        there = device(board, version)
        assert there.capabilities.version == number
        built[version] = trtexec.build_command(
            "t", there.capabilities, onnx="m", engine="e", timing_cache="c", workspace_mib=512,
            precision="fp16",
        )  # fmt: skip
    start = ["t", "--onnx=m", "--saveEngine=e", "--timingCacheFile=c"]
    pool = "--memPoolSize=workspace:512"
    assert built == {
        "8.2": [*start, "--fp16", "--workspace=512", "--buildOnly"],
        "8.5": [*start, "--fp16", pool, "--buildOnly"],
        "10": [*start, "--fp16", pool, "--skipInference"],
        "11": [*start, pool, "--skipInference"],
    }


def test_every_run_gives_the_flags_whose_defaults_differ() -> None:
    command = trtexec.run_command("t", engine="e", times="j", seconds=3)
    assert {"--useCudaGraph", "--useSpinWait", "--noDataTransfers"} < set(command)
    assert "--warmUp=500" in command
    assert "--duration=3" in command


@pytest.mark.parametrize("version", VERSIONS)
def test_the_ratio_of_a_pair_is_that_of_the_models(board: Board, version: str) -> None:
    there = device(board, version)

    pair = there.time_pair(model(8000), model(4000), 0, EFFORT)

    assert isinstance(pair, SessionPair)
    assert not pair.interleaved
    assert len(pair.original_ms) < len(pair.candidate_ms)
    assert np.median(pair.original_ms) == pytest.approx(8.0, rel=0.01)
    assert np.median(pair.candidate_ms) == pytest.approx(4.0, rel=0.01)
    assert max(pair.original_ms) < 8.2  # no row of the warm-up, which is 3 times as slow
    assert there.take_conditions() == ()
    assert there.describe()["version"] == ".".join(map(str, VERSIONS[version]))


def test_an_engine_is_built_once(board: Board) -> None:
    there = device(board)
    for seed in range(2):
        there.time_pair(model(8000), model(4000), seed, EFFORT)
    device(board).time_pair(model(8000), model(4000), 2, EFFORT)
    assert board.count("--saveEngine") == 2
    assert board.count("--loadEngine") == 6
    assert len(list(Path(board.cache).glob("timing-8.2.1-*"))) == 1
    assert not list(Path(board.cache).glob("times-*"))


def test_another_precision_or_version_is_another_engine(board: Board) -> None:
    engines = {
        device(board, version, precision=precision).build(model(4000))
        for version, precision in (("8.2", "fp32"), ("8.2", "fp16"), ("10", "fp32"))
    }
    assert len(engines) == 3


def test_seeds_next_to_each_other_give_opposite_orders(board: Board) -> None:
    there = device(board)
    first = []
    for seed in range(8):
        board.ran.clear()
        there.time_pair(model(8000), model(4000), seed, EFFORT)
        first.append(next(c[1] for c in board.ran if len(c) > 1 and "--loadEngine" in c[1]))
    pairs = list(zip(first[::2], first[1::2], strict=True))
    assert all(a != b for a, b in pairs)
    assert len(set(pairs)) == 2  # and which comes first is drawn


def test_fp16_reaches_the_engine_of_each_version(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "compressor.latency.trtexec.half_onnx", lambda content: content[: len(content) // 2]
    )
    for version in VERSIONS:
        there = device(board, version, precision="fp16")
        assert trtexec.needs_half_onnx(there.capabilities, "fp16") == (version == "11")
        pair = there.time_pair(model(8000), model(4000), 0, EFFORT)
        assert np.median(pair.original_ms) == pytest.approx(4.0, rel=0.01)


def test_a_half_file_keeps_float_inputs() -> None:
    tensor = onnx.helper.make_tensor_value_info
    weight = onnx.numpy_helper.from_array(np.full((4, 4), 0.5, np.float32), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [tensor("x", 1, [1, 4])], [tensor("y", 1, [1, 4])], [weight],
    )  # fmt: skip
    whole = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)])

    half = onnx.load_model_from_string(half_onnx(whole.SerializeToString()))

    assert [i.data_type for i in half.graph.initializer] == [onnx.TensorProto.FLOAT16]
    assert half.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_no_trtexec_names_the_places(board: Board, tmp_path: Path) -> None:
    (tmp_path / "broken").write_text(
        "#!/bin/sh\necho 'libnvinfer.so.8: cannot open' >&2; exit 127"
    )
    (tmp_path / "broken").chmod(0o755)
    with pytest.raises(RuntimeMissingError, match=r"/nowhere.*libnvinfer\.so\.8: cannot open"):
        find_trtexec(board, ["/nowhere/trtexec", str(tmp_path / "broken")])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_refused_node_is_quoted(board: Board, version: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r'node number 12 \[Gelu -> "x"\]') as caught:
        device(board, version).build(model(100, "unsupported"))
    assert ("Invalid Node" if version == "11" else "Plugin not found") in str(caught.value)
    assert "[E]" not in str(caught.value)


@pytest.mark.parametrize(
    ("marker", "error", "words"),
    [
        ("oom", OutOfMemoryError, "killed"),
        ("cuda-oom", OutOfMemoryError, "out of memory"),
        ("no-tactic", UnsupportedModelError, "workspace_mib"),
        ("segfault", RuntimeCrashError, "SIGSEGV"),
    ],
)
def test_builds_fail_as_what_they_are(
    board: Board, marker: str, error: type[MeasurementError], words: str
) -> None:
    with pytest.raises(error, match=words):
        device(board).build(model(100, marker))
    assert not list(Path(board.cache, "engines").iterdir())


@pytest.mark.parametrize(
    ("marker", "error", "words"),
    [
        ("half-json", MeasurementError, "cut off"),
        ("no-json", MeasurementError, "No such file"),
        ("zero", UnstableClockError, "0 ms"),
        ("backwards", UnstableClockError, "backwards"),
        ("stale", MeasurementError, "deserialization"),
    ],
)
def test_runs_fail_as_what_they_are(
    board: Board, marker: str, error: type[MeasurementError], words: str
) -> None:
    with pytest.raises(error, match=words):
        device(board).time_pair(model(4000, marker), model(4000), 0, EFFORT)
    assert len(list(Path(board.cache, "engines").iterdir())) == (1 if marker == "stale" else 2)


def test_a_hang_ends_at_its_limit(board: Board) -> None:
    with pytest.raises(TimeLimitError, match=r"0\.5 s.*build_s"):
        device(board, build_limit_s=0.5).build(model(100, "build-hang"))
    with pytest.raises(TimeLimitError, match="run_s"):
        device(board, run_limit_s=2).time_pair(
            model(4000, "run-hang"), model(4000, "run-hang"), 0, EFFORT
        )


def test_a_flag_of_another_version_is_told(board: Board) -> None:
    there = device(board, "11")
    done = board.run([there.path, "--onnx=m", "--fp16"], limit_s=20)
    assert "Unknown option: --fp16" in str(trtexec.classify(done.text, done.code))


@pytest.mark.parametrize("version", VERSIONS)
def test_doubts_of_the_log_are_passed_on(board: Board, version: str) -> None:
    there = device(board, version)
    there.time_pair(model(8000, "unstable"), model(8000, "no-graph"), 0, EFFORT)
    unstable, graph = sorted(there.take_conditions())
    assert "coefficient of variance = 4.75734%" in unstable
    assert "without a CUDA graph: The built TensorRT engine contains" in graph
    assert there.take_conditions() == ()


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("", MeasurementError, "no JSON"),
        ("{}", MeasurementError, "expected a list"),
        ("[]", MeasurementError, "0 rows"),
        ("[3]", MeasurementError, "no number startComputeMs"),
        ('[{"startComputeMs": 1}]', MeasurementError, "no number computeMs"),
        ('[{"startComputeMs": 1, "computeMs": true}]', MeasurementError, "no number computeMs"),
        ('[{"startComputeMs": 1, "computeMs": NaN}]', MeasurementError, "NaN is no finite"),
        ('[{"startComputeMs": 1, "computeMs": -2}]', UnstableClockError, "-2 ms"),
        ('[{"startComputeMs": 1, "computeMs": 1e999}]', MeasurementError, "1e999 is no finite"),
        ('[{"startComputeMs": NaN, "computeMs": 2}]', MeasurementError, "NaN is no finite"),
    ],
)
def test_what_is_no_times_is_refused(text: str, error: type[MeasurementError], words: str) -> None:
    with pytest.raises(error, match=words):
        trtexec.read_times(text, 0)


def test_a_file_cut_anywhere_is_refused() -> None:
    whole = rows_json("10").rstrip()
    for n_characters in range(len(whole)):
        with pytest.raises(MeasurementError):
            trtexec.read_times(whole[:n_characters], 0)


def test_a_warning_of_memory_is_no_lack_of_memory() -> None:
    log = "[W] [TRT] Skipping tactic: out of memory\n[E] Something else"
    assert type(trtexec.classify(log, 1)) is MeasurementError


def test_the_state_of_a_nano_is_read(board: Board) -> None:
    there = device(board)
    assert there.state() == MachineState("", {}, (), {})
    gpu = "class/devfreq/57000000.gpu"
    for name, hz in (
        ("cur_freq", 76_800_000),
        ("min_freq", 76_800_000),
        ("max_freq", 921_600_000),
    ):
        board.set(f"{gpu}/{name}", hz)
    for zone, (kind, milli) in enumerate((("GPU-therm", 41500), ("PMIC-Die", 100000))):
        board.set(f"class/thermal/thermal_zone{zone}/type", kind)
        board.set(f"class/thermal/thermal_zone{zone}/temp", milli)

    state = there.state()

    assert state.clocks_hz == {"57000000.gpu": 76_800_000}
    assert state.unlocked == ("57000000.gpu",)
    assert state.temperatures_c == {"GPU-therm": 41.5, "PMIC-Die": 100.0}
    assert state.hottest_c == 41.5  # a Nano's PMIC says 100 whatever happens
    assert json.dumps(there.describe())


def test_power_mode_is_read() -> None:
    text = "power NV Fan Mode:quiet\npower NV Power Mode: MAXN\npower 0\n"
    assert trtexec.read_state(text).power_mode == "MAXN"


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (STILL, None),
        (replace(STILL, clocks_hz={"57000000.gpu": 900_000_000}), None),
        (replace(STILL, clocks_hz={"57000000.gpu": 614_400_000}), "from 922 to 614 MHz"),
        (replace(STILL, power_mode="5W"), "from MAXN to 5W"),
        (replace(STILL, temperatures_c={"GPU-therm": 62.0}), "22 C warmer"),
    ],
)
def test_what_moved_is_told(after: MachineState, words: str | None) -> None:
    found = trtexec.changes(STILL, after)
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


@pytest.mark.parametrize(("cools_by", "waits"), [(20, 3), (0, 30)])
def test_a_build_waits_for_the_device_to_cool(board: Board, cools_by: int, waits: int) -> None:
    """From 40 C a build heats it to 100 C; it cools by `cools_by` C at each look, down to 40."""
    slept: list[float] = []
    zone = "class/thermal/thermal_zone0"
    there = device(board)
    degrees = [40.0]

    def show() -> None:
        board.set(f"{zone}/temp", int(degrees[0] * 1000))

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        degrees[0] = max(40.0, degrees[0] - cools_by)
        show()

    class Heats(Board):
        def run(self, command: Sequence[str], *, limit_s: float, stdin: bytes = b"") -> Done:
            if any(part.startswith("--saveEngine") for part in command):
                degrees[0] = 100.0
                show()
            return super().run(command, limit_s=limit_s, stdin=stdin)

    board.set(f"{zone}/type", "GPU-therm")
    show()
    hot = Heats(board.sys.parent)
    heating = TrtexecDevice(hot, replace(TARGET, trtexec=(there.path,)), sleep=sleep)
    heating.build(model(100))
    hot.close()

    assert len(slept) == waits
    assert math.isclose(sum(slept), waits * COOL_STEP_S)
    assert any("warmer than before a build" in c for c in heating.take_conditions()) == (
        not cools_by
    )
