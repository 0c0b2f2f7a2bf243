"""Groups that are alike share one keep ratio first [fan2022, sec. 3.1]; channels too [chang2022].

[fan2022] Fan, Mu, Zhang, Bayesian Optimization with Clustering and Rollback for CNN Auto
    Pruning, ECCV 2022, and its released code.
[chang2022] Chang, Lu, Xue, Xu, Wei, Automatic channel pruning via clustering and swarm
    intelligence optimization for CNN, Applied Intelligence 52, 2022, and its released code.

Distance of two groups, by one of three measures:

* `EU`, `JS`: shift each group's importances by their lower median, estimate their density with a
  Gaussian kernel (Scott's bandwidth), read it at 1000 points; Euclidean norm of the difference of
  the readings, or Jensen-Shannon distance (on which Ward's linkage has no justification; the
  released code does it, and so do we).
* `ST`: Euclidean distance of [c_in, c_out, kernel, parameters, MACs, output side, c_in / c_out]
  of the layer that reads the group, each as a share of the largest.

Ward linkage. The tree is kept: a rollback cuts it again, finer.

The released code reads densities on [-15, 15], which fits the weights of its networks. `AUTO`,
our default, reads them where these importances are: their pooled range, 3 bandwidths wider.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from scipy.stats import gaussian_kde
from sklearn.cluster import DBSCAN

from compressor.search.space import SearchSpace
from compressor.values import LayerCost

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

EU, JS, ST = "eu", "js", "st"
N_POINTS = 1000
FIXED_GRID = (-15.0, 15.0)
AUTO = None
NO_ZERO = 9.88131292e-50  # as in the released code; a density of 0 has no divergence
MIN_ALIKE = 5  # channels that make a cluster, as in the code of [chang2022]


def importance_tree(
    importances: Sequence[FloatArray],
    *,
    grid: tuple[float, float] | None = AUTO,
    distance: str = EU,
) -> FloatArray:
    """Ward linkage of the groups, as `scipy.cluster.hierarchy` writes it: `(n_groups - 1, 4)`.

    Args:
        importances: Per group `(n_channels,)`, at least 2 groups; channel counts may differ.
        grid: Where densities are read; `AUTO`, or `FIXED_GRID` as in the released code.
        distance: `EU` or `JS`.
    """
    shifted = [_spread(values - _lower_median(values)) for values in importances]
    densities = [gaussian_kde(values) for values in shifted]
    if grid is None:
        margin = 3 * max(float(np.sqrt(kde.covariance[0, 0])) for kde in densities)
        pooled = np.concatenate(shifted)
        grid = (float(pooled.min()) - margin, float(pooled.max()) + margin)
    points = np.linspace(*grid, N_POINTS)
    readings = np.stack([kde(points) for kde in densities]) + NO_ZERO
    return _ward(readings, {EU: "euclidean", JS: "jensenshannon"}[distance])


def structure_tree(space: SearchSpace, layers: Sequence[LayerCost]) -> FloatArray:
    """Ward linkage of the groups by the structure of the layers that read them; see `ST`.

    Args:
        space: With at least 2 groups.
        layers: From `graph.costs.layer_costs`.
    """
    rows = []
    for group in space.groups:
        readers = [x for x in layers if len(x.shape) > 1 and group.name in _read_by(x)]
        layer = max(readers, key=lambda x: x.macs, default=None)
        if layer is None:
            rows.append([float(group.n_channels), *[0.0] * 6])
            continue
        c_out, c_in, *kernel = layer.shape
        side = np.sqrt(layer.macs / layer.params)
        rows.append(
            [c_in, c_out, kernel[0] if kernel else 1, layer.params, layer.macs, side, c_in / c_out]
        )
    features = np.array(rows, dtype=np.float64)
    largest = features.max(axis=0)
    return _ward(features / np.where(largest > 0, largest, 1), "euclidean")


def cut(tree: FloatArray, n_clusters: int) -> IntArray:
    """`(n_groups,)` cluster of each group, from 0; fewer than asked where groups are identical.

    By the height that leaves no more clusters: SciPy's own "maxclust" made one cluster of two
    before 1.15 where groups were identical.
    """
    heights = np.sort(tree[:, 2])
    height = heights[-n_clusters] if n_clusters <= len(heights) else 0.0
    labels: IntArray = fcluster(tree, height, "distance").astype(np.int64) - 1
    return labels


def cluster_labels(
    space: SearchSpace, layers: Sequence[LayerCost], n_clusters: int, distance: str
) -> IntArray:
    """`(n_variables,)`: the cluster of every group, then that of every branch.

    A branch goes with the first of its groups, in a cluster of its own kind.
    """
    n_groups = len(space.groups)
    groups = np.arange(n_groups)
    if n_groups > max(n_clusters, 2):
        tree = (
            structure_tree(space, layers)
            if distance == ST
            else importance_tree(space.scores, distance=distance)
        )
        groups = cut(tree, n_clusters)
    of_branches = []
    for b in range(len(space.branches)):
        members = np.flatnonzero(space.inside[:, b])
        of_branches.append(int(groups[members[0]]) if len(members) else -1)
    labels = np.concatenate([groups, n_groups + 1 + np.array(of_branches, dtype=np.int64)])
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def n_distinct(maps: FloatArray, eps: float) -> int:
    """How many channels are left where those with alike feature maps count once [chang2022].

    DBSCAN with cosine distance: clusters, and channels that lie in none.

    Args:
        maps: `(n_channels, n_pixels)` mean feature maps.
        eps: Largest cosine distance of neighbours; larger merges more.
    """
    labels = DBSCAN(eps=eps, min_samples=MIN_ALIKE, metric="cosine").fit(maps).labels_
    return int(len(set(labels[labels >= 0])) + (labels < 0).sum())


def _read_by(layer: LayerCost) -> set[str]:
    """Groups along the second dimension; of a depthwise layer, along its only one."""
    dims = layer.dims or range(len(layer.shares))
    last = max(dims, default=None)
    alike = zip(dims, layer.shares, strict=True)
    return {name for dim, shares in alike if dim == last for name in shares}


def _ward(rows: FloatArray, metric: str) -> FloatArray:
    tree: FloatArray = linkage(pdist(rows, metric), "ward")  # type: ignore[call-overload]
    return tree


def _lower_median(values: FloatArray) -> float:
    """The smaller of the two middle values, as torch.median takes it."""
    return float(np.sort(values)[(len(values) - 1) // 2])


def _spread(values: FloatArray) -> FloatArray:
    """`values`, or where all are equal (no density exists) the same with a tiny ramp."""
    if np.ptp(values) > 0:
        return values
    return np.linspace(-1e-6, 1e-6, max(2, len(values)))
