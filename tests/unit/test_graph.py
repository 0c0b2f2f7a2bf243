"""Channel groups: who is tied to whom, and what is locked."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from compressor.api import prune
from compressor.containers import tensors_in
from compressor.errors import GraphError
from compressor.graph import channel_groups, cost
from compressor.prunable import PROGRAM, disagreement, make_prunable
from compressor.surgery import masked, remove_channels
from compressor.values import ChannelGroup, Plan, Role
from tests.conftest import ConvNet, random_plan, randomised


def by_name(model: nn.Module, example: Tensor) -> dict[str, ChannelGroup]:
    return {group.name: group for group in channel_groups(model.eval(), example)}


def test_groups_of_the_conv_net(conv_net: ConvNet, example: Tensor) -> None:
    groups = by_name(conv_net, example)
    assert {name: g.n_channels for name, g in groups.items()} == {
        "stem": 32, "inner": 64, "last": 64, "hidden": 24, "head": 5,
    }  # fmt: skip
    assert groups["stem"].modules(Role.PRODUCER) == ("stem", "outer")  # tied by the sum
    assert groups["stem"].modules(Role.CONSUMER) == ("inner", "last")
    assert groups["inner"].modules(Role.PER_CHANNEL) == ("inner_norm", "depthwise")
    locked = {name for name, g in groups.items() if g.locked_because}
    assert locked == {"head"}
    assert groups["head"].locked_because == "its channels are the model's output"


def test_every_channel_lies_once_in_every_tensor(conv_net: ConvNet, example: Tensor) -> None:
    """The rows of an index are a partition of the tensor's dimension."""
    seen: dict[tuple[str, int], list[int]] = {}
    for group in channel_groups(conv_net, example):
        for where in group.slices:
            seen.setdefault((where.key, where.dim), []).extend(where.index.ravel().tolist())
    for (key, dim), positions in seen.items():
        size = conv_net.state_dict()[key].shape[dim]
        assert sorted(positions) == list(range(size)), key


def test_flatten_gives_every_channel_its_pixels(example: Tensor) -> None:
    group = by_name(ConvNet(use_flatten=True), example)["last"]
    (reader,) = [s for s in group.slices if s.role is Role.CONSUMER]
    assert reader.index.shape == (64, 4)
    assert reader.index[3].tolist() == [12, 13, 14, 15]


def pruned_equals_masked(model: nn.Module, *inputs: Tensor, seed: int = 0) -> dict[str, str]:
    """Prunes every free group at random and compares; group name -> why it is locked, or ''."""
    model = randomised(model.double().eval())
    example = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    groups = channel_groups(model, example)
    plan = random_plan(groups, np.random.default_rng(seed))
    before = copy.deepcopy(model.state_dict())
    compact = remove_channels(model, groups, plan)
    with torch.no_grad():
        whole, want = model(*example), masked(model, groups, plan)(*example)
        got = compact(*example)
    for expected, pruned in zip(tensors_in(want), tensors_in(got), strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(pruned, expected)
    if any(plan.width(g) < g.n_channels for g in groups):
        changes = zip(tensors_in(whole), tensors_in(want), strict=True)
        assert any((a - b).abs().max() > 1e-6 for a, b in changes)  # the oracle really cuts
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    return {group.name: group.locked_because or "" for group in groups}


Operation = Callable[["Around", Tensor], Tensor]


class Around(nn.Module):
    """conv, one operation on its 16 channels, conv, pooled linear head."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, operation: Operation, n_channels: int = 16, **layers: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.operation = operation
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.scale = nn.Parameter(torch.rand(1, 16, 1, 1))
        self.second = nn.Conv2d(n_channels, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.operation(self, self.first(x))).mean((2, 3)))


def shuffled(x: Tensor, n: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, n, c // n, h, w).transpose(1, 2).reshape(b, c, h, w)


def gate(net: Around, x: Tensor) -> Tensor:
    return x * torch.sigmoid(net.expand(torch.relu(net.squeeze(x.mean((2, 3), keepdim=True)))))


def chunked(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=1)
    return torch.cat([first * torch.sigmoid(second), second], 1)


def channels_last(net: Around, x: Tensor) -> Tensor:
    y = net.down(F.gelu(net.up(x.permute(0, 2, 3, 1))))
    return x + y.permute(0, 3, 1, 2)


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, 16, 1, 1))


def twice(net: Around, x: Tensor) -> Tensor:
    return net.again(torch.relu(net.again(torch.relu(x))))


FREE: dict[str, Around] = {
    "relu": Around(lambda _, x: F.relu(x)),
    "batch norm": Around(lambda net, x: net.norm(x), norm=nn.BatchNorm2d(16)),
    "batch norm without weights": Around(
        lambda net, x: net.norm(x), norm=nn.BatchNorm2d(16, affine=False)
    ),
    "instance norm": Around(lambda net, x: net.norm(x), norm=nn.InstanceNorm2d(16, affine=True)),
    "instance norm without weights": Around(
        lambda net, x: net.norm(x), norm=nn.InstanceNorm2d(16)
    ),
    "group norm": Around(lambda net, x: net.norm(x), norm=nn.GroupNorm(4, 16)),
    "prelu": Around(lambda net, x: net.act(x), act=nn.PReLU(16)),
    "depthwise": Around(lambda net, x: net.conv(x), conv=nn.Conv2d(16, 16, 3, groups=16)),
    "depthwise times two": Around(
        lambda net, x: net.conv(x), 32, conv=nn.Conv2d(16, 32, 3, groups=16)
    ),
    "many groups": Around(lambda net, x: net.conv(x), conv=nn.Conv2d(16, 16, 3, groups=8)),
    "few groups": Around(lambda net, x: net.conv(x), conv=nn.Conv2d(16, 16, 3, groups=2)),
    "grouped, shuffled, grouped": Around(
        lambda net, x: net.b(shuffled(net.a(x), 4)),
        a=nn.Conv2d(16, 16, 3, groups=4), b=nn.Conv2d(16, 16, 3, groups=4),
    ),
    "transposed": Around(lambda net, x: net.conv(x), 6, conv=nn.ConvTranspose2d(16, 6, 2)),
    "transposed in few groups": Around(
        lambda net, x: net.conv(x), 8, conv=nn.ConvTranspose2d(16, 8, 2, groups=2)
    ),
    "transposed depthwise": Around(
        lambda net, x: net.conv(x), conv=nn.ConvTranspose2d(16, 16, 2, groups=16)
    ),
    "learned scale": Around(lambda net, x: x * net.scale),
    "frozen norm by hand": Around(
        lambda net, x: (x - net.norm.running_mean.view(1, -1, 1, 1))
        * (net.norm.weight / (net.norm.running_var + 1e-5).sqrt()).reshape(1, -1, 1, 1),
        norm=nn.BatchNorm2d(16),
    ),
    "squeeze and excite": Around(
        gate, squeeze=nn.Conv2d(16, 4, 1), expand=nn.Conv2d(4, 16, 1)
    ),
    "spatial gate": Around(lambda net, x: x * net.gate(x).sigmoid(), gate=nn.Conv2d(16, 1, 1)),
    "sum over channels": Around(lambda _, x: x * x.sum(1, keepdim=True)),
    "chunks": Around(lambda _, x: chunked(x)),
    "glu": Around(lambda _, x: F.glu(x, 1), 8),
    "concat": Around(
        lambda net, x: torch.cat([x, net.side(x), x], 1), 40, side=nn.Conv2d(16, 8, 1)
    ),
    "shuffle": Around(lambda _, x: shuffled(x, 2)),
    "channel shuffle": Around(lambda net, x: net.mix(x), mix=nn.ChannelShuffle(4)),
    "pixel shuffle": Around(lambda _, x: F.pixel_shuffle(x, 2), 4),
    "pixel unshuffle": Around(lambda _, x: F.pixel_unshuffle(x, 2), 64),
    "pooling": Around(lambda _, x: F.max_pool2d(F.avg_pool2d(x, 2), 2, padding=1)),
    "interpolate": Around(lambda _, x: F.interpolate(x, scale_factor=2.0, mode="bilinear")),
    "pad": Around(lambda _, x: F.pad(F.pad(x, (1, 2)), (1, 1, 1, 1), mode="reflect")),
    "channels last": Around(channels_last, up=nn.Linear(16, 24), down=nn.Linear(24, 16)),
    "used twice": Around(twice, again=nn.Conv2d(16, 16, 3, padding=1)),
    "in place": Around(lambda _, x: x.add_(1.0).mul_(2.0).relu_()),
    "softmax over pixels": Around(lambda _, x: x * x.flatten(2).softmax(2).view_as(x)),
    "keyword": Around(lambda net, x: net.conv(input=x), conv=nn.Conv2d(16, 16, 1)),
    "functional": Around(
        lambda net, x: F.conv2d(x, net.conv.weight), conv=nn.Conv2d(16, 16, 1, bias=False)
    ),
    "expanded": Around(lambda _, x: x * x.mean((2, 3), keepdim=True).expand_as(x)),
    "unit length": Around(lambda _, x: F.normalize(x)),
    "unit length of all pixels": Around(lambda _, x: F.normalize(x.flatten(2), dim=2).view_as(x)),
    "a learned number for all": Around(
        lambda net, x: x * net.gate.weight.view(1, 1, 1, 1).expand_as(x),
        gate=nn.Conv2d(1, 1, 1, bias=False),
    ),
    "stacked": Around(lambda _, x: torch.stack([x, -x], 1).sum(1)),
    "repeated": Around(lambda _, x: x.repeat(1, 2, 1, 1), 32),
    "rows of a stacked parameter": Around(
        lambda net, x: net.both.weight[0] * x + net.both.weight[1], both=Stacked()
    ),
    "a constant": Around(lambda _, x: x * torch.tensor([2.0])),
    "median over pixels": Around(lambda _, x: x - x.flatten(2).median(2).values[:, :, None, None]),
    "third smallest": Around(lambda _, x: x - x.flatten(2).kthvalue(3, 2).values[..., None, None]),
    "windows": Around(lambda _, x: F.unfold(x, 3, padding=1).view(1, -1, 8, 8), 144),
    "windows and back": Around(
        lambda _, x: F.fold(F.unfold(x, 3, padding=1).relu(), (8, 8), 3, padding=1)
    ),
    "picked pixels": Around(
        lambda _, x: x.flatten(2).gather(2, x.flatten(2).argsort(2)[..., :16]).view(1, -1, 4, 4)
    ),
    "unpooled": Around(
        lambda _, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [2, 2])
    ),
    "fourier over space": Around(
        lambda _, x: torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=x.shape[-2:])
    ),
    "copied": Around(lambda _, x: torch.empty_like(x).copy_(x)),
}  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_operations_that_keep_channels_apart_are_free_and_right(name: str) -> None:
    reasons = pruned_equals_masked(copy.deepcopy(FREE[name]), torch.randn(1, 1, 8, 8))
    del reasons["head"]
    single = {"gate"} if name == "spatial gate" else set()
    assert {n for n, why in reasons.items() if why} == single


LOCKED: dict[str, tuple[Around, str, str]] = {
    "median of channels": (Around(lambda _, x: x * x.median(1, True).values), "first", "median"),
    "fourier over channels": (
        Around(lambda _, x: torch.fft.fft(x, dim=1).real), "first", "_fft_r2c"
    ),
    "picked channels": (
        Around(lambda _, x: x.gather(1, x.argsort(2).clamp(max=7))), "first", "gather"
    ),
    "picked by a constant": (
        Around(lambda _, x: x.gather(2, torch.zeros(1, 16, 4, 8, dtype=torch.long))),
        "first", "gather",
    ),
    "softmax": (Around(lambda _, x: torch.softmax(x, 1)), "first", "softmax"),
    "roll": (Around(lambda _, x: x + x.roll(1, 1)), "first", "roll"),
    "amax": (Around(lambda _, x: x * x.amax(1, keepdim=True)), "first", "amax"),
    "mean over channels": (Around(lambda _, x: x * x.mean(1, keepdim=True)), "first", "mean"),
    "layer norm": (
        Around(
            lambda net, x: net.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            norm=nn.LayerNorm(16),
        ),
        "first", "LayerNorm (norm)",
    ),
    "group norm of one group": (
        Around(lambda net, x: net.norm(x), norm=nn.GroupNorm(1, 16)), "first", "all channels",
    ),
    "single channel": (Around(lambda _, x: x * x[:, 3:4].sigmoid()), "first", "spreads it"),
    "picked": (Around(lambda _, x: x * x[:, 3].unsqueeze(1)), "first", "picks single channels"),
    "every other": (Around(lambda _, x: x[:, ::2], 8), "first", "every other"),
    "constant": (Around(lambda _, x: x * torch.ones(1, 16, 1, 1)), "first", "constant"),
    "product of two": (
        Around(lambda _, x: torch.einsum("bchw,bdhw->bcd", x, x).unsqueeze(3).mean(2, True) + x),
        "first", "mean",
    ),
    "read by hand": (
        Around(lambda net, x: net.second.weight.sum() * x), "first", "is used by sum",
    ),
    "index": (Around(lambda _, x: x[:, torch.arange(15, -1, -1)]), "first", "index"),
    "written into": (
        Around(lambda _, x: torch.zeros_like(x).index_copy_(1, torch.arange(16), x)),
        "first", "index_copy",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOCKED)
def test_other_operations_lock_with_their_name_and_place(name: str) -> None:
    model, group, reason = LOCKED[name]
    reasons = pruned_equals_masked(copy.deepcopy(model), torch.randn(1, 1, 8, 8))
    assert reason in reasons[group]
    assert "test_graph.py, line" in reasons[group]  # the user's own line
    assert "/" not in reasons[group].partition("(tests")[0]  # from the current folder


class Shared(nn.Module):
    """Three convolutions of which two have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.third.weight = self.second.weight
        self.head = nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.third(x))).mean((2, 3))


def test_a_shared_weight_is_pruned_once_and_stays_shared() -> None:
    assert pruned_equals_masked(Shared(), torch.randn(1, 1, 6, 6))["first"] == ""
    model = Shared().eval()
    groups = channel_groups(model, torch.randn(1, 1, 6, 6))
    compact = remove_channels(model, groups, Plan({"first": (0, 2)}))
    assert isinstance(compact, Shared)
    assert compact.third.weight is compact.second.weight
    assert compact.third.in_channels == compact.third.out_channels == 2


def test_a_computed_weight_locks_what_it_reads() -> None:
    for wrapped in (
        nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 1)),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(16, 16, 1)),
    ):
        model = Around(lambda net, x: net.conv(x), conv=wrapped)
        reasons = pruned_equals_masked(model, torch.randn(1, 1, 8, 8))
        assert "conv" in reasons["first"]


class Outputs(nn.Module):
    """Two inputs; a dict of a tuple and a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 8, 3)
        self.depth = nn.Conv2d(1, 8, 3)
        self.mix = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, image: Tensor, depth: Tensor) -> dict[str, object]:
        x = torch.relu(self.image(image) + self.depth(depth))
        y = self.mix(x)
        return {"classes": (self.head(y.mean((2, 3))),), "features": y}


def test_several_inputs_and_nested_outputs() -> None:
    image, depth = torch.randn(1, 3, 8, 8), torch.randn(1, 1, 8, 8)
    reasons = pruned_equals_masked(Outputs(), image, depth)
    assert reasons["image"] == ""
    assert reasons["mix"] == reasons["head"] == "its channels are the model's output"
    named = channel_groups(Outputs().eval(), {"image": image, "depth": depth})
    assert [g.name for g in named] == list(reasons)


def test_an_encoder_layer_loses_all_but_what_is_normalised() -> None:
    """Its own code has the number of heads written into it; its program is rewritten."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = randomised(nn.Sequential(layer, nn.Flatten(0, 1), nn.Linear(16, 4)))
    prunable = make_prunable(model, torch.randn(1, 5, 16))
    free = {g.name for g in prunable.groups if not g.locked_because}
    assert free == {"0.linear1", "0.self_attn", "0.self_attn#heads"}


class Branches(nn.Module):
    """Goes one way or the other by a value."""

    def __init__(self, *, early: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)
        self.other = nn.Conv2d(8, 8, 3)
        self.early = early

    def forward(self, x: Tensor) -> Tensor:
        if self.early and x.sum() > 0:
            x = -x
        x = self.second(torch.relu(self.first(x)))
        if x.sum() > 0:
            return x
        return self.other(x)


def test_code_that_looks_at_values_is_named() -> None:
    with pytest.raises(
        GraphError, match=r"Branches cannot be pruned.*test_graph\.py, line \d+.*freeze that part"
    ):
        channel_groups(Branches(early=True).eval(), torch.randn(1, 1, 8, 8))


def test_what_comes_before_such_code_is_still_free() -> None:
    groups = by_name(Branches(early=False), torch.randn(1, 1, 8, 8))
    assert groups["first"].locked_because is None
    assert "takes a Python value" in (groups["second"].locked_because or "")


def test_wrong_input_is_named(conv_net: ConvNet) -> None:
    with pytest.raises(GraphError, match=r"\(1, 3, 8, 8\) float32.*--input-shape"):
        channel_groups(conv_net, torch.randn(1, 3, 8, 8))
    with pytest.raises(GraphError, match=r"\(1, 1, 8, 8\) int64"):
        channel_groups(conv_net, torch.ones(1, 1, 8, 8, dtype=torch.int64))


def test_a_group_costs_what_goes_with_it() -> None:
    """By hand: a 1x1 convolution of 4 channels on 25 pixels, read by a 3x3 one on 9."""
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)).eval()
    group = channel_groups(net, torch.randn(1, 1, 5, 5))[0]
    assert group.cost.macs == 4 * 1 * 25 + 9 * 4 * 6 * 9
    assert group.cost.params == (4 + 4) + 2 * 4 + 9 * 4 * 6  # without running statistics


def test_training_mode_is_refused() -> None:
    """A forward pass would change the statistics of the caller's model."""
    model = ConvNet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GraphError, match=r"training mode; call \.eval\(\)"):
        channel_groups(model, torch.randn(1, 1, 8, 8))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_cost_has_the_closed_form() -> None:
    """k*k*Cin*Cout*H*W of a convolution and in*out of a linear layer, by hand."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    paper = cost(net, torch.randn(1, 3, 10, 10))
    assert paper.macs == 9 * 3 * 8 * 100 + 9 * 1 * 8 * 25 + 8 * 5
    assert paper.params == (9 * 3 * 8 + 8) + (9 * 8 + 8) + (8 * 5 + 5)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning"
)
@pytest.mark.bad_input("what is no plain network")
@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (nn.DataParallel, r"DataParallel stands around the network.*\.module"),
        (AveragedModel, r"AveragedModel stands around the network.*\.module"),
        (torch.compile, r"OptimizedModule stands around the network.*\._orig_mod"),
        (torch.jit.script, "TorchScript.*scripted or traced from"),
        (lambda net: torch.jit.trace(net, torch.rand(1, 3, 8, 8)), "TorchScript"),
    ],
)
def test_wrappers_and_scripts_are_refused_by_name(wrap: Any, says: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with pytest.raises(GraphError, match=says):
        channel_groups(wrap(net).eval(), torch.rand(1, 3, 8, 8))


@pytest.mark.bad_input("a network that needs more memory than there is")
def test_what_needs_too_much_memory_is_told_as_that() -> None:
    class Huge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.empty(10**15)

    with pytest.raises(GraphError, match="more memory than there is"):
        channel_groups(Huge().eval(), torch.rand(1, 3, 8, 8))


class Attention(nn.Module):
    """One block of attention over the pixels of a small image, with three heads."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.n_heads, self.scale = how, 3, 8**-0.5
        self.stem, self.norm = nn.Conv2d(3, 24, 4, 4), nn.LayerNorm(24)
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))
        self.all = nn.Linear(24, 72)
        self.out, self.head = nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        b, n, _ = x.shape
        if self.how == "one head":
            weights = (self.query(x) @ self.key(x).transpose(1, 2) * self.scale).softmax(-1)
            y = weights @ self.value(x)
        elif self.how in ("joined", "by width"):
            parts = self.all(x).reshape(b, n, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = parts.unbind(0)
            if self.how == "joined":
                y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v)
            y = y.transpose(1, 2).reshape(b, n, -1)
        else:
            layers = (self.query, self.key, self.value)
            q, k, v = (f(x).view(b, n, self.n_heads, -1).transpose(1, 2) for f in layers)
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
            y = y.transpose(1, 2).flatten(2)
        return self.head((x + self.out(y)).mean(1))


@pytest.mark.parametrize(
    ("how", "free"),
    [
        ("one head", {"query", "value"}),
        ("joined", {"all", "all#heads"}),
        ("fused", {"query", "query#heads", "value"}),
        ("by width", {"all", "all#heads"}),
    ],
)
def test_channels_that_meet_in_attention_go_together(how: str, free: set[str]) -> None:
    """Queries with keys, values with what reads them; and heads whole, across all three."""
    network, images = attention(how), torch.randn(1, 3, 16, 16)
    prunable = make_prunable(network, images)
    assert {g.name for g in prunable.groups if not g.locked_because} == free
    for seed in range(4):
        plan = random_plan(prunable.groups, np.random.default_rng(seed))
        assert disagreement(prunable, plan, images) is None


def attention(how: str) -> Attention:
    network = Attention(how)
    for name in ("query", "key", "value") if how in ("joined", "by width") else ("all",):
        delattr(network, name)
    randomised(network)
    return network


@pytest.mark.parametrize("how", ["joined", "fused", "by width"])
def test_a_head_that_is_gone_is_not_read(how: str) -> None:
    """By hand: the columns of the output layer that read the second head are zero."""
    network, images = attention(how), torch.randn(2, 3, 16, 16)
    name = "query#heads" if how == "fused" else "all#heads"
    pruned = prune(network, images[:1], Plan({name: (0, 2)}))
    assert pruned.get_submodule("out").weight.shape == (24, 16)
    with torch.no_grad():
        network.out.weight[:, 8:16] = 0
        torch.testing.assert_close(pruned(images), network(images))


class Tangled(Attention):
    """Attention in which heads meet: they are mixed, weighed against each other or given out."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.mix = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        b, n, _ = x.shape
        q, k, v = self.all(x).reshape(b, n, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        if self.how == "mixed":
            weights = self.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif self.how == "over heads":
            weights = weights.softmax(1)
        elif self.how == "biased":
            weights = weights + torch.arange(3.0, dtype=x.dtype).view(1, 3, 1, 1)
        y = self.out((weights @ v).transpose(1, 2).reshape(b, n, 24))
        x = self.head((x + y).mean(1))
        return (x, weights) if self.how == "returned" else x


@pytest.mark.parametrize("how", ["mixed", "over heads", "biased", "returned"])
def test_heads_that_meet_stay(how: str) -> None:
    network = Tangled(how)
    for name in ("query", "key", "value"):
        delattr(network, name)
    images = torch.randn(1, 3, 16, 16)
    prunable = make_prunable(randomised(network), images)
    free = {g.name for g in prunable.groups if not g.locked_because}
    assert free == {"all"}


@pytest.mark.parametrize("is_batch_first", [True, False])
def test_torchs_own_attention_loses_heads_and_channels(is_batch_first: bool) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Linear(5, 24), nn.LayerNorm(24)
            self.attention = nn.MultiheadAttention(24, 3, batch_first=is_batch_first)
            self.head = nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.norm(x)
            y = y if is_batch_first else y.transpose(0, 1)
            y, _ = self.attention(y, y, y, need_weights=False)
            return self.head((x + (y if is_batch_first else y.transpose(0, 1))).mean(1))

    network, tokens = randomised(Layer()), torch.randn(1, 7, 5)
    small = prune(network, tokens, 0.5)  # 1 head of 3, 4 of its 8 channels
    weights = small.get_submodule("attention").state_dict()
    assert weights["in_proj_weight"].shape == (12, 24)
    assert weights["out_proj.weight"].shape == (24, 4)


def test_attention_that_scales_by_its_width_is_a_program_with_a_number() -> None:
    network, images = attention("by width"), torch.randn(1, 3, 16, 16)
    (why,) = [g.locked_because for g in channel_groups(network, images) if g.name == "all"]
    assert why is not None
    assert "scales its answers by its width" in why
    prunable = make_prunable(network, images)  # which proves what it returns
    assert prunable.form == PROGRAM
    (group,) = [g for g in prunable.groups if g.name == "all"]
    assert group.locked_because is None
    assert group.n_channels == 8


class Context(nn.Module):
    """Global context: a sum over pixels, weighted by attention that is one map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.map = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 1, 1)
        self.second, self.head = nn.Conv2d(16, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        weights = self.map(y).flatten(2).softmax(2)
        context = y.flatten(2) @ weights.transpose(1, 2)
        return self.head(self.second(y + context.unsqueeze(3)).mean((2, 3)))


def test_a_product_that_does_not_sum_over_channels_keeps_them() -> None:
    reasons = pruned_equals_masked(Context(), torch.randn(1, 1, 8, 8))
    assert not reasons["first"]


class Correlated(nn.Module):
    """Siamese: two images meet channel by channel, in one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 12, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        one, other = (self.second(self.first(each).relu()).flatten(2) for each in (x, z))
        return one.transpose(1, 2) @ other


def test_two_images_meet_in_channels_that_go_together() -> None:
    reasons = pruned_equals_masked(Correlated(), torch.randn(1, 1, 9, 9), torch.randn(1, 1, 7, 7))
    assert reasons == {"first": "", "second": ""}
