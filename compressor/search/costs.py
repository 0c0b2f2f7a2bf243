"""What plans cost: on paper exactly, and in time by a table that is fitted to measured plans.

The table is additive: so many milliseconds a layer, times the share of the layer that is left.
It is not made by timing layers one by one, which counts what a runtime only does at a graph's
ends, but by regression on whole networks: a few designed plans before the search, and every trial
after. Equal layers share most of their uncertainty, so that a few measurements tell a lot.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from compressor.search.space import SearchSpace, Widths
from compressor.values import LayerCost

FloatArray = npt.NDArray[np.float64]

# Prior of the table: time goes with MACs but for a tenth, and each of these may be off by so much.
FIXED_SHARE = 0.1
ALIKE_ERROR, OWN_ERROR, WRITING_ERROR = 0.7, 0.2, 0.3


class Costs:
    """Multiply-accumulates and parameters of the plans of a space.

    Legend: `p` plans, `l` layers (parameter tensors), `v` variables.
    """

    def __init__(self, space: SearchSpace, layers: Sequence[LayerCost]) -> None:
        self.space = space
        self.layers = layers
        self.macs_of_layers = np.array([layer.macs for layer in layers], dtype=np.float64)
        self.params_of_layers = np.array([layer.params for layer in layers], dtype=np.float64)
        column = {group.name: i for i, group in enumerate(space.groups)}
        n_dims = max((len(layer.shares) for layer in layers), default=0)
        n_groups = len(space.groups)
        self._linear = np.zeros((n_dims, len(layers), n_groups))
        self._constant = np.ones((n_dims, len(layers)))
        self._branches = np.zeros((len(space.branches), len(layers)), dtype=np.bool_)
        for at, layer in enumerate(layers):
            for dim, shares in enumerate(layer.shares):
                for name, share in shares.items():
                    if name in column:
                        self._linear[dim, at, column[name]] += share
                        self._constant[dim, at] -= share
            module = layer.name.rpartition(".")[0]
            for b, branch in enumerate(space.branches):
                self._branches[b, at] = any(
                    f"{module}.".startswith(f"{m}.") for m in branch.modules
                )

    def layers_left(self, plans: Sequence[Widths]) -> FloatArray:
        """`(p, l)`: share of every layer that is left."""
        n_groups = len(self.space.groups)
        ratios = self.space.ratios(plans)
        left = np.ones((len(ratios), len(self.layers)))
        for linear, constant in zip(self._linear, self._constant, strict=True):
            left *= constant + ratios[:, :n_groups] @ linear.T
        return left * self._kept(ratios)

    def writing_left(self, plans: Sequence[Widths]) -> FloatArray:
        """`(p, l)`: share of what every layer writes that is left."""
        n_groups = len(self.space.groups)
        ratios = self.space.ratios(plans)
        if not len(self._linear):
            return self._kept(ratios)
        written = self._constant[0] + ratios[:, :n_groups] @ self._linear[0].T
        return np.asarray(written * self._kept(ratios))

    def _kept(self, ratios: FloatArray) -> FloatArray:
        dropped = ratios[:, len(self.space.groups) :] == 0
        return np.asarray(1.0 - (dropped.astype(np.float64) @ self._branches > 0))

    def macs(self, plans: Sequence[Widths]) -> FloatArray:
        """`(p,)`: multiply-accumulates as a share of the original's."""
        return _share(self.layers_left(plans), self.macs_of_layers)

    def params(self, plans: Sequence[Widths]) -> FloatArray:
        """`(p,)`: parameters as a share of the original's."""
        return _share(self.layers_left(plans), self.params_of_layers)


def _share(left: FloatArray, of_layers: FloatArray) -> FloatArray:
    total = of_layers.sum()
    return left @ of_layers / total if total else np.ones(len(left))


class LatencyTable:
    """Bayesian linear regression of time on what is left of the layers.

    Attributes:
        share_of_layers: `(l,)` share of the original's time that each layer takes.
    """

    def __init__(
        self,
        costs: Costs,
        plans: Sequence[Widths],
        times: FloatArray,
        errors: FloatArray,
    ) -> None:
        """Fits the table.

        Args:
            costs: Of the space.
            plans: Measured ones; the original needs not be among them.
            times: `(p,)` their time as a share of the original's.
            errors: `(p,)` standard errors of the logarithms of `times`.
        """
        self._costs = costs
        busy = costs.macs_of_layers > 0
        self._busy = busy
        macs = costs.macs_of_layers[busy] / max(costs.macs_of_layers.sum(), 1)
        mean = np.concatenate([[FIXED_SHARE], (1 - FIXED_SHARE) * macs, np.zeros(busy.sum())])
        layers = [layer for layer, is_busy in zip(costs.layers, busy, strict=True) if is_busy]
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, layer in enumerate(layers):
            alike[layer.macs, layer.params].append(i)
        scale = (1 - FIXED_SHARE) * macs
        n = len(layers)
        covariance = np.zeros((2 * n + 1, 2 * n + 1))
        covariance[0, 0] = FIXED_SHARE**2
        for members in alike.values():
            where = np.array(members)
            outer = np.outer(scale[where], scale[where])
            covariance[np.ix_(1 + where, 1 + where)] += ALIKE_ERROR**2 * outer
            covariance[np.ix_(1 + n + where, 1 + n + where)] += WRITING_ERROR**2 * outer
        own = np.concatenate([[0.0], OWN_ERROR * scale, 0.5 * OWN_ERROR * scale])
        covariance[np.diag_indices_from(covariance)] += own**2
        # The original is known exactly: its share is 1.
        rows = self._features([*plans, costs.space.original])
        seen = np.append(times, 1.0)
        noise = np.append(times * errors, 1e-3)
        gain = np.linalg.solve(rows @ covariance @ rows.T + np.diag(noise**2), rows @ covariance).T
        self._weights = mean + gain @ (seen - rows @ mean)
        whole = self._features([costs.space.original])[0] * self._weights
        self.share_of_layers = np.zeros(len(costs.layers))
        self.share_of_layers[busy] = whole[1 : n + 1] + whole[n + 1 :]

    def times(self, plans: Sequence[Widths]) -> FloatArray:
        """`(p,)` expected time of `plans` as a share of the original's."""
        times: FloatArray = np.maximum(self._features(plans) @ self._weights, 0.01)
        return times

    def _features(self, plans: Sequence[Widths]) -> FloatArray:
        left = self._costs.layers_left(plans)[:, self._busy]
        written = self._costs.writing_left(plans)[:, self._busy]
        return np.concatenate([np.ones((len(left), 1)), left, written], axis=1)
