"""torch == ONNX, and a filled template is the fresh export of the pruned network."""

import collections
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from compressor.containers import answers_in, tensors_in
from compressor.errors import ExportError, GraphError
from compressor.export import candidate_writer, export_onnx
from compressor.exporter import DEFAULT_OPSET
from compressor.graph import channel_groups
from compressor.surgery import remove_channels
from compressor.template import make_template
from compressor.values import Example
from tests.conftest import ConvNet, random_plan, randomised


def run(content: bytes, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


@pytest.mark.parametrize("seed", range(3))
def test_filled_template_is_the_pruned_network(
    conv_net: ConvNet, example: Tensor, seed: int, tmp_path: Path
) -> None:
    groups = channel_groups(conv_net, example)
    compact = remove_channels(conv_net, groups, random_plan(groups, np.random.default_rng(seed)))
    template = make_template(conv_net, example)
    fresh = export_onnx(compact, example, tmp_path / "fresh.onnx").read_bytes()
    with torch.no_grad():
        expected = compact(example)
    for content in (template.fill(compact), fresh):
        torch.testing.assert_close(run(content, example), expected, rtol=1e-4, atol=1e-4)


def test_optimised_template_and_export_run_the_same_kernels(
    conv_net: ConvNet, example: Tensor, tmp_path: Path
) -> None:
    """What ONNX Runtime makes of both: so a trial's latency is the delivered file's."""

    def optimised(content: bytes, name: str) -> list[str]:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / name)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(tmp_path / name).graph
        return [node.op_type for node in graph.node]

    template = optimised(make_template(conv_net, example).fill(conv_net), "template.onnx")
    fresh = export_onnx(conv_net, example, tmp_path / "fresh.onnx").read_bytes()
    assert template == optimised(fresh, "export.onnx")
    assert "BatchNormalization" not in template


def test_equal_tensors_keep_their_own_names(example: Tensor) -> None:
    """The exporter writes equal tensors once; batch-norms start equal, so a template must not."""
    net: nn.Module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    ).eval()
    template = make_template(net, example)
    parameters = {name for name in net.state_dict() if not name.endswith("num_batches_tracked")}
    assert set(template.names) == parameters
    changed = copy.deepcopy(net)
    changed.get_parameter("3.weight").data.fill_(3.0)
    with torch.no_grad():
        torch.testing.assert_close(run(template.fill(changed), example), changed(example))


def test_export_is_one_static_file_of_the_opset_asked_for(
    conv_net: ConvNet, example: Tensor, tmp_path: Path
) -> None:
    path = export_onnx(conv_net, example, tmp_path / "net.onnx")
    model = onnx.load(path, load_external_data=False)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert {e.domain: e.version for e in model.opset_import} == {"": DEFAULT_OPSET}
    shape = model.graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [1, 1, 8, 8]
    assert not any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)


def test_exporting_changes_nothing(conv_net: ConvNet, example: Tensor, tmp_path: Path) -> None:
    before = copy.deepcopy(conv_net.state_dict())
    export_onnx(conv_net, example, tmp_path / "net.onnx")
    make_template(conv_net, example).fill(conv_net)
    assert all(torch.equal(before[k], v) for k, v in conv_net.state_dict().items())
    assert not conv_net.training


class Inverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x)


def test_what_onnx_lacks_is_an_error_and_leaves_no_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match="Inverse cannot be exported to ONNX opset 13") as err:
        export_onnx(Inverse(), torch.eye(3)[None, None], tmp_path / "net.onnx", opset=13)
    assert not list(tmp_path.iterdir())
    assert len(str(err.value).splitlines()) == 1
    assert capfd.readouterr().out == ""  # the exporter prints its graph, which stdout is not for


class Grouped(nn.Module):
    """A grouped convolution that loses whole groups, and one that loses channels of each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3)
        self.many = nn.Conv2d(16, 16, 3, groups=8)
        self.few = nn.Conv2d(16, 8, 1, groups=2)
        self.up = nn.ConvTranspose2d(8, 8, 2, groups=8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.few(torch.relu(self.many(torch.relu(self.first(x))))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("seed", range(3))
def test_templates_follow_groups_byte_for_byte(example: Tensor, seed: int) -> None:
    """A filled template is, byte for byte, the template of the pruned network, filled."""
    model = randomised(Grouped())
    groups = channel_groups(model, example)
    pruned = remove_channels(model, groups, random_plan(groups, np.random.default_rng(seed)))
    filled = make_template(model, example).fill(pruned)
    assert filled == make_template(pruned, example).fill(pruned)
    with torch.no_grad():
        torch.testing.assert_close(run(filled, example), pruned(example), rtol=1e-4, atol=1e-4)
    writer = candidate_writer(model, example, pruned)
    assert writer(pruned) == filled


class Sizes(nn.Module):
    """Sizes of the graph that follow the widths: a template would keep the old ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3)
        self.norm = nn.GroupNorm(4, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)).mean((2, 3)))


class Computed(nn.Module):
    """A weight that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3)
        self.second = nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = nn.functional.conv2d(x, torch.tanh(self.second.weight) * 2)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("kind", [Sizes, Computed])
def test_where_a_template_would_be_wrong_candidates_are_exported(
    kind: type[nn.Module], example: Tensor
) -> None:
    model = randomised(kind())
    groups = channel_groups(model, example)
    for seed in range(2):
        pruned = remove_channels(model, groups, random_plan(groups, np.random.default_rng(seed)))
        content = candidate_writer(model, example, pruned)(pruned)
        with torch.no_grad():
            expected = pruned(example)
        torch.testing.assert_close(run(content, example), expected, rtol=1e-4, atol=1e-4)


class Two(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.relu(first) + second


def test_several_inputs_are_exported(tmp_path: Path) -> None:
    a, b = torch.randn(1, 3), torch.randn(1, 3)
    examples: list[Example] = [(a, b), {"first": a, "second": b}]
    for number, example in enumerate(examples):
        path = export_onnx(Two().eval(), example, tmp_path / f"{number}.onnx")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        (got,) = session.run(None, dict(zip(names, (a.numpy(), b.numpy()), strict=True)))
        torch.testing.assert_close(torch.from_numpy(got), torch.relu(a) + b)


class Assigns(nn.Module):
    """Writes into a part of a tensor, as the old exporter does not follow."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.how == "scaled":
            x[:, :4] *= 2
        elif self.how == "behind a view":
            torch.relu_(x).view(x.shape[0], 4, -1)[:, 0].sub_(0.5)
        elif self.how == "border":
            x[..., 0] = 0
        elif self.how == "random":
            x = x + torch.rand_like(x)
        elif self.how == "chosen":
            x = x * 2 if float(x.sum()) > -1e9 else x
        answer: torch.Tensor = self.last(x.relu().mean((2, 3)))
        return answer


# By the first exporter, and by the second; what is drawn at random, by neither.
FIRST, SECOND = ("plain", "scaled", "border", "chosen"), ("behind a view",)


@pytest.mark.parametrize("how", ["plain", "scaled", "behind a view", "border", "random", "chosen"])
def test_a_file_that_answers_otherwise_is_never_written(how: str, tmp_path: Path) -> None:
    """Right, or refused: the oracle is ONNX Runtime beside torch on other numbers."""
    torch.manual_seed(0)
    network, path = Assigns(how).eval(), tmp_path / "x.onnx"
    if how not in FIRST:
        with pytest.raises(ExportError, match="answers unlike it does in torch"):
            export_onnx(network, torch.zeros(1, 3, 6, 6), path, opset=13)
        assert not path.exists()
    if how not in FIRST + SECOND:
        return
    export_onnx(network, torch.zeros(1, 3, 6, 6), path)
    images = torch.rand(1, 3, 6, 6)
    (got,) = onnxruntime.InferenceSession(path).run(None, {"input": images.numpy()})
    with torch.no_grad():
        want = network(images.clone()).numpy()
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_file_is_compared_with_every_input_in_its_place(tmp_path: Path) -> None:
    class Both(nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> Any:
            return {"out": x * scale + shift, "shift": shift + 1}

    given = {"shift": torch.rand(2, 3), "x": torch.rand(2, 3), "scale": torch.rand(2, 3)}
    assert export_onnx(Both().eval(), given, tmp_path / "x.onnx").exists()


class Holding:
    def __init__(self, x: Tensor) -> None:
        self.twice, self.deep = 2 * x, {("a", 1): x + 1}


@pytest.mark.parametrize(
    "contain",
    [
        lambda x: {("p3", 1): x, ("p4", 2): x * 2}, lambda x: {0: x, 1: -x}, Holding,
        lambda x: collections.deque([x, (x, None)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("by_name", [False, True])
def test_answers_in_any_container_are_exported_in_their_order(
    contain: Callable[[Tensor], Any], by_name: bool, tmp_path: Path
) -> None:
    class Contains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, scale: Tensor) -> Any:
            return contain(self.conv(x) * scale)

    network = Contains().eval()
    x, scale = torch.rand(1, 3, 6, 6), torch.tensor(3.0)
    example: Example = {"scale": scale, "x": x} if by_name else (x, scale)
    path = export_onnx(network, example, tmp_path / "x.onnx")  # which compares
    session = onnxruntime.InferenceSession(path)
    names = [each.name for each in session.get_inputs()]
    got = session.run(None, dict(zip(names, (x.numpy(), scale.numpy()), strict=True)))
    with torch.no_grad():
        want = answers_in(network(x, scale))
    for one, other in zip(want, got, strict=True):
        np.testing.assert_allclose(one.numpy(), other, atol=1e-5)
    template = make_template(network, example)
    assert set(template.names) == {"conv.weight", "conv.bias"}


class Chooses(nn.Module):
    """Takes another way for the example (all equal numbers) than for other numbers."""

    def __init__(self, answer: Callable[[Tensor, bool], Any]) -> None:
        super().__init__()
        self.linear, self.answer = nn.Linear(4, 4), answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.linear(x.float()), bool((x == x.flatten()[0]).all()))


WRONG: dict[str, Callable[[Tensor, bool], Any]] = {
    "a score beside pixels": lambda y, is_example: torch.cat(
        [torch.full((1, 7), 1333.0), y[:, :1].sigmoid() if is_example else y[:, :1] * 0], 1
    ),
    "small numbers": lambda y, is_example: y * (1e-7 if is_example else 2e-7),
    "beside infinity": lambda y, is_example: torch.cat(
        [torch.full((1, 1), -torch.inf), y if is_example else 2 * y], 1
    ),
    "beside NaN": lambda y, is_example: (y if is_example else 2 * y, y * torch.nan),
    "infinity elsewhere": lambda y, is_example: y if is_example else y * torch.inf,
}


@pytest.mark.parametrize("name", WRONG)
def test_numbers_are_compared_one_by_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="answers unlike it does in torch"):
        export_onnx(Chooses(WRONG[name]).eval(), torch.zeros(1, 4), tmp_path / "x.onnx", opset=13)


def test_pixels_of_all_values_are_tried(tmp_path: Path) -> None:
    network = Chooses(lambda y, is_example: y if is_example else 2 * y).eval()
    with pytest.raises(ExportError, match="answers unlike"):
        export_onnx(network, torch.zeros(1, 4, dtype=torch.uint8), tmp_path / "x.onnx", opset=13)


class Takes(nn.Module):
    def __init__(self, use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear, self.use = nn.Linear(4, 3), use

    def forward(self, x: Any, y: Any = None) -> Tensor:
        return self.use(self.linear, x, y)


@pytest.mark.parametrize(
    ("use", "example"),
    [
        (lambda f, x, y: f(x), (torch.rand(1, 4), torch.rand(1, 4))),
        (lambda f, x, y: f(y), (torch.rand(1, 4), torch.rand(1, 4))),
        (lambda f, x, y: f(x[1]), ((torch.rand(1, 4), torch.rand(1, 4)),)),
        (lambda f, x, y: f(x) * y, (torch.rand(1, 4), 3)),
        (lambda f, x, y: f(x) * y, {"x": torch.rand(1, 4), "y": 2.5}),
        (lambda f, x, y: f(y["z"]) * x.sum(), (torch.rand(1, 4), {"z": torch.rand(1, 4)})),
        (lambda f, x, y: f(x), torch.rand(1, 4).requires_grad_()),
        (lambda f, x, y: f(x.mul_(2)), torch.rand(1, 4)),
        (lambda f, x, y: f(x).topk(2)[1], torch.zeros(1, 4)),
        (lambda f, x, y: torch.arange(3.0) * 2, torch.rand(1, 4)),
    ],
)  # fmt: skip
def test_every_way_to_give_inputs_is_written_and_compared(
    use: Callable[..., Tensor], example: Example, tmp_path: Path
) -> None:
    before = copy.deepcopy(example)
    assert export_onnx(Takes(use).eval(), example, tmp_path / "x.onnx").exists()
    for one, other in zip(tensors_in(before), tensors_in(example), strict=True):
        assert torch.equal(one, other)


def test_a_network_that_takes_no_other_numbers_is_compared_with_the_example(
    tmp_path: Path,
) -> None:
    def only_zeros_and_ones(f: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        if not bool(((y == 0) | (y == 1)).all()):
            raise ValueError("a mask has zeros and ones")
        answer: Tensor = f(x * y)
        return answer

    example = torch.rand(1, 4), torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    assert export_onnx(Takes(only_zeros_and_ones).eval(), example, tmp_path / "x.onnx").exists()


def test_ways_that_python_chooses_by_numbers_are_tried_more_than_once(tmp_path: Path) -> None:
    """The file has the example's way, of two that one drawn input does not tell apart."""

    class Turns(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, x: Tensor) -> Tensor:
            return x * (2 if float(x.sum()) * self.by % 2 < 1 else 3)

    for seed in range(20):
        example = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        with pytest.raises(ExportError, match=r"reads into Python \(test_export.py, line \d+\)"):
            export_onnx(Turns(7.0 + seed).eval(), example, tmp_path / "x.onnx", opset=13)


def test_halves_of_a_tensor_that_are_written_over_are_exported(tmp_path: Path) -> None:
    """Torch lets that be where no gradient is wanted, as in every forward pass of ours."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            one, other = x.chunk(2, 1)
            one += other
            return x

    network, x = Halves().eval(), torch.rand(1, 3, 6, 6)
    path = export_onnx(network, x, tmp_path / "x.onnx")
    (got,) = onnxruntime.InferenceSession(path).run(None, {"input": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(network(x).numpy(), got, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.bad_input("a tensor in another layout, returned")
def test_tensors_that_are_not_dense_are_refused() -> None:
    for tensor in (torch.eye(3).to_sparse(), torch.nested.nested_tensor([torch.zeros(2)])):
        with pytest.raises(GraphError, match="expected dense ones"):
            answers_in({"out": tensor})


@pytest.mark.bad_input("an example that is not the network's, or shows nothing", n=5)
def test_examples_that_show_nothing_are_refused(conv_net: ConvNet, tmp_path: Path) -> None:
    for example, says in (
        (torch.zeros(1, 8, 8), "does not take torch.float32"),
        ({"image": torch.zeros(1, 1, 8, 8)}, "unexpected keyword"),
        (np.zeros((1, 1, 8, 8), np.float32), "does not take a ndarray"),
        (torch.zeros(0, 1, 8, 8), "has no numbers, only torch.float32"),
        (torch.full((1, 1, 8, 8), torch.nan), "holds NaN"),
    ):
        with pytest.raises(ExportError, match=f"ConvNet cannot be exported: .*{says}"):
            export_onnx(conv_net, example, tmp_path / "x.onnx")  # type: ignore[arg-type]
        if "numbers" in says or "NaN" in says:
            with pytest.raises(GraphError, match=says):
                channel_groups(conv_net, example)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_traced_network_is_exported(conv_net: ConvNet, tmp_path: Path) -> None:
    """It has no signature that Python could read."""
    x = torch.rand(1, 1, 8, 8)
    traced = torch.jit.trace(conv_net, x)
    assert export_onnx(traced, x, tmp_path / "x.onnx").exists()  # which compares
