"""Gaussian processes of accuracy and of time, and what a plan promises by them.

Both get the plan as shares that are kept, of clusters or of single variables, and as two numbers
that were worked out before: the time by the latency table, which is the mean of the time's
process, and the sum of the damages that were measured one by one, along which accuracy falls.

[ament2023] Ament et al., Unexpected Improvements to Expected Improvement, NeurIPS 2023.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from gpytorch.kernels import Kernel, ScaleKernel
from gpytorch.means import Mean
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from compressor.search.clustering import IntArray
from compressor.search.costs import FloatArray, LatencyTable
from compressor.search.objective import (
    MIN_ERROR,
    TIME,
    TIME_MARGIN,
    Problem,
    finished,
    log_error,
)
from compressor.search.space import Widths
from compressor.search.warm_start import damages
from compressor.values import Trial

FIT_STEPS = 60  # of L-BFGS
N_WORKED_OUT = 2  # columns before the shares
SPREAD_OF_TIMES = 0.05  # of the logarithm, around the table


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Matrices of a few dozen rows: more threads take half as long again."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


class Features:
    """A plan in numbers.

    Attributes:
        clusters: `(n_variables,)` which variables share a column.
    """

    def __init__(
        self, problem: Problem, table: LatencyTable, clusters: IntArray, *, informed: bool
    ) -> None:
        self._space = problem.space
        self._table = table
        self.clusters = clusters
        self._informed = informed
        floors = np.array([c[0] for c in problem.space.choices]) / problem.space.sizes
        harm = damages(problem)
        self._harm = harm / (1 - floors)
        self._scale = np.ones(len(harm))
        if informed and clusters.max() + 1 == len(clusters):  # what harms little tells little
            self._scale = np.clip(np.sqrt(harm / harm.mean()), 0.3, 3.0)

    def __call__(self, plans: Sequence[Widths]) -> Tensor:
        """`(n_plans, 2 + n_clusters)` float64: log speed-up by the table, damage, shares kept."""
        ratios = self._space.ratios(plans)
        if self._informed:
            speed = -np.log(self._table.times(plans))
            harm = (1 - ratios) @ self._harm
        else:
            speed, harm = np.zeros(len(ratios)), np.zeros(len(ratios))
        n_clusters = int(self.clusters.max()) + 1
        shares = [
            (ratios * self._scale)[:, self.clusters == k].mean(axis=1) for k in range(n_clusters)
        ]
        return torch.from_numpy(np.stack([speed, harm, *shares], axis=1))


class _ByTable(Mean):  # type: ignore[misc]
    """The first column: what the latency table says."""

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = x[..., 0]
        return first


class Promise:
    """How much plans promise, by all finished trials."""

    def __init__(
        self,
        problem: Problem,
        trials: Sequence[Trial],
        features: Features,
        *,
        informed: bool,
        seed: int,
    ) -> None:
        known = finished(trials)
        self._features = features
        space = problem.space
        plans = [space.original, *(space.from_names(t.widths) for t in known)]
        timed = problem.all_timed(trials)
        timed_plans = [space.original, *(space.from_names(t.widths) for t in timed)]
        speedups = [1.0, *(t.speedup for t in timed)]
        errors = [MIN_ERROR, *(log_error(t.speedup_ci95) for t in timed)]
        accuracies = [problem.original_accuracy, *(t.accuracy for t in known if t.accuracy)]
        n_shares = int(features.clusters.max()) + 1
        columns = tuple(range(N_WORKED_OUT, N_WORKED_OUT + n_shares))
        has_ard = n_shares < len(features.clusters) or not informed
        objective = problem.objective
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            x = features(plans)
            if objective.weights is not None:
                worth = [1.0 * objective.weights.get("accuracy", 0.0)]
                worth += [problem.value(trial) for trial in known]
                scale = objective.weights.get("accuracy", 0.0) / problem.original_accuracy.value
            else:
                worth = [a.value for a in accuracies]
                scale = 1.0
            noise = [(scale * a.standard_error) ** 2 for a in accuracies]
            self._worth = _fit(
                x, _column(worth), _column(noise), _falling(columns, n_shares, informed, has_ard)
            )
            kernel = ScaleKernel(_shares_kernel(columns, n_shares, has_ard))
            kernel.outputscale = SPREAD_OF_TIMES**2 if informed else 0.1
            self._speed = _fit(
                features(timed_plans), _column(np.log(speedups)), _column(np.square(errors)),
                kernel, mean=_ByTable(), standardised=False,
            )  # fmt: skip
        within = [True, *(problem.excess(trial) == 0 for trial in known)]
        within[0] = all(limit >= 1 for limit in objective.limits.values())
        self._objective = objective
        self._has_feasible = any(within)
        if objective.min_accuracy is not None:
            self._best = _best(self._speed, x[torch.tensor(within)])
        elif self._has_feasible and objective.weights is None:
            self._best = _best(self._worth, x[torch.tensor(within)])
        else:
            self._best = _best(self._worth, x)

    def __call__(self, plans: Sequence[Widths]) -> list[float]:
        """Logarithm of the (constrained) expected improvement of every plan.

        Where time is limited and no plan is known to meet the limit: of the probability that it
        does. Limits on paper are not looked at; the caller keeps them exactly.
        """
        if not plans:
            return []
        x = self._features(plans)
        objective = self._objective
        if objective.weights is not None:
            return _listed(log_expected_improvement(*_posterior(self._worth, x), self._best))
        if objective.min_accuracy is not None:
            mean, sigma = _posterior(self._worth, x)
            log_feasible = torch.special.log_ndtr((mean - objective.min_accuracy) / sigma)
            improvement = log_expected_improvement(*_posterior(self._speed, x), self._best)
            return _listed(improvement + log_feasible)
        log_feasible = torch.zeros(len(x), dtype=torch.float64)
        if TIME in objective.limits:
            least = -math.log(TIME_MARGIN * objective.limits[TIME])
            mean, sigma = _posterior(self._speed, x)
            log_feasible = torch.special.log_ndtr((mean - least) / sigma)
            if not self._has_feasible:
                return _listed(log_feasible)
        improvement = log_expected_improvement(*_posterior(self._worth, x), self._best)
        return _listed(improvement + log_feasible)


def log_expected_improvement(mean: Tensor, sigma: Tensor, best: float) -> Tensor:
    """Log E[max(0, y - best)] for y normal; exact far below `best` too [ament2023].

    BoTorch's own takes one covariance matrix a point, which is 50 times slower here.
    """
    u = ((mean - best) / sigma).clamp_min(-1e5)
    tail = torch.special.erfcx(-u.clamp_max(0) / math.sqrt(2))
    below = -0.5 * u**2 + torch.log(1 / math.sqrt(2 * math.pi) + 0.5 * u.clamp_max(0) * tail)
    density = torch.exp(-0.5 * u**2) / math.sqrt(2 * math.pi)
    above = torch.log(density + u.clamp_min(0) * torch.special.ndtr(u))
    return torch.log(sigma) + torch.where(u < 0, below, above)


def _posterior(model: SingleTaskGP, x: Tensor) -> tuple[Tensor, Tensor]:
    """`(n,)` means and standard deviations."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)  # at plans that were measured: -1e-18
        posterior = model.posterior(x)
        mean, variance = posterior.mean.squeeze(-1), posterior.variance.squeeze(-1)
    return mean, variance.clamp_min(1e-12).sqrt()


def _listed(values: Tensor) -> list[float]:
    return [float(value) for value in values]


def _best(model: SingleTaskGP, x: Tensor) -> float:
    """The largest posterior mean, as in the paper's code; the best figure seen owes to luck."""
    return float(_posterior(model, x)[0].max())


def _falling(columns: tuple[int, ...], n_shares: int, informed: bool, has_ard: bool) -> Kernel:
    """Of accuracy: along the sum of damages, and along the shares kept."""
    shares = ScaleKernel(_shares_kernel(columns, n_shares, has_ard))
    if not informed:
        return shares
    return shares + ScaleKernel(_shares_kernel((1,), 1, has_ard=True))


def _shares_kernel(columns: tuple[int, ...], n_shares: int, has_ard: bool) -> Kernel:
    kernel: Kernel = get_covar_module_with_dim_scaled_prior(
        ard_num_dims=n_shares if has_ard else 1, use_rbf_kernel=False, active_dims=columns
    )
    return kernel


def _fit(
    x: Tensor,
    values: Tensor,
    variances: Tensor,
    kernel: Kernel,
    *,
    mean: Mean | None = None,
    standardised: bool = True,
) -> SingleTaskGP:
    model = SingleTaskGP(
        x, values, train_Yvar=variances, covar_module=kernel, mean_module=mean,
        **({} if standardised else {"outcome_transform": None}),
    )  # fmt: skip
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": {"maxiter": FIT_STEPS}})
    return model


def _column(values: Sequence[float] | FloatArray) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float64).unsqueeze(-1)
