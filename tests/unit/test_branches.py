"""Residual branches: which there are, that leaving them out is right, and ONNX without them."""

import copy
import itertools

import pytest
import torch
import torchvision
from torch import Tensor, nn

from compressor.api import prune
from compressor.errors import GraphError, PlanError
from compressor.evaluate import check_agree
from compressor.export import candidate_writer
from compressor.graph import channel_groups, cost
from compressor.graph.branches import residual_branches, traced
from compressor.latency.onnxruntime import predictor
from compressor.prunable import MODULE, PROGRAM, TRACED, Prunable, make_prunable, with_branches
from compressor.surgery import groups_left, prune_with_nni, remove_branches
from compressor.values import Plan
from tests.conftest import randomised

IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """Sums of every spelling: in place, by a function, by a method, nested, with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one, self.two, self.three, self.four, self.five, self.inner = (
            nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
                          nn.Conv2d(8, 16, 1))
            for _ in range(6)
        )  # fmt: skip
        self.project = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        out = self.one(x)
        out += x  # the branch is written over
        x = out.relu()
        x = torch.add(x, self.two(x))
        x = x.add(self.three(x))
        x = self.project(x) + self.four(x)
        y = self.five(x)
        x = x + (y + self.inner(y))
        return self.head(x.mean(dim=(2, 3)))


NAMES = ["one", "two", "three", "four", "inner", "add_5"]  # the last: five, and inner in it


class NoBranch(nn.Module):
    """A sum of two inputs' own layers, a product, a scaled sum, and one that the output needs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        x = self.a(x) + self.b(z)  # not from one tensor
        x = x * self.c(x)
        return x + x


def prunable_of(net: nn.Module) -> Prunable:
    example = IMAGE[:1]
    return with_branches(make_prunable(net, example), example)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomised(Residual().eval())


def test_every_spelling_of_a_sum_is_found(net: nn.Module) -> None:
    prunable = prunable_of(net)
    assert prunable.form == TRACED
    names = [branch.name for branch in prunable.branches]
    assert names == NAMES
    groups = {branch.name: branch.groups for branch in prunable.branches}
    assert groups["one"] == ("one.0",)
    sizes = {branch.name: branch.macs for branch in prunable.branches}
    assert sizes["one"] == 16 * 16 * (16 * 8 * 9 + 8 * 16)


def test_every_set_of_branches_is_left_out_rightly(net: nn.Module) -> None:
    """Few and nearly all of them, in float64, beside the original whose sums see zeros."""
    prunable = prunable_of(net)
    module = copy.deepcopy(prunable.module).double()
    prunable = Prunable(module, prunable.groups, prunable.form, prunable.branches)
    free = [g for g in prunable.groups if not g.locked_because]
    kept = {g.name: tuple(range(0, g.n_channels, 2)) for g in free}
    names = [branch.name for branch in prunable.branches]
    for n in (0, 1, len(names) - 1, len(names)):
        for dropped in itertools.combinations(names, n):
            plan = Plan(kept if n % 2 else {}, dropped)
            with torch.no_grad():
                got = prunable.without(plan)(IMAGE.double())
            torch.testing.assert_close(got, prunable.masked(plan)(IMAGE.double()))


def test_what_is_left_out_is_gone(net: nn.Module) -> None:
    prunable = prunable_of(net)
    whole = prunable.without(Plan({}))
    (one,) = (b for b in prunable.branches if b.name == "one")
    left = prunable.without(Plan({}, ("one",)))
    assert cost(left, IMAGE[:1]).macs == cost(whole, IMAGE[:1]).macs - one.macs
    assert not any(name.startswith("one.") for name in left.state_dict())
    assert any(name.startswith("one.") for name in prunable.module.state_dict())


def test_sums_that_are_no_branches() -> None:
    net = NoBranch().eval()
    example = (torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8))
    network = traced(net)
    assert residual_branches(network, example, channel_groups(network, example)) == ()
    assert with_branches(make_prunable(net, example), example).form == MODULE


def test_positions_that_take_the_size_of_the_image_are_no_shortcut() -> None:
    """Without the patches nothing would be left that depends on the image."""

    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 5)
            self.positions = nn.Parameter(torch.randn(1, 16, 8))

        def forward(self, x: Tensor) -> Tensor:
            positions = self.positions.expand(x.shape[0], -1, -1)
            return self.head((self.patches(x).flatten(2).mT + positions).mean(1))

    network = traced(randomised(Embeds()))
    assert residual_branches(network, IMAGE, channel_groups(network, IMAGE)) == ()


def test_unknown_branches_are_named(net: nn.Module) -> None:
    with pytest.raises(PlanError, match=r"'oen'.*one"):
        prunable_of(net).without(Plan({}, ("oen",)))


def test_prune_leaves_branches_out_and_what_is_left_can_be_trained(net: nn.Module) -> None:
    before = copy.deepcopy(net.state_dict())
    for dropped in (("one",), ("two", "inner"), tuple(NAMES)):
        small = prune(net, IMAGE[:1], Plan({"three.0": (0, 2, 5)}, dropped))
        assert not any(name.startswith(f"{dropped[0]}.") for name in small.state_dict())
        plan = Plan({"three.0": (0, 2, 5)}, dropped)
        with torch.no_grad():
            torch.testing.assert_close(small(IMAGE), prunable_of(net).masked(plan)(IMAGE))
        small.train()(IMAGE.clone()).square().sum().backward()
        assert all(p.grad is not None for p in small.parameters())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(m.inplace for m in net.modules() if isinstance(m, nn.ReLU))


def test_prune_says_which_branches_there_are(net: nn.Module) -> None:
    with pytest.raises(PlanError, match=r"Unknown residual branch 'oen'.*Known: .*one.*two"):
        prune(net, IMAGE[:1], Plan({}, ("oen",)))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    with pytest.raises(PlanError, match="Plan leaves out one, but Sequential has no residual"):
        prune(plain, IMAGE[:1], Plan({}, ("one",)))


def test_code_that_cannot_be_traced_becomes_a_program() -> None:
    class Looping(Residual):
        def forward(self, x: Tensor) -> Tensor:
            assert all(size > 0 for size in x.shape)  # torch.fx cannot follow this
            return super().forward(x)

    torch.manual_seed(0)
    net = randomised(Looping().eval())
    with pytest.raises(GraphError, match=r"Looping cannot be traced by torch\.fx"):
        traced(net)
    prunable = prunable_of(net)
    assert prunable.form == PROGRAM
    assert {"one", "two", "three", "four"} <= {b.name for b in prunable.branches}
    plan = Plan({}, tuple(b.name for b in prunable.branches))
    with torch.no_grad():
        torch.testing.assert_close(
            prunable.without(plan)(IMAGE), prunable.masked(plan)(IMAGE), rtol=1e-4, atol=1e-5
        )


def test_a_trace_that_answers_otherwise_is_not_used() -> None:
    class Renamed(Residual):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 0.5
            z = y
            y += x  # torch.fx makes `y = y + x` of it, and leaves z as it was
            return super().forward(z)

    torch.manual_seed(0)
    net = randomised(Renamed().eval())
    prunable = prunable_of(net)
    assert prunable.form == PROGRAM
    with torch.no_grad():
        torch.testing.assert_close(prunable.module(IMAGE), net(IMAGE), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", [1, 2])
def test_onnx_from_the_template_answers_like_torch(net: nn.Module, step: int) -> None:
    prunable = prunable_of(net)
    free = [g for g in prunable.groups if not g.locked_because]
    kept = {g.name: tuple(range(0, g.n_channels, step)) for g in free}
    thin = prunable.without(Plan({g.name: (0,) for g in free}))
    write = candidate_writer(prunable.module, IMAGE, thin, branches=prunable.branches)
    assert write.__name__ == "fill"  # not one export a candidate
    names = [branch.name for branch in prunable.branches]
    for dropped in ((), names[:1], names[1::2], names):
        compact = prunable.without(Plan(kept, tuple(dropped)))
        answers = predictor(write(compact), n_threads=1)(IMAGE)
        with torch.no_grad():
            torch.testing.assert_close(answers, compact(IMAGE), rtol=1e-4, atol=1e-4)
    sizes = [len(write(prunable.without(Plan(kept, tuple(d))))) for d in ((), names)]
    assert sizes[1] < 0.5 * sizes[0]


def test_nni_prunes_what_is_left(net: nn.Module) -> None:
    prunable = prunable_of(net)
    free = [g for g in prunable.groups if not g.locked_because]
    plan = Plan({g.name: tuple(range(g.n_channels // 2)) for g in free}, ("two", "four"))
    dropped = [b for b in prunable.branches if b.name in plan.dropped]
    network = remove_branches(prunable.module, dropped)
    groups = groups_left(prunable.groups, dropped, network)
    inside = {name for branch in dropped for name in branch.groups}
    own = Plan({name: kept for name, kept in plan.kept.items() if name not in inside})
    by_nni = prune_with_nni(network, IMAGE[:1], groups, own)
    check_agree("NNI and own surgery", prunable.without(plan), by_nni, IMAGE)


@pytest.mark.parametrize(("name", "n"), [("resnet18", 8), ("mobilenet_v2", 10)])
def test_branches_of_known_networks(name: str, n: int) -> None:
    net = getattr(torchvision.models, name)(weights=None).eval()
    example = torch.randn(1, 3, 64, 64)
    network = traced(net)
    assert len(residual_branches(network, example, channel_groups(network, example))) == n
