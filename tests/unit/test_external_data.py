"""ONNX files whose tensors lie beside them: read as ONNX Runtime reads them, from their folder."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from compressor.errors import MeasurementError, UnsupportedModelError
from compressor.export import export_onnx
from compressor.latency import machine
from compressor.latency.machine import content_of

IMAGES = torch.rand(1, 3, 8, 8)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """The same network in one file (one.onnx) and in two (two/model.onnx)."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    one = export_onnx(network, IMAGES, tmp_path / "one.onnx")
    (tmp_path / "two").mkdir()
    path = tmp_path / "two" / "model.onnx"
    onnx.save(
        onnx.load(one), path, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    return path


def answers(content: bytes) -> np.ndarray:
    session = onnxruntime.InferenceSession(content)
    return np.asarray(session.run(None, {"input": IMAGES.numpy()})[0])


def test_tensors_beside_the_file_are_read(split: Path) -> None:
    one = (split.parents[1] / "one.onnx").read_bytes()
    assert len(split.read_bytes()) < len(one)
    np.testing.assert_array_equal(answers(content_of(split)), answers(one))


@pytest.mark.bad_input("an ONNX file whose tensors cannot be read")
@pytest.mark.parametrize("fault", ["missing", "outside", "linked", "short"])
def test_files_elsewhere_are_not_read(split: Path, fault: str) -> None:
    weights = split.parent / "weights.bin"
    if fault == "short":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        weights.rename(split.parents[1] / "weights.bin")
    if fault == "linked":
        weights.symlink_to(split.parents[1] / "weights.bin")
    if fault == "outside":
        model = onnx.load(split, load_external_data=False)
        for tensor in model.graph.initializer:
            tensor.external_data[0].value = "../weights.bin"
        split.write_bytes(model.SerializeToString())
    with pytest.raises(MeasurementError, match="cannot be read"):
        content_of(split)


@pytest.mark.bad_input("an ONNX file that is too large with its tensors")
def test_what_is_too_large_for_one_file_is_refused(
    split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "MAX_ONNX_BYTES", len(split.read_bytes()) + 10)
    with pytest.raises(MeasurementError, match=r"weights\.bin have 0\.0 GiB"):
        content_of(split)


def one_node(kind: str, domain: str, **attributes: Any) -> onnx.ModelProto:
    """A model of one node, of an image as it is."""
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node(kind, ["input"], ["output"], domain=domain, **attributes)
    graph = onnx.helper.make_graph(
        [node], "g", [value("input", 1, [1, 3, 8, 8])], [value("output", 1, [1, 3, 8, 8])]
    )
    domains = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(domain or "ai.x", 1)]
    return onnx.helper.make_model(graph, opset_imports=domains, ir_version=9)


@pytest.mark.bad_input("ONNX nodes that load a file, a library or Python")
@pytest.mark.parametrize(
    ("kind", "domain", "attributes"),
    [
        ("EPContext", "com.microsoft", {"embed_mode": 0, "ep_cache_context": "/tmp/x.engine"}),
        ("EPContext", "com.microsoft", {"embed_mode": 1, "ep_cache_context": b"\x7fELF"}),
        ("EPContext", "", {}),
        ("PythonOp", "com.microsoft", {"func_name": "os.system"}),
        ("ATen", "org.pytorch.aten", {"operator": "from_file"}),
        ("Conv", "ai.onnx.contrib", {}),
        ("Plugin", "/usr/lib/libx.so", {}),
        ("x\x1b[2J" * 100, "\x1b]0;x\x07" * 100, {}),
    ],
)
@pytest.mark.parametrize("where", ["graph", "branch", "function"])
def test_nodes_that_load_are_refused(
    kind: str, domain: str, attributes: dict[str, object], where: str, tmp_path: Path
) -> None:
    model = one_node(kind, domain, **attributes)
    (node,) = model.graph.node
    if where == "branch":
        outer = onnx.helper.make_node("If", ["input"], ["output"], then_branch=model.graph)
        outer.attribute[0].type = 0  # which onnx's own search goes by
        model.graph.node[0].CopyFrom(outer)
    if where == "function":
        model.functions.add(name="f", domain="own", node=[node])
        model.graph.node[0].CopyFrom(
            onnx.helper.make_node("f", ["input"], ["output"], domain="own")
        )
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        UnsupportedModelError, match=r"load another file|library of its own"
    ) as told:
        content_of(tmp_path / "m.onnx")
    assert len(str(told.value)) < 600


def test_operators_that_are_built_in_and_functions_of_the_file_are_read(tmp_path: Path) -> None:
    model = one_node("Gelu", "com.microsoft")
    model.functions.add(name="f", domain="own")
    model.graph.node.add(op_type="f", domain="own")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert content_of(tmp_path / "m.onnx") == model.SerializeToString()


@pytest.mark.bad_input("ONNX tensors in other files, where nobody looks for them")
@pytest.mark.parametrize("location", ["secret.bin", "../secret.bin", "/etc/passwd", "",
                                      "*/_ORT_MEM_ADDR_/*", "secret.bin\0"])  # fmt: skip
@pytest.mark.parametrize("where", ["initializer", "sparse", "attribute", "branch", "training"])
def test_no_tensor_is_left_in_another_file(where: str, location: str, tmp_path: Path) -> None:
    """ONNX Runtime gets the content alone, and would look in the current folder."""
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    model = one_node("Relu", "")
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[4], data_location="EXTERNAL")
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    graph = onnx.GraphProto(initializer=[tensor])
    if where == "initializer":
        model.graph.initializer.append(tensor)
    elif where == "sparse":
        model.graph.sparse_initializer.add(values=tensor, dims=[4])
    elif where == "attribute":
        model.graph.node[0].attribute.add(name="value", t=tensor)
    elif where == "branch":
        model.graph.node[0].attribute.add(name="body", g=graph)
    else:
        model.training_info.add(algorithm=graph)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    try:
        content = content_of(tmp_path / "m.onnx")
    except MeasurementError:
        return
    assert (location, b"external" in content) == ("secret.bin", False)
    assert not list(machine._tensors_elsewhere(onnx.load_from_string(content)))
