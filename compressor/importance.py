"""Strategies: a score for every channel of every group, the smaller the less it is missed.

A score is summed over all tensors that go with the channel, as far as the criterion looks at
them, so a group that a residual sum ties together is judged as a whole.

[li2017] Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, sec. 3.1.
[liu2017] Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV
    2017, sec. 3.
[molchanov2019] Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019,
    sec. 3.1.
[he2019] He et al., Filter Pruning via Geometric Median, CVPR 2019, sec. 3.3.
[yan2020] Yan et al., Channel Pruning via Multi-Criteria based on Weight Dependency,
    arXiv 2011.03240.
[fan2022] Fan, Mu, Zhang, Bayesian Optimization with Clustering and Rollback for CNN Auto
    Pruning, ECCV 2022: the L1 norm per *input* channel of the layer that reads it.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.plugins import IMPORTANCES
from compressor.values import BATCH_NORMS, ChannelGroup, ChannelSlice, Role

Scores = dict[str, Tensor]  # group name -> (n_channels,) float64, non-negative and finite
Losses = Callable[[nn.Module], Iterable[Tensor]]  # a network's loss on every batch of images


class Importance(Protocol):
    """One score per channel of every group."""

    def scores(
        self, model: nn.Module, groups: Sequence[ChannelGroup], losses: Losses | None
    ) -> Scores:
        """Group name -> `(group.n_channels,)` float64, non-negative and finite, on the CPU.

        Args:
            model: In eval mode; not changed.
            groups: From `channel_groups(model, ...)`.
            losses: For criteria that look at gradients; None where there are no images.

        Raises:
            ConfigError: The criterion needs losses and there are none.
        """


@dataclass(frozen=True)
class WeightNorm:
    """Sum of |w|^p over the weights that read a channel [fan2022, code].

    [li2017] sums over the filter that writes the channel instead. Where batch-norm follows, that
    filter can be scaled at will without changing the network, so its norm says little:
    `benchmarks/importance_side.py` has readers ahead of filters, and neither clearly ahead of
    chance once batch-norm is recalibrated.
    A group that nothing reads is ranked by its filters.

    Attributes:
        p: Order of the norm; 1 as in the papers.
    """

    p: int = 1

    def scores(
        self, model: nn.Module, groups: Sequence[ChannelGroup], losses: Losses | None
    ) -> Scores:
        """See `Importance`."""
        return {group.name: self._score(model, group) for group in groups}

    def _score(self, model: nn.Module, group: ChannelGroup) -> Tensor:
        roles = {s.role for s in group.slices}
        ranked_by = Role.CONSUMER if Role.CONSUMER in roles else Role.PRODUCER
        norms = [channel_norms(model, s, self.p) for s in group.slices if s.role is ranked_by]
        return torch.stack(norms).sum(dim=0)


@dataclass(frozen=True)
class GeometricMedian:
    """Distance of a channel's filters to all others: what others can stand in for goes first.

    [he2019, eq. 7] takes the filters of one layer; here the filters that all producers of a tied
    group write for the channel are one vector.
    """

    def scores(
        self, model: nn.Module, groups: Sequence[ChannelGroup], losses: Losses | None
    ) -> Scores:
        """See `Importance`."""
        scores = {}
        for group in groups:
            filters = [_rows(model, s) for s in group.slices if s.role is Role.PRODUCER]
            vectors = torch.cat(filters, dim=1)
            scores[group.name] = torch.cdist(vectors, vectors).sum(dim=1)
        return scores


@dataclass(frozen=True)
class BatchNormScale:
    """|gamma| of the batch-norms a channel passes through [liu2017], summed.

    A group without batch-norm, where every gamma would be 1, is ranked by `l1` instead; scores
    are compared within a group only.
    """

    def scores(
        self, model: nn.Module, groups: Sequence[ChannelGroup], losses: Losses | None
    ) -> Scores:
        """See `Importance`."""
        scores = {}
        for group in groups:
            scales = [
                channel_norms(model, s)
                for s in group.slices
                if s.tensor == "weight" and isinstance(model.get_submodule(s.module), BATCH_NORMS)
            ]
            if scales:
                scores[group.name] = torch.stack(scales).sum(dim=0)
            else:
                scores.update(WeightNorm().scores(model, [group], None))
        return scores


@dataclass(frozen=True)
class Taylor:
    """(sum of gradient times weight)^2 over what writes a channel [molchanov2019, eq. 8].

    The mean over batches of the squared first-order change of the loss if the channel's filters,
    biases and norm scales went. The paper uses one gate per batch-norm; the filters and biases
    here are the same quantity for layers without one.
    """

    def scores(
        self, model: nn.Module, groups: Sequence[ChannelGroup], losses: Losses | None
    ) -> Scores:
        """See `Importance`."""
        if losses is None:
            raise ConfigError("--importance taylor looks at gradients; give it labelled images.")
        student = copy.deepcopy(model).requires_grad_(True)
        totals: Scores = {g.name: torch.zeros(g.n_channels, dtype=torch.float64) for g in groups}
        with torch.enable_grad():
            for loss in losses(student):
                student.zero_grad()
                loss.backward()
                for group in groups:
                    totals[group.name] += self._change(student, group) ** 2
        return totals

    @staticmethod
    def _change(student: nn.Module, group: ChannelGroup) -> Tensor:
        """Of the loss, to first order, if each channel went."""
        change = torch.zeros(group.n_channels, dtype=torch.float64)
        for where in group.slices:
            value = _tensor(student, where)
            if where.role is not Role.CONSUMER and value.grad is not None:
                change += _sums(value.grad.double() * value.detach().double(), where)
        return change


@dataclass(frozen=True)
class WeightDependency:
    """Weights, computation and parameters that go with a channel, weighed globally [yan2020].

    The abstract names the criteria (weight value, computational cost, parameter quantity, each
    over the filter *and* the slice of the next layer's kernels that goes with it, globally
    normalised); the formula is ours, since the paper's could not be had:
    `w / max w - a * macs / max macs - b * params / max params`, `w` the mean |w| over all coupled
    weights, maxima over the network, plus `a + b` so that no score is negative.

    Attributes:
        macs_weight: `a`.
        params_weight: `b`.
    """

    macs_weight: float = 0.3
    params_weight: float = 0.3

    def scores(
        self, model: nn.Module, groups: Sequence[ChannelGroup], losses: Losses | None
    ) -> Scores:
        """See `Importance`."""
        weights = {}
        for group in groups:
            coupled = [s for s in group.slices if s.macs]
            n_numbers = sum(s.params for s in coupled)
            norms = [channel_norms(model, s) for s in coupled]
            weights[group.name] = torch.stack(norms).sum(dim=0) / n_numbers
        macs = {group.name: group.cost.macs / group.n_channels for group in groups}
        params = {group.name: group.cost.params / group.n_channels for group in groups}
        largest = max((float(w.max()) for w in weights.values()), default=0.0) or 1.0
        most_macs = max(macs.values(), default=0) or 1
        most_params = max(params.values(), default=0) or 1
        return {
            name: weights[name] / largest
            + self.macs_weight * (1 - macs[name] / most_macs)
            + self.params_weight * (1 - params[name] / most_params)
            for name in weights
        }


@dataclass(frozen=True)
class Random:
    """No criterion: what every other one must beat.

    Attributes:
        seed: Decides the scores, together with the group's name.
    """

    seed: int = 0

    def scores(
        self, model: nn.Module, groups: Sequence[ChannelGroup], losses: Losses | None
    ) -> Scores:
        """See `Importance`."""
        generator = torch.Generator().manual_seed(self.seed)
        return {
            group.name: torch.rand(group.n_channels, generator=generator, dtype=torch.float64)
            for group in groups
        }


def channel_norms(model: nn.Module, where: ChannelSlice, p: int = 1) -> Tensor:
    """`(n_channels,)` float64: sum of |w|^p over each channel's part of one tensor."""
    return _sums(_tensor(model, where).detach().cpu().double().abs().pow(p), where)


def _sums(values: Tensor, where: ChannelSlice) -> Tensor:
    """`(n_channels,)`: sum over each channel's part of a tensor like that of `where`."""
    rows = values.cpu().movedim(where.dim, 0).reshape(values.shape[where.dim], -1)
    return rows.sum(dim=1)[torch.from_numpy(where.index)].sum(dim=1)


def _rows(model: nn.Module, where: ChannelSlice) -> Tensor:
    """`(n_channels, n_numbers)` float64: each channel's part of one tensor."""
    values = _tensor(model, where).detach().cpu().double().movedim(where.dim, 0)
    return values[torch.from_numpy(where.index)].flatten(1)


def _tensor(model: nn.Module, where: ChannelSlice) -> Tensor:
    value = getattr(model.get_submodule(where.module), where.tensor)
    return value if isinstance(value, Tensor) else torch.zeros(int(value))


# By their names in `plugins.IMPORTANCES`.
L1, L2 = WeightNorm(p=1), WeightNorm(p=2)
GEOMETRIC_MEDIAN, BN_SCALE = GeometricMedian(), BatchNormScale()
TAYLOR, CPMC, RANDOM = Taylor(), WeightDependency(), Random()


def scores_by(
    name: str, model: nn.Module, groups: Sequence[ChannelGroup], losses: Losses | None
) -> dict[str, npt.NDArray[np.float64]]:
    """Group name -> `(n_channels,)` what the importance of that name says, checked.

    Args:
        name: In `plugins.IMPORTANCES`.
        model: In eval mode; not changed.
        groups: From `channel_groups(model, ...)`.
        losses: For criteria that look at gradients; None where there are no images.

    Raises:
        ConfigError: The criterion needs losses and there are none.
        PluginError: It is of a package that cannot be used, or gives no scores.
    """
    importance = cast(Importance, IMPORTANCES.load(name))
    with IMPORTANCES.running(name):
        found = importance.scores(model, groups, losses)
        return {group.name: _checked(found[group.name], group) for group in groups}


def _checked(scores: Tensor, group: ChannelGroup) -> npt.NDArray[np.float64]:
    array = np.asarray(scores.detach().cpu().double())
    if array.shape != (group.n_channels,):
        raise ValueError(f"{group.name} has {group.n_channels} channels, scores {array.shape}")
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError(f"the scores of {group.name} must be finite and not below 0")
    return array
