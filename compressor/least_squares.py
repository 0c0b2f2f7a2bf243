"""Least squares: weights that answer with the channels left as the layer did with all of them.

[fan2022] Fan, Mu, Zhang, Bayesian Optimization with Clustering and Rollback for CNN Auto
    Pruning, ECCV 2022, and its released code; after [he2017] He, Zhang, Sun, Channel Pruning for
    Accelerating Very Deep Neural Networks, ICCV 2017.

A layer that reads fewer channels than before gets the weights W_S that minimise
|| X_S W_S' - X W' ||, with X what the layer read in the original network and W its weights. The
released code solves that from 30,000 rows of X for every candidate. But with G = X'X, gathered
once, the minimiser is W_S' = inv(G_SS) G_S: W', a small solve, and X is not needed any more.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.values import ChannelGroup, Example, Kept, Role, call
from compressor.watching import watched

N_POSITIONS = 10  # of every batch, the same ones for all its images, as in the released code
RIDGE = 1e-9  # of the mean diagonal; channels that are always 0 need some
MAX_FEATURES = 6000  # a Gram matrix of 288 MB; wider layers keep their weights
MAX_SOLVED_BYTES = 2**28


class LeastSquares:
    """What the layers of a network read, as Gram matrices, and what was solved with them.

    A search asks for the same inputs of the same layer again and again: the demo's 330 solves are
    85 different ones. What was solved last is kept, in `MAX_SOLVED_BYTES`.

    Attributes:
        grams: Module -> `(n_features, n_features)` float64; features are input channels times
            taps, as in the weight.
    """

    def __init__(self, grams: Mapping[str, Tensor], network: nn.Module) -> None:
        """Keeps the weights of `network` beside what they read.

        Args:
            grams: Of the layers of `network`.
            network: Its weights must not change.
        """
        self.grams = grams
        self._weights: dict[str, Tensor] = {}
        for name in grams:
            weight = network.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            self._weights[name] = weight.detach()
        self._answers: dict[str, Tensor] = {}  # (n_features, n_out), all inputs with the outputs
        self._solved: OrderedDict[tuple[str, bytes], Tensor] = OrderedDict()
        self._n_bytes = 0

    def repair(self, pruned: nn.Module, kept: Kept) -> None:
        """Refits the layers of `pruned` that read fewer channels, in place.

        Args:
            pruned: The network with fewer channels.
            kept: (tensor, dimension) -> which positions of the original's tensor are left.
        """
        left = dict(pruned.named_modules())
        for name in self.grams:
            layer, inputs = left.get(name), kept.get((f"{name}.weight", 1))
            if layer is None or inputs is None:
                continue
            weight = layer.weight
            assert isinstance(weight, Tensor)
            refitted, outputs = self._refitted(name, inputs), kept.get((f"{name}.weight", 0))
            rows = slice(None) if outputs is None else torch.from_numpy(outputs)
            with torch.no_grad():
                weight.copy_(refitted[rows].reshape(weight.shape))

    def _refitted(self, name: str, inputs: npt.NDArray[np.bool_]) -> Tensor:
        """`(n_out, n_kept)`: the weights of all outputs of a layer on the kept inputs."""
        key = name, inputs.tobytes()
        if key not in self._solved:
            gram, weight = self.grams[name], self._weights[name]
            if name not in self._answers:
                self._answers[name] = gram @ weight.flatten(1).double().T
            features = np.repeat(inputs, weight[0, 0].numel())
            columns = torch.from_numpy(np.flatnonzero(features))
            solved = refit(gram, self._answers[name], columns).to(weight.dtype)
            self._solved[key] = solved
            self._n_bytes += solved.nbytes
            while self._n_bytes > MAX_SOLVED_BYTES and len(self._solved) > 1:
                self._n_bytes -= self._solved.popitem(last=False)[1].nbytes
        self._solved.move_to_end(key)
        return self._solved[key]


def gather(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[Example],
    *,
    seed: int = 0,
) -> LeastSquares:
    """Runs `model` and gathers what its prunable convolutions and linear layers read.

    Grouped and transposed convolutions are left out, and layers wider than `MAX_FEATURES`.

    Args:
        model: In eval mode; not changed.
        groups: Its channel groups.
        batches: Inputs, as the model takes them.
        seed: Decides the positions.
    """
    generator = torch.Generator().manual_seed(seed)
    readers = {
        where.module
        for group in groups
        if group.locked_because is None
        for where in group.slices
        if where.role is Role.CONSUMER and where.tensor == "weight"
    }
    grams: dict[str, Tensor] = {}

    layers = {n: layer for n, layer in model.named_modules() if n in readers and _is_plain(layer)}

    def add(name: str, read: Tensor, _answer: Tensor) -> None:
        rows = sampled_rows(layers[name], read.detach(), generator)
        rows = rows.double()  # in float32 the weights differ by 1e-3
        gram = rows.T @ rows
        grams[name] = grams[name] + gram if name in grams else gram

    with watched(model, layers, add), torch.inference_mode():
        for batch in batches:
            call(model, batch)
    return LeastSquares(grams, model)


def sampled_rows(layer: nn.Module, read: Tensor, generator: torch.Generator) -> Tensor:
    """`(n_rows, n_features)`: what `layer` reads at some positions of its output."""
    if isinstance(layer, nn.Linear):
        return read.reshape(-1, read.shape[-1])
    assert isinstance(layer, nn.modules.conv._ConvNd)
    sides = [0] * 2 * len(layer.kernel_size)
    if not isinstance(layer.padding, str):
        sides = [side for pad in reversed(layer.padding) for side in (pad, pad)]
    elif layer.padding == "same":
        sides = list(layer._reversed_padding_repeated_twice)
    padded = F.pad(read, sides) if any(sides) else read
    places = zip(
        padded.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True
    )  # fmt: skip
    spans = [((size - d * (k - 1) - 1) // s + 1, s, d, k) for size, k, s, d in places]
    rows = []
    for _ in range(N_POSITIONS):
        patch = padded
        for dim, (n_out, stride, dilation, kernel) in enumerate(spans, start=2):
            at = stride * int(torch.randint(n_out, (1,), generator=generator))
            taps = torch.arange(at, at + dilation * (kernel - 1) + 1, dilation)
            patch = patch.index_select(dim, taps.to(patch.device))
        rows.append(patch.flatten(1))
    return torch.cat(rows)


def refit(gram: Tensor, answers: Tensor, keep: Tensor) -> Tensor:
    """`(n_out, n_kept)` float64: the least-squares weights on the features in `keep`.

    Args:
        gram: `(n_features, n_features)`, X'X.
        answers: `(n_features, n_out)`, X'Y with Y what the whole layer answers, without its bias.
        keep: `(n_kept,)` indices.
    """
    inner = gram[keep][:, keep]
    ridge = RIDGE * inner.diagonal().mean().clamp_min(1e-30)
    factor = torch.linalg.cholesky(inner + ridge * torch.eye(len(keep), dtype=inner.dtype))
    solved: Tensor = torch.cholesky_solve(answers[keep], factor).T
    return solved


def _is_plain(layer: nn.Module) -> bool:
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        is_plain = layer.groups == 1 and layer.padding_mode == "zeros"
        return is_plain and layer.weight[0].numel() <= MAX_FEATURES
    return isinstance(layer, nn.Linear) and layer.in_features <= MAX_FEATURES
