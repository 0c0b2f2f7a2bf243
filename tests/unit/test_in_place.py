"""Graphs in which nothing is written over answer as before, and learn where others cannot."""

import copy
import operator
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from compressor.api import prune
from compressor.errors import GraphError
from compressor.export import export_onnx
from compressor.graph.alike import answers_alike
from compressor.graph.branches import traced
from compressor.graph.in_place import functional, writing_nodes
from compressor.latency.onnxruntime import predictor
from compressor.program import export_program
from compressor.prunable import make_prunable, with_branches
from tests.conftest import randomised

Code = Callable[[Tensor], Tensor]
IMAGE = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def functions(x: Tensor) -> Tensor:
    y = x * 2
    F.relu(y, inplace=True)
    F.hardswish(y, True)
    torch.relu_(y)
    F.elu_(y)
    return F.leaky_relu(y, 0.1, True) + y


def methods(x: Tensor) -> Tensor:
    y, z = x * 2, x - 1
    y.add_(z).mul_(3).clamp_(-2, 2)
    z.sub_(y)
    z.copy_(y[:, :1])
    z[:, 2:].zero_()
    y.masked_fill_(y > 1, 0.5)
    return y + z


def operators(x: Tensor) -> Tensor:
    y = x + 1
    z = y
    y += x
    y -= 0.5
    y *= z
    y /= 3
    y **= 2
    return y + z


def slices(x: Tensor) -> Tensor:
    y = x + 1
    y[:, :3] *= 2
    y[:, 3:5] = y[:, 1:3]
    y[:, -2:] = 0.5
    y[0] = 1
    y[1, 2, -1, 1:4] = x[1, 0, 0, 1:4]
    y[..., 1:-1] += x[:, :1, :, 1:-1]
    y[:, 4:, 2:4, :] = x.sum(dim=0)[:1, :1, :1]
    return y * x


def strange_slices(x: Tensor) -> Tensor:
    y = x + 1
    y[:, ::2] = 3
    y[:, 1::3].mul_(2)
    y[y > 2] = -1
    y[:, [0, 2]] = x[:, [1, 3]]
    y[:, torch.tensor([1, 5])] *= 2
    y[None, 0, :, 0] = 0
    return y


def views(x: Tensor) -> Tensor:
    y = x + 1
    flat, turned = y.flatten(1), y.transpose(1, 3)
    y.view(-1, 4, 2, 36).mul_(2)
    turned.add_(1)
    flat[:, 7:20] *= 3
    y.permute(2, 0, 3, 1)[1:].sub_(x.permute(2, 0, 3, 1)[1:])
    y.narrow(1, 2, 3).relu_()
    y.select(1, 0).neg_()
    y.unsqueeze(1).squeeze(1).abs_()
    y.unflatten(1, (2, 4))[:, 1].mul_(0.5)
    return flat.sum(dim=1, keepdim=True) + turned.flatten(1) + y.flatten(1)


def parts(x: Tensor) -> Tensor:
    y = x * 1.5
    a, b = y.chunk(2, dim=1)
    c, d, _ = torch.split(y, [2, 5, 1], dim=1)
    a += b
    d.mul_(2)
    b -= c[:, :1]
    e, f = y.split(4, dim=1)[0], torch.unbind(y, dim=2)
    f[3].add_(1)
    f[-1].mul_(e[:, 1:2, 0])
    return torch.cat([a, b, c.sum(dim=1, keepdim=True), d], dim=1) + y.mean()


def parts_as_one(x: Tensor) -> Tensor:
    y = x * 1.5
    both = y.chunk(2, dim=1)
    y.mul_(2)
    both[0].add_(1)
    return torch.cat(both, dim=1) + torch.cat(y.chunk(2, dim=1), dim=1)


def an_older_view(x: Tensor) -> Tensor:
    y = x + 1
    before, copied = y[:, 2:6], y[:, 2:6].clone()
    y[:, :4].mul_(3)
    same = before
    same += 1
    y.relu_()
    return torch.cat([before - copied, y[:, 2:6], same], dim=1)


def its_own_input(x: Tensor) -> Tensor:
    x.sub_(0.4)
    x[:, :1] /= 0.2
    return x.relu()


def other_kinds(x: Tensor) -> Tensor:
    y = x.double()
    y += x
    z = x.mul(4).long()
    z += 1
    z[:, :2] = x[:, 2:4]
    half = x.half()
    half += x
    half[:, 1] = 2.5
    return y + z + half


def left_alone(x: Tensor) -> Tensor:
    """What is written through memory that hides from gradients, or twice over, stays."""
    y = x + 1
    y.detach().mul_(2)
    z = (x * 1)[:, :1].expand(-1, 8, 6, 6).clone()
    z.as_strided((4,), (2,)).add_(1)
    u = x * 3
    u.relu_()
    return y + z + u


def written_elsewhere(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    y = torch.add(x, 1, out=out)
    y *= 2
    drop = F.dropout(y, 0.5, training=False, inplace=True)
    drop += out
    return drop + y


CODES: list[Code] = [
    functions, methods, operators, slices, strange_slices, views, parts, parts_as_one,
    an_older_view, its_own_input, other_kinds, left_alone, written_elsewhere,
]  # fmt: skip
PARTLY: list[Code] = [left_alone]
# torch's functional form has no derivative for `aten::copy`.
WITHOUT_ORACLE: list[Code] = [methods, slices, views, its_own_input]


class Running(nn.Module):
    """Code in a network, between layers."""

    def __init__(self, code: Code) -> None:
        super().__init__()
        self.code = code
        self.first, self.last = nn.Conv2d(8, 8, 1), nn.Conv1d(1, 2, 1)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.relu(self.drop(x))
        y += 0.1
        x = self.code(x)  # what the modules wrote
        return self.last(x.flatten(1).unsqueeze(1).float() + y.mean())


def network_of(code: Code) -> nn.Module:
    torch.manual_seed(0)
    return Running(code).eval().requires_grad_(False)


def captured(net: nn.Module) -> fx.GraphModule:
    """In torch's own operations, with `+=` and `x[...] = y`, which torch.fx cannot follow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch._dynamo.export(net)(IMAGE).graph_module
    assert isinstance(found, fx.GraphModule)
    return found.eval()


FORMS: dict[str, Callable[[nn.Module], fx.GraphModule]] = {
    "captured": captured, "program": lambda net: export_program(net, IMAGE),
}  # fmt: skip


@cache
def graph_of(code: Code, form: str) -> fx.GraphModule:
    return FORMS[form](network_of(code))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("code", CODES, ids=lambda code: code.__name__)
def test_answers_are_the_same_and_nothing_is_written_over(code: Code, form: str) -> None:
    net = network_of(code)
    graph = graph_of(code, form)
    state, before = copy.deepcopy(graph.state_dict()), str(graph.code)
    made = functional(graph, IMAGE)
    left = writing_nodes(made, IMAGE)
    assert writing_nodes(graph, IMAGE)
    assert made is not graph
    assert not left or (code in PARTLY and len(left) < len(writing_nodes(graph, IMAGE)))
    for images in (IMAGE, IMAGE * 3 - 1):
        with torch.no_grad():
            want = net(images.clone())
            own = images.clone()
            torch.testing.assert_close(made(own), want, rtol=0, atol=1e-6)
        assert torch.equal(own, images)
    assert str(graph.code) == before  # the input is as it was
    assert all(torch.equal(state[key], value) for key, value in graph.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("code", [c for c in CODES if c not in PARTLY], ids=lambda c: c.__name__)
def test_gradients_are_those_of_torchs_own_functional_form(code: Code, form: str) -> None:
    net = network_of(code)
    made = functional(graph_of(code, form), IMAGE).requires_grad_(True)
    made(IMAGE.clone()).square().mean().backward()
    got = next(p.grad for p in made.parameters() if p.ndim == 4)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        run = torch.func.functionalize(lambda x: torch.func.functional_call(net, weights, (x,)))
        answer: Tensor = run(IMAGE.clone())
        return answer.square().mean()

    assert got is not None
    assert got.isfinite().all()
    if code in WITHOUT_ORACLE:
        return
    want = torch.func.grad(loss)(dict(net.named_parameters()))["first.weight"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_modules_are_switched_off_in_the_graph_alone() -> None:
    torch.manual_seed(0)
    relu = nn.ReLU(inplace=True)
    net = nn.Sequential(nn.Conv2d(8, 8, 1), relu, nn.Conv2d(8, 8, 1), relu, nn.Dropout(0.5, True))
    graph = traced(net.eval())
    made = functional(graph, IMAGE)
    assert [m.inplace for m in made.modules() if hasattr(m, "inplace")] == [False, False]
    assert relu.inplace
    assert made.get_submodule("0") is graph.get_submodule("0")
    assert torch.equal(made(IMAGE), net(IMAGE))


def test_a_network_that_writes_over_nothing_is_given_back() -> None:
    graph = traced(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten()).eval())
    assert functional(graph, IMAGE) is graph


def test_buffers_that_a_network_keeps_are_still_written() -> None:
    class Counting(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return (x * 1).relu_() + self.count

    made = functional(export_program(Counting().eval(), IMAGE), IMAGE)
    count = float(made.get_buffer("count"))
    made(IMAGE)
    assert float(made.get_buffer("count")) == count + 1
    assert len(writing_nodes(made, IMAGE)) == 1


def test_numbers_added_in_place_stay_numbers() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[1]
            n += 2
            return (x * n).relu_()

    made = functional(traced(Sizes().eval()), IMAGE)
    assert not writing_nodes(made, IMAGE)
    assert any(node.target is operator.add or node.target is operator.iadd
               for node in made.graph.nodes)  # fmt: skip


class Scaled(nn.Module):
    """Assigns into slices of channels that are pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 32, 3, 2, 1)
        self.last = nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x[:, :8] *= 2
        x[:, 20:24] = x[:, 4:8]
        x = self.second(torch.relu(x))
        x[:, 16:].relu_()
        return self.last(x.mean((2, 3)))


def test_a_pruned_program_with_slices_is_exported_rightly(tmp_path: Path) -> None:
    net = randomised(Scaled())
    small = prune(net, IMAGE[:1], 0.5)
    assert small.get_parameter("first.weight").shape[0] < 32
    file = export_onnx(small, IMAGE[:1], tmp_path / "small.onnx")
    with torch.no_grad():
        want = small(IMAGE[1:2])
    torch.testing.assert_close(predictor(file, n_threads=1)(IMAGE[1:2]), want)
    small.train()(IMAGE).sum().backward()


class Keeping(nn.Module):
    """Keeps what it sees, as `forward` of users do: in a buffer, an attribute, a list."""

    n_seen: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.register_buffer("n_seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(1, 8, 1, 1))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.n_seen += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3), keepdim=True)
        self.features = x
        self.seen.append(x)
        return self.second(x.relu())


def test_what_a_network_keeps_stays_as_it_was(tmp_path: Path) -> None:
    network, example = Keeping().eval(), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        network(example)
    before = copy.deepcopy(network.state_dict())
    prunable = with_branches(make_prunable(network, example), example)
    prune(network, example, 0.5)
    export_onnx(network, example, tmp_path / "net.onnx")
    assert {g.name for g in prunable.groups if g.locked_because is None} == {"first"}
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    assert all(type(each) is Tensor for each in (network.features, *network.seen))


def constants_of_odd_shapes(x: Tensor) -> Tensor:
    """A traced graph keeps these tensors: one grows, three are one number."""
    grown = torch.empty(0)
    torch.add(x, 1.0, out=grown)
    rows = torch.tensor([0]).expand(3)
    return torch.index_put(grown, (rows, rows + 1, rows + 2, rows), torch.ones(3), accumulate=True)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(constants_of_odd_shapes(self.first(x).relu()))


def test_constants_of_any_shape_are_no_hindrance(tmp_path: Path) -> None:
    network, example = Odd().eval(), torch.rand(1, 3, 8, 8)
    with_branches(make_prunable(network, example), example)
    file = export_onnx(network, example, tmp_path / "net.onnx")
    other = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(predictor(file)(other), network(other), rtol=0, atol=1e-4)


@pytest.mark.bad_input("lazy layers without weights")
def test_lazy_layers_without_weights_are_a_sentence() -> None:
    network = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d()).eval()
    with pytest.raises(GraphError, match=r"lazy layers whose weights do not exist yet; load"):
        make_prunable(network, torch.rand(1, 3, 8, 8))


def test_answers_that_are_not_numbers_are_compared() -> None:
    network = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()).eval()
    nn.init.constant_(network[0].bias, float("nan"))  # type: ignore[arg-type]
    assert answers_alike(network, copy.deepcopy(network), IMAGE)
    assert not answers_alike(network, nn.Identity(), IMAGE)
