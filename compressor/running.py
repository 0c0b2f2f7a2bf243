"""How a network is run that is not ours: on tensors of its own, and in which mode while it learns.

`network.train()` would run what evaluation never runs: auxiliary heads, whose channels no pruning
has seen, or other outputs than the loss is made for. So a network stays in evaluation mode while
it learns, but for the parts whose training is what the mode is for: norms that look at the batch,
and what drops things at random. Those are put into training mode one by one, if evaluation runs
them.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.containers import map_tensors, tensors_in
from compressor.values import call

_TORCH, _HERE = str(Path(torch.__file__).parent), str(Path(__file__).parent)
# What drops parts of what it reads at random, by what its class is called: people copy these.
_DROPPING = ("drop", "stochasticdepth")
# Layers of torch that do the same in both modes. One that is no class of this list, but of one
# derived from it, may do otherwise.
_WITHOUT_MODE = frozenset({
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear, nn.Embedding, nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ChannelShuffle, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU,
    nn.CELU, nn.SELU, nn.GELU, nn.GLU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid, nn.Tanh,
    nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink,
    nn.Softplus, nn.Softsign, nn.Threshold, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin,
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict,
})  # fmt: skip


def cloned(value: Any) -> Any:
    """`value` with copies of its tensors: the network that gets them may write over them."""
    return map_tensors(torch.clone, value)


def in_training(network: nn.Module) -> list[str]:
    """Names of the modules that are in training mode and may do otherwise there; "" is `network`.

    A network may share a layer without a mode of its own, such as an activation, with another
    network, and that one may be in training mode.
    """
    return [
        name
        for name, module in network.named_modules()
        if module.training and not _is_without_mode(module)
    ]


def _is_without_mode(module: nn.Module) -> bool:
    has_hooks = bool(module._forward_pre_hooks or module._forward_hooks)  # as spectral_norm
    return type(module) in _WITHOUT_MODE and not has_hooks


@dataclass
class Read:
    """What a network read into Python of the numbers in tensors, in order.

    Attributes:
        values: As text; NaN is like itself there.
        place: Of the last one: " (FILE, line N)"; "" where it is not in a file of its own.
    """

    values: list[str] = field(default_factory=list)
    place: str = ""

    def add(self, value: object) -> None:
        """One more, read now."""
        own = [
            frame
            for frame in traceback.extract_stack()
            if not frame.filename.startswith((_TORCH, _HERE, "<"))
        ]
        self.values.append(repr(value))
        self.place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


@contextmanager
def reads() -> Iterator[Read]:
    """What is read into Python meanwhile: by `if`, `item()`, `int()`, `tolist()`, `equal()`."""
    read = Read()
    with _Lists(read), _Scalars(read):
        yield read


class _Scalars(TorchDispatchMode):
    def __init__(self, read: Read) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read = read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.read.add(found)
        return found


class _Lists(TorchFunctionMode):
    """`tolist` and `numpy` look at memory, past the dispatcher."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (Tensor.tolist, Tensor.numpy):
            self.read.add(args[0].tolist() if func is Tensor.numpy else found)
        return found


def is_norm(module: nn.Module) -> bool:
    """Whether a module keeps statistics of what it reads, and learns them in training mode.

    Batch-norm of every kind that is one of torch's (timm's with an activation, that of several
    processes), and instance norm that tracks statistics; not frozen ones, which are no such class.
    """
    if not isinstance(module, nn.modules.batchnorm._NormBase):
        return False
    return bool(module.track_running_stats and module.running_mean is not None)


def is_random(module: nn.Module) -> bool:
    """Whether a module drops parts at random in training mode, and that is all the mode changes.

    Known by its kind, or by its name where it has nothing of its own: no weights, no layers.
    """
    if isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU)):
        return True
    if isinstance(module, nn.MultiheadAttention):
        return float(module.dropout) > 0
    names = [kind.__name__.lower().replace("_", "") for kind in type(module).__mro__]
    has_own = any(True for _ in module.parameters()) or any(True for _ in module.children())
    return not has_own and any(part in name for name in names for part in _DROPPING)


def ran(network: nn.Module, example: Any) -> list[nn.Module]:
    """The modules of `network` that a forward pass runs, each once, in its order.

    Args:
        network: In evaluation mode; not changed.
        example: As the network takes it; not changed.
    """
    seen: dict[nn.Module, None] = {}

    def see(module: nn.Module, *_: Any) -> None:
        seen.setdefault(module)

    hooks = [module.register_forward_pre_hook(see) for module in network.modules()]
    try:
        with torch.no_grad(), unfused_attention():
            call(network, cloned(example))
    finally:
        for hook in hooks:
            hook.remove()
    return list(seen)


def learning(network: nn.Module, example: Any) -> list[nn.Module]:
    """The modules to put into training mode while `network` learns, one by one.

    A norm that its owner has frozen (nothing of it wants a gradient) is none of them. Recurrent
    layers are: they have no backward pass on a GPU otherwise, and the mode adds but dropout.

    Args:
        network: In evaluation mode; not changed.
        example: As the network takes it; not changed.
    """
    return [
        module
        for module in ran(network, example)
        if (is_norm(module) and not is_frozen(module))
        or is_random(module)
        or isinstance(module, nn.RNNBase)
    ]


def work_on_copies(network: nn.Module, example: Any) -> None:
    """Switches `inplace` of the modules of `network` off, where its answers stay the same.

    What writes over a tensor may write over what the backward pass needs.
    """
    found = [m for m in network.modules() if getattr(m, "inplace", None) is True]
    with torch.no_grad():
        before = list(tensors_in(call(network, cloned(example)))) if found else []
        _set_inplace(found, False)
        after = list(tensors_in(call(network, cloned(example)))) if found else []
    if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        _set_inplace(found, True)


def _set_inplace(modules: list[nn.Module], value: bool) -> None:
    for module in modules:
        module.inplace = value  # type: ignore[assignment]


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters, and none that wants a gradient."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def frozen_norms(network: nn.Module) -> list[nn.Module]:
    """Norms that are frozen in a network that is not frozen as a whole."""
    if not any(p.requires_grad for p in network.parameters()):
        return []
    return [module for module in network.modules() if is_norm(module) and is_frozen(module)]


@contextmanager
def buffers_kept(network: nn.Module) -> Iterator[None]:
    """What a network counts or keeps in its buffers while it runs is afterwards as before.

    An fx graph keeps tensors that its network makes anew at every call. Those can be of any shape,
    or look at one number several times, and are written to again only where they have changed.
    """
    before = [
        (module, name, buffer, buffer.clone())
        for module in network.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in before:
            module._buffers[name] = buffer
            if buffer.shape != value.shape:
                buffer.data = value
            elif not torch.equal(buffer, value):
                buffer.copy_(value)


@contextmanager
def in_small_steps(network: nn.Module) -> Iterator[None]:
    """Fused attention and LSTM layers of `network` run as the operations they are made of.

    oneDNN has one operation for a layer of an LSTM, in float32 and not in float64.
    """
    has_lstm = any(isinstance(module, nn.LSTM) for module in network.modules()) or (
        isinstance(network, fx.GraphModule)
        and any(n.target is torch.ops.aten.lstm.input for n in network.graph.nodes)
    )
    was_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(was_enabled and not has_lstm)
    try:
        with unfused_attention():
            yield
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)


@contextmanager
def unfused_attention() -> Iterator[None]:
    """nn.TransformerEncoderLayer runs its parts one by one meanwhile, not as one operation."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)
