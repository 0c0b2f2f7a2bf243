"""Groups with alike importance statistics share one keep ratio first [fan2022, sec. 3.1].

[fan2022] Fan, Mu, Zhang, Bayesian Optimization with Clustering and Rollback for CNN Auto
    Pruning, ECCV 2022, and its released code.

1. Shift each group's importances by their lower median.
2. Estimate their density with a Gaussian kernel (Scott's bandwidth).
3. Read the density at 1000 points; the distance of two groups is the Euclidean norm of the
   difference of their readings.
4. Ward linkage. The tree is kept: a rollback cuts it again, finer.

The released code reads the density on [-15, 15], which fits the weights of its networks. `AUTO`,
our default, reads it where these importances are: their pooled range, 3 bandwidths wider.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from scipy.stats import gaussian_kde

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

N_POINTS = 1000
FIXED_GRID = (-15.0, 15.0)
AUTO = None


def importance_tree(
    importances: Sequence[FloatArray], *, grid: tuple[float, float] | None = AUTO
) -> FloatArray:
    """Ward linkage of the groups, as `scipy.cluster.hierarchy` writes it: `(n_groups - 1, 4)`.

    Args:
        importances: Per group `(n_channels,)`, at least 2 groups; channel counts may differ.
        grid: Where densities are read; `AUTO`, or `FIXED_GRID` as in the released code.
    """
    shifted = [_spread(values - _lower_median(values)) for values in importances]
    densities = [gaussian_kde(values) for values in shifted]
    if grid is None:
        margin = 3 * max(float(np.sqrt(kde.covariance[0, 0])) for kde in densities)
        pooled = np.concatenate(shifted)
        grid = (float(pooled.min()) - margin, float(pooled.max()) + margin)
    points = np.linspace(*grid, N_POINTS)
    readings = np.stack([kde(points) for kde in densities])
    tree: FloatArray = linkage(pdist(readings), "ward")
    return tree


def cut(tree: FloatArray, n_clusters: int) -> IntArray:
    """`(n_groups,)` cluster of each group, from 0; fewer than asked where groups are identical."""
    labels: IntArray = fcluster(tree, n_clusters, "maxclust").astype(np.int64) - 1
    return labels


def _lower_median(values: FloatArray) -> float:
    """The smaller of the two middle values, as torch.median takes it."""
    return float(np.sort(values)[(len(values) - 1) // 2])


def _spread(values: FloatArray) -> FloatArray:
    """`values`, or where all are equal (no density exists) the same with a tiny ramp."""
    if np.ptp(values) > 0:
        return values
    return np.linspace(-1e-6, 1e-6, max(2, len(values)))
