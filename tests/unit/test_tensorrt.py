"""The TensorRT runner: NVIDIA's own parser and builder where they are; fakes for other versions.

TensorRT-RTX builds without a GPU, and shares its ONNX parser with TensorRT. What runs on a GPU,
and what older versions name otherwise, is only checked with fakes that record calls.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakSet

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from onnx import TensorProto, helper
from onnx.numpy_helper import to_array
from torch import nn

import compressor
from compressor.export import export_onnx
from compressor.latency import runner, tensorrt_runner
from compressor.latency.cuda import Cuda, find_cuda
from compressor.latency.precision import count_precisions, half_onnx
from compressor.latency.runner import RunnerError
from compressor.latency.tensorrt_runner import TensorRT
from tests.conftest import INPUT_SHAPE, ConvNet, randomised

IMAGE = (3, 64, 64)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "conv_net": (ConvNet, INPUT_SHAPE),
    "resnet18": (torchvision.models.resnet18, IMAGE),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, IMAGE),
    "shufflenet": (torchvision.models.shufflenet_v2_x0_5, IMAGE),
}


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip(
        "tensorrt_rtx_bindings",
        reason="pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs",
        exc_type=ImportError,
    )


@pytest.fixture(scope="module")
def backend(trt: Any) -> TensorRT:
    return TensorRT(trt)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The ONNX file of a network of `NETWORKS`, or of "NAME pruned"; each exported once."""
    folder = tmp_path_factory.mktemp("onnx")
    written: dict[str, Path] = {}

    def export(name: str) -> Path:
        if name not in written:
            make, shape = NETWORKS[name.removesuffix(" pruned")]
            torch.manual_seed(0)
            net = randomised(make()) if make is ConvNet else make().eval()
            example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
            if name.endswith(" pruned"):
                net = compressor.prune(net, example, 0.5)
            written[name] = export_onnx(net, example, folder / f"{name}.onnx", opset=13)
        return written[name]

    return export


def save(path: Path, *nodes: onnx.NodeProto, sides: tuple[int | str, ...] = (1, 3)) -> str:
    """An ONNX file of these nodes, from `x` to `y`."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sides)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, sides)],
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("odd", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=7), path)
    return str(path)


def save_unknown_op(path: Path) -> str:
    return save(
        path,
        helper.make_node("Relu", ["x"], ["a"], name="first"),
        helper.make_node("Frobnicate", ["a"], ["y"], name="head/odd", domain="odd"),
    )


def refusal(act: Callable[[], object]) -> RunnerError:
    with pytest.raises(RunnerError) as caught:
        act()
    return caught.value


# With NVIDIA's parser and builder.


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("form", ["", " pruned"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_we_export_is_built_in_the_precision_asked(
    name: str, form: str, precision: str, backend: TensorRT,
    exported: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    engine = tmp_path / "new" / "model.engine"
    model = exported(name + form)
    before = model.read_bytes()

    reply = backend.build(str(model), str(engine), {"precision": precision, "workspace_mib": 64})

    assert engine.stat().st_size > 10_000
    assert [p.name for p in engine.parent.iterdir()] == ["model.engine"]  # nothing half written
    layers = reply["layers"]
    assert isinstance(layers, dict)
    assert layers[precision] > 5
    others = sum(layers.values()) - layers[precision]
    assert others <= (1 if precision == "fp16" else 0)  # the output's cast to FP32
    assert reply["precision_verified"] is True
    assert reply["fp16_by"] == ("onnx" if precision == "fp16" else None)
    assert reply["warnings"] == []
    assert model.read_bytes() == before
    assert json.loads(json.dumps(reply)) == reply


def test_every_layer_that_tensorrt_lists_is_counted(
    backend: TensorRT, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    reply = backend.build(str(exported("resnet18")), str(tmp_path / "e"), {})
    layers = reply["layers"]
    assert isinstance(layers, dict)
    if backend.cuda is None:  # otherwise the inspector was asked
        assert sum(layers.values()) == backend.log.layers.count(
            "Outputs: [ {"
        )  # "signal", "wait": none
    assert layers["fp32"] >= 20


def test_an_unknown_operation_is_refused_with_its_node(backend: TensorRT, tmp_path: Path) -> None:
    model = save_unknown_op(tmp_path / "m.onnx")
    for precision in ("fp32", "fp16"):
        options = {"precision": precision}
        err = refusal(lambda o=options: backend.build(model, str(tmp_path / "e"), o))  # type: ignore[misc]
        assert err.kind == runner.UNSUPPORTED
        assert "node 1 'head/odd' (Frobnicate)" in str(err)
        assert "Plugin not found" in str(err)
    assert not (tmp_path / "e").exists()


def test_a_file_that_is_no_onnx_is_refused(backend: TensorRT, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a model" * 99)
    options = {"precision": "fp16"}
    err = refusal(lambda: backend.build(str(tmp_path / "m.onnx"), str(tmp_path / "e"), options))
    assert err.kind == runner.UNSUPPORTED
    assert "Failed to parse the ONNX model" in str(err)
    err = refusal(lambda: backend.build(str(tmp_path / "none"), str(tmp_path / "e"), {}))
    assert err.kind == runner.FAILED
    assert "none cannot be read" in str(err)


def test_a_dynamic_shape_is_refused_with_the_inputs_name(
    backend: TensorRT, tmp_path: Path
) -> None:
    relu = helper.make_node("Relu", ["x"], ["y"])
    model = save(tmp_path / "m.onnx", relu, sides=("batch", 3))
    err = refusal(lambda: backend.build(model, str(tmp_path / "e"), {}))
    assert err.kind == runner.UNSUPPORTED
    assert "x has the shape [-1, 3]" in str(err)


def test_rtx_says_that_its_timing_caches_do_nothing(
    backend: TensorRT, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    options = {"timing_cache": str(tmp_path / "cache")}
    reply = backend.build(str(exported("conv_net")), str(tmp_path / "e"), options)
    assert reply["timing_cache"] == "unsupported"
    assert not (tmp_path / "cache").exists()


def test_an_engine_that_is_none_is_refused_with_tensorrts_words(trt: Any, tmp_path: Path) -> None:
    backend = TensorRT(trt, fake_cuda([]))
    (tmp_path / "e").write_bytes(b"not an engine" * 99)
    err = refusal(lambda: backend.open(str(tmp_path / "e"), {}))
    assert err.kind == runner.FAILED
    assert "cannot load the engine" in str(err)
    assert "deserializeCudaEngine" in str(err)


def test_precisions_unknown_to_us_are_refused(backend: TensorRT, tmp_path: Path) -> None:
    err = refusal(lambda: backend.build("m", "e", {"precision": "int8"}))
    assert err.kind == runner.REQUEST
    assert "'int8'; expected fp32 or fp16" in str(err)


def test_the_engine_cannot_be_written(
    backend: TensorRT, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    err = refusal(lambda: backend.build(str(exported("conv_net")), f"{tmp_path}/file/e", {}))
    assert err.kind == runner.FAILED
    assert "file/e cannot be written" in str(err)


@pytest.mark.usefixtures("trt")
def test_the_runner_as_a_child_process(exported: Callable[[str], Path], tmp_path: Path) -> None:
    engine = tmp_path / "e"
    pair = {"original": str(engine), "candidate": str(engine), "seed": 0, "seconds": 0.1,
            "min_rounds": 2, "max_rounds": 4, "n_warmup": 1, "warmup_s": 0.1,
            "limit_s": 5.0}  # fmt: skip
    build = {"do": "build", "engine": str(engine), "options": {"precision": "fp16"}}
    requests = [
        {**build, "model": str(exported("conv_net"))},
        {**build, "model": save_unknown_op(tmp_path / "odd.onnx")},
        {"do": "pair", **pair},
        {"do": "fly"},
        {"do": "state"},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "compressor.latency.tensorrt_runner"],
        input="".join(json.dumps(r) + "\n" for r in requests),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    hello, built, refused, timed, unknown, state = map(json.loads, done.stdout.splitlines())
    assert hello["runtime"].startswith("tensorrt")
    assert hello["version"]
    assert hello["providers"] == []
    assert built["precision_verified"] is True
    assert built["seconds"] >= built["built_seconds"] > 0
    assert refused["error"]["kind"] == runner.UNSUPPORTED
    assert "head/odd" in refused["error"]["message"]
    assert "head/odd" in done.stderr  # what TensorRT logs goes there too
    if hello["gpu"]:
        assert min(timed["original_ms"] + timed["candidate_ms"]) > 0
    else:
        assert timed["error"]["kind"] == runner.RUNTIME_MISSING
        assert "TensorRT is there, but no GPU answers" in timed["error"]["message"]
        assert "TensorRT is there, but no GPU answers" in hello["gpu_problem"]
    assert unknown["error"]["kind"] == runner.REQUEST
    assert "load" in state


# The conversion to half, with ONNX Runtime as the judge.


@pytest.mark.parametrize("name", ["conv_net", "shufflenet pruned"])
def test_a_halved_model_answers_like_the_original(
    name: str, exported: Callable[[str], Path]
) -> None:
    path = exported(name)
    content = path.read_bytes()
    half = half_onnx(content, str(path))

    types = {t.data_type for t in onnx.load_from_string(half).graph.initializer}
    assert TensorProto.FLOAT not in types
    casts = [n for n in onnx.load_from_string(half).graph.node if n.op_type == "Cast"]
    assert len(casts) == 2  # the input and the output
    sessions = [
        onnxruntime.InferenceSession(c, providers=["CPUExecutionProvider"])
        for c in (content, half)
    ]
    shape = sessions[0].get_inputs()[0].shape
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (expected,) = sessions[0].run(None, {"input": x})
    (answered,) = sessions[1].run(None, {"input": x})
    assert answered.dtype == np.float32
    np.testing.assert_allclose(answered, expected, atol=0.01 * float(np.abs(expected).max()))


def test_tensors_beside_the_file_are_read_and_halved_too(
    backend: TensorRT, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    path = exported("conv_net")
    outside = tmp_path / "m.onnx"
    onnx.save(onnx.load(path), outside, save_as_external_data=True, size_threshold=0)
    for precision in ("fp32", "fp16"):
        options = {"precision": precision}
        reply = backend.build(str(outside), str(tmp_path / "e"), options)
        assert reply["precision_verified"] is True

    halves = [half_onnx(p.read_bytes(), str(p)) for p in (outside, path)]
    one, other = (onnx.load_from_string(half).graph.initializer for half in halves)
    assert [t.name for t in one] == [t.name for t in other]
    for tensor, same in zip(one, other, strict=True):
        np.testing.assert_array_equal(to_array(tensor), to_array(same))


# Types of layers, as versions of TensorRT word them.


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("Half", "fp16"), ("Float", "fp32"), ("BFloat16", "bf16"), ("FP8", "fp8"),
        ("Row major linear FP32", "fp32"), ("Int8", "int"), ("Int64", "int"), ("Bool", "int"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"), ("E8M0", "other"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int"),
    ],
)  # fmt: skip
def test_types_are_told_from_the_inspectors_words(words: str, name: str) -> None:
    for key in ("Format/Datatype", "Datatype"):
        layer = {"Name": "a", "Outputs": [{"Name": "b", key: words, "Format": "N/A"}]}
        text = json.dumps({"Layers": [layer, "a name only", {"Name": "c", "Outputs": []}]})
        assert count_precisions(text) == {name: 1}


# Which calls are made of which version: fakes that only record.


class FakeMemory:
    """As long as somebody holds it."""


BUFFERS: "WeakSet[FakeMemory]" = WeakSet()  # that are still held by somebody


def fake_cuda(calls: list[Any], *, fails: str = "") -> Cuda:
    """Not a GPU: events and buffers that record; addresses count from 1000 upwards."""

    def buffer(n_bytes: int, values: Any) -> tuple[object, int]:
        if fails:
            raise RuntimeError(fails)
        calls.append(("buffer", n_bytes, None if values is None else values.dtype.name))
        memory = FakeMemory()
        BUFFERS.add(memory)
        return memory, 1000 + len(calls)

    def event() -> SimpleNamespace:
        return SimpleNamespace(
            record=lambda stream: calls.append(("record", stream)),
            synchronize=lambda: calls.append("synchronize"),
        )

    return Cuda("stream", 77, (RuntimeError,), {"name": "fake"}, buffer, event, lambda a, b: 1.5)


class FakeEnum(int):
    """As pybind11's enums: a number with a name."""

    name = ""


def enum(name: str, value: int) -> FakeEnum:
    made = FakeEnum(value)
    made.name = name
    return made


class FakeLogger:
    """Base of loggers."""


FLOAT, HALF = enum("FLOAT", 0), enum("HALF", 1)
TENSORS = [("x", (1, 3), FLOAT, True), ("y", (1, 2), HALF, False)]


class FakeTensorRT(ModuleType):
    """A TensorRT of one generation that records what it is asked for; it does nothing."""

    def __init__(
        self, *, has_flags: bool, has_pools: bool, by_name: bool, by_index: bool,
        node_names: bool = True, parses: bool = True, layers: str = "Half",
        engine_is: str = "good", log: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__("tensorrt")
        self.calls: list[Any] = []
        self.cache_fits, self.code, self.__version__ = True, "CODE", "fake"
        self.ILogger = FakeLogger
        flags = {"EXPLICIT_BATCH": enum("EXPLICIT_BATCH", 0)} if has_flags else {}
        self.NetworkDefinitionCreationFlag = SimpleNamespace(**flags)
        self.BuilderFlag = SimpleNamespace(**({"FP16": "FP16"} if has_flags else {}))
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="DETAILED")
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="WORKSPACE")
        self.TensorIOMode = SimpleNamespace(INPUT="INPUT")
        self.LayerInformationFormat = SimpleNamespace(JSON="JSON")
        self.EngineInspector = object
        self.init_libnvinfer_plugins = self.record("init_libnvinfer_plugins", True)
        self.has_pools, self.by_name, self.by_index = has_pools, by_name, by_index
        self.node_names, self.parses, self.layers = node_names, parses, layers
        self.engine_is, self.lines = engine_is, log

    def record(self, name: str, answer: Any = None) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return answer

        return call

    def Builder(self, log: Any) -> Any:
        for line in self.lines:
            log.log(1, line)
        tensor = SimpleNamespace(name="x", shape=(1, 3))
        network = SimpleNamespace(num_inputs=1, get_input=lambda i: tensor)
        serialized = None if self.engine_is == "none" else b"engine"
        return SimpleNamespace(
            create_network=self.record("create_network", network),
            create_builder_config=self._config,
            build_serialized_network=lambda network, config: serialized,
        )

    def _config(self) -> Any:
        def set_timing_cache(cache: bytes, ignore: bool) -> bool:
            self.calls.append(("set_timing_cache", cache, ignore))
            return self.cache_fits or cache == b""

        config = SimpleNamespace(
            set_flag=self.record("set_flag"),
            create_timing_cache=lambda content: content,
            set_timing_cache=set_timing_cache,
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"timings"),
        )
        if self.has_pools:
            config.set_memory_pool_limit = self.record("set_memory_pool_limit")
        self.config = config
        return config

    def OnnxParser(self, network: Any, log: Any) -> Any:
        error = SimpleNamespace(node=lambda: 1, desc=lambda: "no importer", code=lambda: self.code)
        if self.node_names:
            error.node_name, error.node_operator = lambda: "named", lambda: "Odd"

        def parse(content: bytes, path: str) -> bool:
            nodes = onnx.load_from_string(content).graph.node
            is_half = any(node.op_type == "Cast" for node in nodes)  # of its float input
            self.calls.append(("parse", "FLOAT16" if is_half else "FLOAT"))
            return self.parses

        return SimpleNamespace(parse=parse, num_errors=1, get_error=lambda i: error)

    def Runtime(self, log: Any) -> Any:
        if self.engine_is == "no runtime":
            raise TypeError("pybind11::init(): factory function returned nullptr")
        outputs = [{"Format/Datatype": self.layers}]
        information = json.dumps({"Layers": [{"Outputs": outputs}]})
        names = [name for name, *_ in TENSORS]
        found = {name: rest for name, *rest in TENSORS}
        engine = SimpleNamespace(
            create_execution_context=self._context,
            create_engine_inspector=lambda: SimpleNamespace(
                get_engine_information=lambda form: information
            ),
        )
        if self.by_name:
            engine.num_io_tensors, engine.get_tensor_name = len(names), names.__getitem__
            engine.get_tensor_shape = lambda name: found[name][0]
            engine.get_tensor_dtype = lambda name: found[name][1]
            engine.get_tensor_mode = lambda name: "INPUT" if found[name][2] else "OUTPUT"
        if self.by_index:
            engine.num_bindings, engine.get_binding_name = len(names), names.__getitem__
            engine.get_binding_shape = lambda i: TENSORS[i][1]
            engine.get_binding_dtype = lambda i: TENSORS[i][2]
            engine.binding_is_input = lambda i: TENSORS[i][3]
        return SimpleNamespace(deserialize_cuda_engine=lambda content: engine)

    def _context(self) -> Any:
        started = self.engine_is != "does not start"
        context = SimpleNamespace()
        if self.by_name:
            context.set_tensor_address = self.record("set_tensor_address")
            context.execute_async_v3 = self.record("execute_async_v3", started)
        if self.by_index:
            context.execute_async_v2 = self.record("execute_async_v2", started)
        return context


GENERATIONS: dict[str, dict[str, bool]] = {
    "8.2": {"has_flags": True, "has_pools": False, "by_name": False, "by_index": True,
            "node_names": False},
    "8.6": {"has_flags": True, "has_pools": True, "by_name": True, "by_index": True},
    "10": {"has_flags": True, "has_pools": True, "by_name": True, "by_index": False},
    "11": {"has_flags": False, "has_pools": True, "by_name": True, "by_index": False},
}  # fmt: skip


def fake(generation: str, **change: Any) -> FakeTensorRT:
    return FakeTensorRT(**{**GENERATIONS[generation], **change})


@pytest.fixture
def small(tmp_path: Path) -> str:
    relu = helper.make_node("Relu", ["x"], ["a"], name="first")
    return save(tmp_path / "m.onnx", relu, helper.make_node("Relu", ["a"], ["y"], name="second"))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_building_takes_the_way_of_each_generation_with_fakes(
    generation: str, small: str, tmp_path: Path
) -> None:
    trt = fake(generation)
    options = {"precision": "fp16", "workspace_mib": 3}
    backend = TensorRT(trt, fake_cuda([]))
    reply = backend.build(small, str(tmp_path / "e"), options)

    old = generation != "11"
    assert trt.calls[0] == ("init_libnvinfer_plugins", backend.log, "")
    assert reply["fp16_by"] == ("flag" if old else "onnx")
    assert (("create_network", 1) in trt.calls) == old
    assert (("create_network", 0) in trt.calls) == (not old)
    assert (("set_flag", "FP16") in trt.calls) == old
    assert [c[1] for c in trt.calls if c[0] == "parse"] == ["FLOAT"] + ["FLOAT16"] * (not old)
    if generation == "8.2":
        assert trt.config.max_workspace_size == 3 * 2**20
    else:
        assert ("set_memory_pool_limit", "WORKSPACE", 3 * 2**20) in trt.calls
        assert not hasattr(trt.config, "max_workspace_size")
    assert trt.config.profiling_verbosity == "DETAILED"
    assert reply["precision_verified"] is True
    assert (tmp_path / "e").read_bytes() == b"engine"


@pytest.mark.parametrize("generation", GENERATIONS)
def test_running_takes_the_way_of_each_generation_with_fakes(
    generation: str, tmp_path: Path
) -> None:
    trt, gpu = fake(generation), []  # type: ignore[var-annotated]
    (tmp_path / "e").write_bytes(b"engine")
    run = TensorRT(trt, fake_cuda(gpu)).open(str(tmp_path / "e"), {})
    n_calls, n_events = len(trt.calls), len(gpu)

    assert run() == 1_500_000
    assert gpu[:2] == [("buffer", 12, "float32"), ("buffer", 4, None)]
    assert gpu[n_events:] == [("record", "stream"), ("record", "stream"), "synchronize"]
    if generation == "8.2":
        assert trt.calls[n_calls:] == [("execute_async_v2", [1001, 1002], 77)]
    else:
        assert trt.calls[1:3] == [
            ("set_tensor_address", n, a) for n, a in (("x", 1001), ("y", 1002))
        ]
        assert trt.calls[n_calls:] == [("execute_async_v3", 77)]


def test_buffers_live_as_long_as_what_runs_on_them_with_fakes(tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(b"engine")
    for generation in GENERATIONS:
        run = TensorRT(fake(generation), fake_cuda([])).open(str(tmp_path / "e"), {})
        assert len(BUFFERS) == 2
        del run
        assert not BUFFERS


def test_fp16_that_came_out_as_fp32_is_told_with_a_fake(small: str, tmp_path: Path) -> None:
    trt = fake("10", layers="Row major linear FP32")
    options = {"precision": "fp16"}
    reply = TensorRT(trt, fake_cuda([])).build(small, str(tmp_path / "e"), options)
    assert reply["precision_verified"] is False
    assert "no layer" in str(reply["warnings"])


def test_8_2_names_only_the_position_of_a_node_with_a_fake(small: str, tmp_path: Path) -> None:
    for generation, named in (("8.2", "node 1 'second' (Relu)"), ("10", "node 1 'named' (Odd)")):
        backend = TensorRT(fake(generation, parses=False), fake_cuda([]))
        err = refusal(lambda b=backend: b.build(small, str(tmp_path / "e"), {}))  # type: ignore[misc]
        assert err.kind == runner.UNSUPPORTED
        assert f"{named}: no importer [CODE]" in str(err)


def test_a_parser_without_memory_is_no_fault_of_the_model_with_a_fake(
    small: str, tmp_path: Path
) -> None:
    trt = fake("8.6", parses=False)
    trt.code = "MEM_ALLOC_FAILED"
    err = refusal(lambda: TensorRT(trt, fake_cuda([])).build(small, str(tmp_path / "e"), {}))
    assert err.kind == runner.OUT_OF_MEMORY


def test_the_timing_cache_is_kept_or_replaced_with_a_fake(small: str, tmp_path: Path) -> None:
    trt, cache = fake("10"), tmp_path / "folder" / "cache"
    backend, options = TensorRT(trt, fake_cuda([])), {"timing_cache": str(cache)}

    def build() -> dict[str, Any]:
        trt.calls.clear()
        return backend.build(small, str(tmp_path / "e"), options)

    assert build()["timing_cache"] == "new"
    assert cache.read_bytes() == b"timings"
    assert ("set_timing_cache", b"", False) in trt.calls
    assert build()["timing_cache"] == "kept"
    assert [c for c in trt.calls if c[0] == "set_timing_cache"] == [
        ("set_timing_cache", b"timings", False)
    ]
    trt.cache_fits = False
    reply = build()
    assert reply["timing_cache"] == "refused"
    assert "replaced" in reply["warnings"][0]
    assert ("set_timing_cache", b"", False) in trt.calls
    assert [p.name for p in cache.parent.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("Error Code 2: OutOfMemory (no further information)", runner.OUT_OF_MEMORY),
        ("[defaultAllocator.cpp::allocate::20] Error Code 1: Cuda Runtime (out of memory)",
         runner.OUT_OF_MEMORY),
        ("Requested amount of GPU memory (9 bytes) could not be allocated.",
         runner.OUT_OF_MEMORY),
        ("Error Code 10: Could not find any implementation for node conv1.", runner.FAILED),
    ],
)  # fmt: skip
def test_a_build_that_fails_quotes_tensorrt_with_a_fake(
    line: str, kind: str, small: str, tmp_path: Path
) -> None:
    backend = TensorRT(fake("8.6", engine_is="none", log=(line,)), fake_cuda([]))
    err = refusal(lambda: backend.build(small, str(tmp_path / "e"), {}))
    assert err.kind == kind
    assert line in str(err)


def test_what_fails_on_the_gpu_is_an_error_of_its_kind_with_fakes(tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(b"engine")

    def opening(engine_is: str, fails: str = "") -> RunnerError:
        backend = TensorRT(fake("10", engine_is=engine_is), fake_cuda([], fails=fails))
        return refusal(lambda: backend.open(str(tmp_path / "e"), {}))

    assert opening("good", "CUDA out of memory. Tried ...").kind == runner.OUT_OF_MEMORY
    assert opening("good", "an illegal memory access").kind == runner.FAILED
    assert "did not start" in str(opening("does not start"))
    assert "returned nullptr" in str(opening("no runtime"))


class FakeEvent:
    def __init__(self, enable_timing: bool = True) -> None:
        assert enable_timing
        self.record = self.synchronize = lambda *_: None
        self.time_till = self.elapsed_time = lambda end: 0.25


def fake_pycuda() -> dict[str, ModuleType]:
    driver: Any = ModuleType("pycuda.driver")
    driver.Error, driver.Event = type("Error", (Exception,), {}), FakeEvent
    driver.mem_alloc, driver.copied = lambda n: n, []
    driver.memcpy_htod = lambda memory, values: driver.copied.append(values.tolist())
    driver.Stream = lambda: SimpleNamespace(handle=5)
    driver.Context = SimpleNamespace(
        get_device=lambda: SimpleNamespace(
            name=lambda: "Orin", compute_capability=lambda: (8, 7), total_memory=lambda: 2**30
        )
    )
    context = ModuleType("pycuda.autoprimaryctx")
    return {"pycuda": ModuleType("pycuda"), "pycuda.driver": driver, context.__name__: context}


def test_pycuda_is_preferred_with_a_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = fake_pycuda()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    cuda, problem = find_cuda()
    assert cuda is not None
    assert (cuda.handle, problem) == (5, "")
    assert cuda.gpu == {"name": "Orin", "compute_capability": "8.7", "memory_mib": 1024}
    assert cuda.buffer(8, np.ones(2, np.float32)) == (8, 8)
    assert modules["pycuda.driver"].copied == [[1.0, 1.0]]
    assert cuda.timed(lambda: None)() == 250_000


def test_torch_is_the_other_way_with_a_fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors lie on the CPU here."""
    gpu = SimpleNamespace(name="T4", major=7, minor=5, total_memory=2**31)
    empty = torch.empty
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: empty(n, dtype=dtype))
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda index: gpu,
        "Stream": lambda: SimpleNamespace(cuda_stream=6),
        "Event": FakeEvent,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    cuda, _ = find_cuda()
    assert cuda is not None
    assert cuda.handle == 6
    assert cuda.gpu == {"name": "T4", "compute_capability": "7.5", "memory_mib": 2048}
    values = np.array([[1.5, -2.0]], np.float16)
    memory, address = cuda.buffer(4, values)
    assert isinstance(memory, torch.Tensor)
    assert address == memory.data_ptr()
    assert memory.view(torch.float16).tolist() == [1.5, -2.0]
    assert cuda.timed(lambda: None)() == 250_000


def test_no_tensorrt_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_runner, "MODULES", ("no_such_tensorrt",))
    err = refusal(TensorRT)
    assert err.kind == runner.RUNTIME_MISSING
    assert "pip install tensorrt" in str(err)
    assert sys.executable in str(err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_told_before_anything_is_opened_with_a_fake() -> None:
    backend = TensorRT(fake("10"))
    assert backend.hello()["gpu"] == {}
    err = refusal(lambda: backend.open("nothing", {}))
    assert err.kind == runner.RUNTIME_MISSING
    assert "no GPU answers (through_pycuda: " in str(err)
