"""Networks drawn at random: pruned == masked, in float64, whatever they are made of.

A network is a list of operations over the tensors that are there so far, each `(b, c, h, w)`. An
operation that does not fit what it would read is left out, so that any shorter list is a network
too, which is what Hypothesis needs to shrink a failure well.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.containers import tensors_in
from compressor.graph import channel_groups
from compressor.prunable import make_prunable
from compressor.surgery import masked, remove_channels
from compressor.values import ChannelGroup, Plan
from tests.conftest import randomised

WIDTHS = (4, 8, 2, 6, 3, 1, 12, 16)
IMAGE = (8, 6)
MAX_CHANNELS, MAX_PIXELS = 48, 200


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        kind: One of the keys of the tables below.
        back: Which tensors it reads, counted back from the newest that fits.
        k: A width, or the choice of a number of groups.
        v: Which variant.
    """

    kind: str
    back: tuple[int, int, int] = (0, 0, 0)
    k: int = 4
    v: int = 0


@dataclass(frozen=True)
class Network:
    """A stem, operations, and a head over what they leave.

    Attributes:
        ops: In order.
        n_inputs: Channels of the image.
        stem: Channels that it is made into.
        ending: What the head reads: the newest tensor, or all that nothing reads, one way or
            the other.
        is_flat: Whether the head reads pixels, or means over them.
        returned: "one" tensor, or a "tuple" or "dict" with a second head or an inner tensor.
    """

    ops: tuple[Op, ...]
    n_inputs: int = 1
    stem: int = 4
    ending: str = "newest"
    is_flat: bool = False
    returned: str = "one"


@dataclass(frozen=True)
class Site:
    """What an operation reads, `(b, c, h, w)`, and how it was drawn; see `Op`."""

    c: int
    h: int
    w: int
    k: int
    v: int

    def pick(self, *choices: Any) -> Any:
        return choices[self.v % len(choices)]

    @property
    def g(self) -> int:
        """A number of groups that the channels fall into."""
        return self.divisors[(self.k + self.v) % len(self.divisors)]

    @property
    def divisors(self) -> list[int]:
        return [d for d in range(1, self.c + 1) if self.c % d == 0]

    @property
    def cut(self) -> int:
        """A place between two channels."""
        require(self.c > 1)
        return 1 + self.k % (self.c - 1)


class UnfitError(ValueError):
    """The operation cannot read this tensor."""


def require(condition: bool) -> None:
    if not condition:
        raise UnfitError


class Step(nn.Module):
    """A function of tensors, and the layers and parameters that it uses."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *sources: Tensor) -> Tensor:
        return self.run(self, *sources)


Maker = Callable[[Site], nn.Module]


def plain(*functions: Callable[[Tensor], Tensor]) -> Maker:
    """Functions without layers, one a variant."""
    return lambda o: Function(o.pick(*functions))


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *sources: Tensor) -> Tensor:
        return self.function(*sources)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def last(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`layer` with the channels as the last dimension."""
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def shuffled(x: Tensor, g: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, g, c // g, h, w).transpose(1, 2).reshape(b, c, h, w)


def shuffle(o: Site) -> nn.Module:
    """By hand. In `c/g <= g` the wrong one of two sizes is taken for the width: a program's."""
    require(o.g * o.g < o.c)
    return Function(lambda x: shuffled(x, o.g))


def chunks(o: Site) -> nn.Module:
    n = 3 if o.v == 3 else 2
    require(o.c % n == 0)
    return Function(o.pick(
        lambda x: (lambda a, b: torch.cat([a * b.sigmoid(), b], 1))(*x.chunk(2, 1)),
        lambda x: (lambda a, b: torch.relu(a) + b)(*x.chunk(2, 1)),
        lambda x: F.glu(x, 1),
        lambda x: (lambda a, b, c: torch.cat([c, a, b + a], 1))(*x.chunk(3, 1)),
    ))  # fmt: skip


def tied(o: Site) -> nn.Module:
    """Two layers with one weight: convolutions, depthwise ones, one turned around."""
    groups = o.pick(1, o.c, o.g, 1)
    first = nn.Conv2d(o.c, o.k if o.v == 3 else o.c, 3, padding=1, groups=groups)
    second: nn.Module = nn.Conv2d(o.c, o.c, 3, padding=1, groups=groups)
    if o.v == 3:
        second = nn.ConvTranspose2d(o.k, o.c, 3, padding=1)
    second.weight = first.weight
    return Step(lambda s, x: s.second(torch.relu(s.first(x))), first=first, second=second)


def twice(o: Site) -> nn.Module:
    """One layer at two places."""
    again = o.pick(
        nn.Conv2d(o.c, o.c, 3, padding=1),
        nn.Conv2d(o.c, o.c, 3, padding=1, groups=o.g),
        nn.BatchNorm2d(o.c),
        nn.InstanceNorm2d(o.c),
    )
    return Step(lambda s, x: s.again(torch.relu(s.again(x))), again=again)


def squeeze_and_excite(o: Site) -> nn.Module:
    if o.v % 2:
        return Step(
            lambda s, x: x * s.up(torch.relu(s.down(x.mean((2, 3))))).sigmoid()[:, :, None, None],
            down=nn.Linear(o.c, o.k), up=nn.Linear(o.k, o.c),
        )  # fmt: skip
    return Step(
        lambda s, x: x * s.up(F.silu(s.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid(),
        down=nn.Conv2d(o.c, o.k, 1), up=nn.Conv2d(o.k, o.c, 1),
    )  # fmt: skip


def scale(o: Site) -> nn.Module:
    shape = o.pick((1, o.c, 1, 1), (o.c, 1, 1), (o.c,), (1, o.c, o.h, o.w))
    run = o.pick(
        lambda s, x: x * s.a + s.b,
        lambda s, x: x * s.a.sigmoid() - s.b,
        lambda s, x: x * s.a.view(1, -1, 1, 1) * (1 + s.b)[:, None, None],
        lambda s, x: x + s.a * s.b,
    )
    return Step(run, a=parameter(*shape), b=parameter(*shape))


def maxout(o: Site) -> nn.Module:
    require(o.c % 2 == 0)

    def run(x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, c // 2, 2, h, w).amax(2)

    return Function(run)


ACTIVATIONS = (
    nn.ReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.ReLU6,
    nn.Softplus, nn.Mish, nn.Hardsigmoid, nn.Softsign, nn.Identity, nn.Dropout, nn.LogSigmoid,
)  # fmt: skip

# Operations on one tensor that go on working when it gets narrower.
FOLLOWING: dict[str, Maker] = {
    "conv 1x1": lambda o: nn.Conv2d(o.c, o.k, 1, bias=o.pick(True, False), stride=1 + o.v // 2),
    "conv 3x3": lambda o: nn.Conv2d(
        o.c, o.k, 3, padding=1, bias=o.pick(True, False), stride=1 + o.v // 2
    ),
    "conv of few groups": lambda o: nn.Conv2d(
        o.c, o.divisors[min(len(o.divisors), 2) - 1] * o.k, 3, padding=1, bias=o.v < 2,
        groups=o.divisors[min(len(o.divisors), 2) - 1],
    ),
    "conv of some groups": lambda o: nn.Conv2d(
        o.c, o.g * (1 + o.v), 3, padding=1, bias=o.pick(True, False), groups=o.g
    ),
    "depthwise": lambda o: nn.Conv2d(
        o.c, o.c * o.pick(1, 2), 3, padding=1, groups=o.c, bias=o.v < 2
    ),
    "transposed": lambda o: nn.ConvTranspose2d(o.c, o.k, 2, stride=o.pick(1, 2), bias=o.v < 2),
    "transposed of some groups": lambda o: nn.ConvTranspose2d(
        o.c, o.g * (1 + o.v), 2, groups=o.g
    ),
    "transposed depthwise": lambda o: nn.ConvTranspose2d(o.c, o.c * o.pick(1, 2), 2, groups=o.c),
    "conv over pixels in a row": lambda o: Step(
        lambda s, x: s.conv(x.flatten(2)).view(x.shape[0], -1, *x.shape[2:]),
        conv=nn.Conv1d(o.c, o.k, 3, padding=1),
    ),
    "functional conv": lambda o: Step(
        lambda s, x: F.conv2d(x, s.conv.weight, None if o.v % 2 else s.conv.bias),
        conv=nn.Conv2d(o.c, o.k, 1),
    ),
    "weight as a matrix": lambda o: Step(
        lambda s, x: F.linear(s.conv(x).mean((2, 3)), s.conv.weight.flatten(1))[:, :, None, None],
        conv=nn.Conv2d(o.c, o.c, 1),
    ),
    "batch norm": lambda o: nn.BatchNorm2d(
        o.c, affine=o.pick(True, False), track_running_stats=o.v < 2
    ),
    "instance norm": lambda o: nn.InstanceNorm2d(
        o.c, affine=o.pick(False, True), track_running_stats=o.v > 1
    ),
    "group norm": lambda o: nn.GroupNorm(o.g, o.c, affine=o.v < 3),
    "prelu": lambda o: nn.PReLU(o.pick(o.c, 1)),
    "activation": lambda o: ACTIVATIONS[(4 * o.k + o.v) % len(ACTIVATIONS)](),
    "activation in place": plain(
        lambda x: F.relu(x.clone(), inplace=True),
        lambda x: F.hardswish(x.clone(), inplace=True),
        lambda x: x.clone().mul_(2).sigmoid_(),
        lambda x: F.leaky_relu(x.contiguous().clone(), inplace=True).add_(0.1),
    ),
    "conv, in place": lambda o: Step(
        lambda s, x: s.conv(x).relu_().add_(x).mul_(s.conv.bias.view(-1, 1, 1)),
        conv=nn.Conv2d(o.c, o.c, 3, padding=1),
    ),
    "changes what it reads": plain(
        lambda x: x.relu_(), lambda x: x.mul_(0.5), lambda x: x.tanh_(), lambda x: x.add_(1)
    ),
    "changes a part of what it reads": plain(
        lambda x: (x[:, :, :1].mul_(2), x)[1], lambda x: (x.chunk(2, 1)[0].relu_(), x)[1]
    ),
    "chunks": chunks,
    "shuffle": shuffle,
    "channel shuffle": lambda o: nn.ChannelShuffle(o.g),
    "pixel shuffle": lambda _: nn.PixelShuffle(2),
    "pixel unshuffle": lambda _: nn.PixelUnshuffle(2),
    "maxout": maxout,
    "max pool": lambda o: nn.MaxPool2d(o.pick(2, 3), stride=1 + o.v // 2, padding=o.v % 2),
    "avg pool": lambda o: nn.AvgPool2d(o.pick(2, 3), stride=1 + o.v // 2, padding=o.v % 2),
    "adaptive pool": lambda o: o.pick(
        nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(2), nn.AdaptiveAvgPool2d((3, 2)),
        nn.AdaptiveMaxPool2d(1),
    ),
    "interpolate": plain(
        lambda x: F.interpolate(x, scale_factor=2.0),
        lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
        lambda x: F.interpolate(x, size=(5, 4), mode="bicubic"),
        lambda x: F.interpolate(x, size=(4, 3), mode="area"),
    ),
    "pad": plain(
        lambda x: F.pad(x, (1, 0, 0, 2)),
        lambda x: F.pad(x, (0, 1, 1, 0), value=0.3),
        lambda x: F.pad(x, (1, 1), mode="reflect"),
        lambda x: F.pad(x, (1, 0, 2, 0), mode="replicate"),
    ),
    "crop": plain(
        lambda x: x[:, :, 1:, :-1], lambda x: x[..., ::2], lambda x: x[:, :, 1].unsqueeze(2)
    ),
    "moved in space": plain(
        lambda x: x.roll(1, 3), lambda x: x.flip(2), lambda x: x.transpose(2, 3),
        lambda x: x.cumsum(2),
    ),
    "reduced over space": plain(
        lambda x: x.mean((2, 3), keepdim=True), lambda x: x.sum((2, 3), keepdim=True),
        lambda x: x.mean(3, keepdim=True), lambda x: x.amax((2, 3))[:, :, None, None],
    ),
    "softmax over space": plain(lambda x: x.flatten(2).softmax(2).view_as(x)),
    "used twice": twice,
    "tied": tied,
    "linear on channels last": lambda o: Step(
        lambda s, x: last(s.linear, x), linear=nn.Linear(o.c, o.k, bias=o.pick(True, False))
    ),
    "inverted bottleneck": lambda o: Step(
        lambda s, x: x + last(lambda y: s.gamma * s.down(F.gelu(s.up(y))), x),
        up=nn.Linear(o.c, o.k), down=nn.Linear(o.k, o.c), gamma=parameter(o.c),
    ),
    "linear on tokens": lambda o: Step(
        lambda s, x: s.linear(x.flatten(2).transpose(1, 2)).mT.reshape(
            x.shape[0], -1, *x.shape[2:]
        ),
        linear=nn.Linear(o.c, o.k),
    ),
    "linear on a flatten": lambda o: Step(
        lambda s, x: s.linear(o.pick(x.flatten(1), x.reshape(len(x), -1)))[..., None, None],
        linear=nn.Linear(o.c * o.h * o.w, o.k),
    ),
    "linear on means": lambda o: Step(
        lambda s, x: s.linear(x.mean((2, 3)))[:, :, None, None], linear=nn.Linear(o.c, o.k)
    ),
    "squeeze and excite": squeeze_and_excite,
    "residual": lambda o: Step(
        lambda s, x: x + s.conv(torch.relu(x)), conv=nn.Conv2d(o.c, o.c, 3, padding=1)
    ),
    "residual bottleneck": lambda o: Step(
        lambda s, x: s.up(torch.relu(s.norm(s.down(x)))) + x,
        down=nn.Conv2d(o.c, o.k, 1), norm=nn.BatchNorm2d(o.k), up=nn.Conv2d(o.k, o.c, 1),
    ),
    "dense": lambda o: Step(
        lambda s, x: torch.cat([x, s.conv(x)], 1), conv=nn.Conv2d(o.c, o.k, 3, padding=1)
    ),
    "scale": scale,
    "sum over channels": plain(
        lambda x: x * x.sum(1, keepdim=True).sigmoid(),
        lambda x: torch.tanh(x.sum(1)).unsqueeze(1),
    ),
    "spatial gate": lambda o: Step(
        lambda s, x: x * s.gate(x).sigmoid(), gate=nn.Conv2d(o.c, 1, 1)
    ),
    "expand": plain(
        lambda x: x - x.mean((2, 3), keepdim=True).expand_as(x),
        lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, *x.shape[2:]).contiguous(),
    ),
    "repeat": plain(lambda x: x.repeat(1, 2, 1, 1), lambda x: x.repeat(1, 1, 2, 1)),
    "stack": plain(
        lambda x: torch.stack([x, x.relu()], 1).sum(1),
        lambda x: torch.stack([x, x.relu()], 2).flatten(1, 2),
        lambda x: torch.stack([x, x.relu()], -1).mean(-1),
    ),
    "learned map": lambda o: Step(
        lambda s, x: torch.cat([x, s.map.expand(len(x), -1, -1, -1)], 1),
        map=parameter(1, 2, o.h, o.w),
    ),
    "where": plain(lambda x: torch.where(x > 0, x, 0.1 * x), lambda x: x.clamp(-1, 1)),
    "left unread": lambda o: Step(
        lambda s, x: (s.conv(x), x.clone())[1], conv=nn.Conv2d(o.c, o.k, 1)
    ),
}  # fmt: skip

# Operations that mix channels: whatever they read must lock.
MIXING: dict[str, Callable[[Site], Callable[[Any, Tensor], Tensor]]] = {
    "softmax": lambda o: lambda s, x: x.softmax(1),
    "layer norm": lambda o: lambda s, x: last(s.norm, x),
    "layer norm by hand": lambda o: lambda s, x: (x - x.mean(1, keepdim=True)) / (
        x.var(1, unbiased=False, keepdim=True) + 1
    ),
    "roll": lambda o: lambda s, x: x.roll(1, 1),
    "flip": lambda o: lambda s, x: x.flip(1),
    "mean over channels": lambda o: lambda s, x: x * x.mean(1, keepdim=True),
    "largest channel": lambda o: lambda s, x: x - x.amax(1, keepdim=True),
    "cumulative": lambda o: lambda s, x: x.cumsum(1),
    "unit length": lambda o: lambda s, x: F.normalize(x, dim=1),
    "every other": lambda o: lambda s, x: x[:, ::2],
    "turned around by index": lambda o: lambda s, x: x[:, torch.arange(o.c - 1, -1, -1)],
    "local response": lambda o: lambda s, x: F.local_response_norm(x, 3),
    "product of channels": lambda o: lambda s, x: torch.einsum("bchw,bdhw->bcd", x, x)[..., None],
    "plus a constant": lambda o: lambda s, x: x + torch.arange(o.c).view(-1, 1, 1) / o.c,
    "times a mean of weights": lambda o: lambda s, x: x * s.mark * s.mark.mean(),
    "group norm of one": lambda o: lambda s, x: F.group_norm(x, 1),
}  # fmt: skip

MIXED_LATER = "product of channels"  # keeps both sides apart, and locks only what it is read by

# Operations on two or three tensors.
JOINING: dict[str, Callable[..., Tensor]] = {
    "sum": lambda x, y, _: x + y,
    "sum in place": lambda x, y, _: x.clone().add_(y),
    "product": lambda x, y, _: x * torch.tanh(y),
    "gate": lambda x, y, _: y.sigmoid() * x,
    "larger": lambda x, y, _: torch.maximum(x, y),
    "where": lambda x, y, _: torch.where(x > 0, y, x),
    "concat": lambda x, y, _: torch.cat([x, y], 1),
    "concat of three": lambda x, y, z: torch.cat([y, x, z], 1),
}


def split_up(o: Site) -> nn.Module:
    n = o.cut
    return Function(o.pick(
        lambda x: (lambda a, b: torch.cat([b, a.relu()], 1))(*x.split([n, o.c - n], 1)),
        lambda x: (lambda a, b: torch.cat([b.sigmoid(), a], 1))(*x.tensor_split([n], 1)),
        lambda x: torch.cat(x.split(n, 1)[::-1], 1),
        lambda x: torch.cat(x.chunk(3, 1)[::-1], 1),
    ))  # fmt: skip


def half_by_slicing(o: Site) -> nn.Module:
    """Half of what is left are not the channels that are left of one half."""
    require(o.c > 1)
    return Function(o.pick(
        lambda x: x[:, : x.shape[1] // 2],
        lambda x: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2].relu()], 1),
    ))  # fmt: skip


def written(x: Tensor, n: int) -> Tensor:
    y = x.clone()
    y[:, :n] = y[:, :n].sigmoid()
    return y


# Operations on one tensor that have its number of channels written into them.
HARD_CODED: dict[str, Maker] = {
    "first channels": lambda o: Function(o.pick(
        lambda x: x[:, : o.cut], lambda x: x[:, o.cut :], lambda x: x[:, -o.cut :],
        lambda x: x.narrow(1, o.c - o.cut, o.cut),
    )),
    "split": split_up,
    "half by slicing": half_by_slicing,
    "zero channels": lambda o: Function(lambda x: F.pad(x, (0, 0, 0, 0, o.v, o.k))),
    "zero channels in a residual": lambda o: Step(
        lambda s, x: F.pad(x, (0, 0, 0, 0, o.v, o.k)) + s.conv(x),
        conv=nn.Conv2d(o.c, o.v + o.c + o.k, 1),
    ),
    "shuffle in numbers": lambda o: Function(o.pick(
        lambda x: x.view(-1, o.g, o.c // o.g, o.h, o.w).transpose(1, 2)
        .reshape(-1, o.c, o.h, o.w),
        lambda x: shuffled(x, o.g),
        lambda x: x.unflatten(1, (o.g, -1)).transpose(1, 2).flatten(1, 2),
    )),
    "flatten in numbers": lambda o: Step(
        lambda s, x: s.linear(x.reshape(-1, o.c * o.h * o.w)).view(-1, o.k, 1, 1),
        linear=nn.Linear(o.c * o.h * o.w, o.k),
    ),
    "gate in numbers": lambda o: Step(
        lambda s, x: x * s.linear(x.mean((2, 3))).view(-1, o.c, 1, 1).expand(-1, o.c, o.h, o.w),
        linear=nn.Linear(o.c, o.c),
    ),
    "written into a part": lambda o: Function(lambda x: written(x, o.cut)),
    "pixels as rows": lambda o: Step(
        lambda s, x: s.linear(x.reshape(-1, o.h * o.w, o.c)).view(-1, o.c, o.h, o.w),
        linear=nn.Linear(o.c, o.c),
    ),
}  # fmt: skip


def made(op: Op, shape: torch.Size) -> nn.Module:
    """The operation on a tensor of `shape`."""
    c, h, w = shape[1:]
    site = Site(c, h, w, k=op.k, v=op.v)
    if op.kind in MIXING:
        run = MIXING[op.kind](site)
        return Step(
            lambda s, x: run(s, x * s.mark),
            mark=parameter(1, site.c, 1, 1),
            norm=nn.LayerNorm(site.c),
        )
    return {**FOLLOWING, **HARD_CODED}[op.kind](site)


def partners(kind: str, pool: Sequence[Tensor], first: int) -> list[int]:
    """Tensors that may be read together with the first, newest first."""
    x = pool[first]
    is_concat = kind.startswith("concat")
    fitting = [
        i
        for i, y in enumerate(pool)
        if (is_concat and x.shape[2:] == y.shape[2:])
        or (not is_concat and all(n in (m, 1) for m, n in zip(x.shape, y.shape, strict=True)))
    ]
    return [i for i in reversed(fitting) if i != first] or [first]


class RandomNet(nn.Module):
    """The network of a description.

    Attributes:
        kinds: Of the operations that fitted.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.stem = nn.Conv2d(network.n_inputs, network.stem, 3, padding=1)
        self.steps = nn.ModuleList()
        self.reads: list[tuple[int, ...]] = []
        self.kinds: list[str] = []
        pool = self._pool(torch.rand(2, network.n_inputs, *IMAGE))
        for op in network.ops:
            self._add(op, pool)
        unread = set(range(1, len(pool))) - {i for reads in self.reads for i in reads}
        self.ends = sorted(unread) if network.ending != "newest" else [len(pool) - 1]
        if network.ending == "sum":
            self.ends = [i for i in self.ends if pool[i].shape[1] == pool[-1].shape[1]]
        self.head = nn.Linear(self._features(pool).shape[1], 3)
        self.second = nn.Linear(pool[self.ends[0]].shape[1], 2)

    def forward(self, x: Tensor) -> Any:
        pool = self._pool(x)
        for step, reads in zip(self.steps, self.reads, strict=True):
            pool.append(step(*(pool[i] for i in reads)))
        y = self.head(self._features(pool))
        inner = pool[self.ends[0]]
        if self.network.returned == "tuple":
            return y, self.second(inner.mean((2, 3)))
        return {"classes": y, "features": inner} if self.network.returned == "dict" else y

    def _pool(self, x: Tensor) -> list[Tensor]:
        return [x.clone(), self.stem(x)]

    def _features(self, pool: Sequence[Tensor]) -> Tensor:
        ends = [pool[i] for i in self.ends]
        if len(ends) > 1:
            ends = [F.adaptive_avg_pool2d(x, 2) for x in ends]
        x = torch.cat(ends, 1) if self.network.ending == "concat" else torch.stack(ends).sum(0)
        return x.flatten(1) if self.network.is_flat else x.mean((2, 3))

    def _add(self, op: Op, pool: list[Tensor]) -> None:
        """Appends the operation and what it returns, if it fits."""
        first = len(pool) - 1 - op.back[0] % len(pool)
        reads: tuple[int, ...] = (first,)
        if op.kind in JOINING:
            others = partners(op.kind, pool, first)
            reads = (first, *(others[i % len(others)] for i in op.back[1:]))
            step: nn.Module = Function(JOINING[op.kind])
        try:
            if op.kind not in JOINING:
                step = made(op, pool[first].shape)
            with torch.no_grad():
                out = copy.deepcopy(step).eval()(*(pool[i].clone() for i in reads))
        except (ValueError, RuntimeError, IndexError):
            return
        if out.shape[1] <= MAX_CHANNELS and 0 < out.shape[2:].numel() <= MAX_PIXELS:
            self.steps.append(step)
            self.reads.append(reads)
            self.kinds.append(op.kind)
            pool.append(out)


def drawn(*extra: str) -> st.SearchStrategy[Network]:
    """Networks; with one of the operations `extra` among theirs, if there are any."""
    kinds = (*FOLLOWING, *JOINING, *JOINING, *JOINING, *MIXING)

    def some(of: Sequence[str], at_least: int, at_most: int) -> st.SearchStrategy[list[Op]]:
        back = st.integers(0, 3)
        op = st.builds(
            Op, st.sampled_from(of), st.tuples(back, back, back), st.sampled_from(WIDTHS), back
        )
        return st.lists(op, min_size=at_least, max_size=at_most)

    parts = (some(kinds, 0, 4), some(extra, 1, 2), some(kinds, 0, 4))
    joined = st.tuples(*parts).map(lambda lists: [op for part in lists for op in part])
    ops = joined if extra else some(kinds, 1, 9)
    return st.builds(
        Network,
        ops.map(tuple),
        st.integers(1, 3),
        st.sampled_from(WIDTHS),
        st.sampled_from(("newest", "concat", "sum")),
        st.booleans(),
        st.sampled_from(("one", "one", "tuple", "dict")),
    )


def prepared(network: Network) -> RandomNet:
    """The network in float64, no two of its numbers alike, neither growing nor fading much."""
    net = RandomNet(network).double()
    randomised(net)
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            if tensor.ndim > 1 and name.endswith("weight"):
                tensor.mul_((12 / tensor[0].numel()) ** 0.5)
            elif not name.endswith("bias"):
                tensor.add_(1)
    return net


def plan_from(data: st.DataObject, groups: Sequence[ChannelGroup]) -> Plan:
    """Any kept channels of every free group, at least one of each."""
    kept = {}
    for group in groups:
        if group.locked_because is None:
            n = group.n_channels
            gone = data.draw(st.sets(st.integers(0, n - 1), max_size=n - 1), label=group.name)
            kept[group.name] = tuple(sorted(set(range(n)) - gone))
    return Plan(kept)


def cut(model: nn.Module, groups: Sequence[ChannelGroup], plan: Plan) -> dict[str, Tensor]:
    """The state_dict that the plan asks for, by the definition of a slice."""
    tensors = model.state_dict(keep_vars=True)
    gone: dict[tuple[int, int], set[int]] = {}
    for group in groups:
        removed = set(range(group.n_channels)) - set(plan.kept.get(group.name, ()))
        if group.locked_because is None:
            for where in group.slices:
                if where.key in tensors:
                    rows = where.index[sorted(removed)].ravel().tolist()
                    gone.setdefault((id(tensors[where.key]), where.dim), set()).update(rows)
    expected = {}
    for key, tensor in tensors.items():
        smaller = tensor.detach()
        for dim, size in enumerate(tensor.shape):
            stay = sorted(set(range(size)) - gone.get((id(tensor), dim), set()))
            smaller = smaller.index_select(dim, torch.tensor(stay, dtype=torch.long))
        expected[key] = smaller
    return expected


def check(
    model: nn.Module, groups: Sequence[ChannelGroup], plan: Plan, images: Tensor
) -> Counter[str]:
    """Prunes, compares; counts what was seen."""
    before, told = copy.deepcopy(model.state_dict()), repr(model)
    compact = remove_channels(model, groups, plan)
    with torch.no_grad():
        whole = list(tensors_in(model(images)))
        want = list(tensors_in(masked(model, groups, plan)(images)))
        got = list(tensors_in(compact(images)))
    for expected, pruned in zip(want, got, strict=True):
        assert expected.isfinite().all()
        atol = 1e-9 * (1 + float(expected.abs().max()))
        torch.testing.assert_close(pruned, expected, rtol=1e-7, atol=atol)
    assert repr(model) == told
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    after = compact.state_dict()
    for key, tensor in cut(model, groups, plan).items():
        assert tensor.numel() or not before[key].numel(), f"nothing is left of {key}"
        assert torch.equal(after[key], tensor), key
    is_cut = any(plan.width(g) < g.n_channels for g in groups)
    differs = any((a - b).abs().max() > 1e-9 for a, b in zip(whole, want, strict=True))
    assert is_cut or not differs
    is_free = any(g.locked_because is None and g.n_channels > 1 for g in groups)
    return Counter({"networks": 1, "free": is_free, "cut": is_cut, "seen": differs})


def images_for(network: Network, n: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(n, network.n_inputs, *IMAGE, generator=generator, dtype=torch.float64) - 0.5


def check_module(
    network: Network, plan_for: Callable[[Sequence[ChannelGroup]], Plan]
) -> Counter[str]:
    """The network as it is: what mixes channels locked them, and the rest can be pruned."""
    net, images = prepared(network), images_for(network)
    try:
        with torch.no_grad():
            net(images[:1])
    except ValueError:  # a norm over the single value of a channel: no network at all
        return Counter()
    groups = channel_groups(net, images[:1])
    for group in groups:
        is_mixed = any(where.tensor == "mark" for where in group.slices)
        if is_mixed and MIXED_LATER not in net.kinds:
            assert group.locked_because is not None, group
    return check(net, groups, plan_for(groups), images) + Counter(net.kinds)


def is_telling(tally: Counter[str]) -> bool:
    """Whether most networks could be pruned, and most of what was removed was seen to matter."""
    return tally["free"] > 0.6 * tally["networks"] and tally["seen"] > 0.5 * tally["cut"] > 0


@pytest.mark.parametrize(
    "n_examples", [60, pytest.param(1500, marks=(pytest.mark.slow, pytest.mark.timeout(3000)))]
)
def test_a_random_network_is_pruned_as_it_is_masked(n_examples: int) -> None:
    tally: Counter[str] = Counter()

    @settings(
        max_examples=n_examples,
        derandomize=n_examples < 100,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(network=drawn(), data=st.data())
    def draws(network: Network, data: st.DataObject) -> None:
        tally.update(check_module(network, lambda groups: plan_from(data, groups)))

    draws()
    assert is_telling(tally), tally


@pytest.mark.parametrize(
    "n_examples", [6, pytest.param(200, marks=(pytest.mark.slow, pytest.mark.timeout(3000)))]
)
def test_numbers_in_the_code_of_a_random_network_follow(n_examples: int) -> None:
    """As its program, where its code does not follow; whatever is free in it is right."""

    @settings(
        max_examples=n_examples,
        derandomize=n_examples < 100,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(network=drawn(*HARD_CODED), data=st.data())
    def draws(network: Network, data: st.DataObject) -> None:
        net, images = prepared(network), images_for(network)
        try:
            with torch.no_grad():
                net(images[:1])
        except ValueError:
            return
        prunable = make_prunable(net, images[:1])
        check(prunable.module, prunable.groups, plan_from(data, prunable.groups), images)

    draws()
