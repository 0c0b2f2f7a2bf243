"""Gaussian processes of accuracy and of time, and what a plan promises by them.

Both get the plan as shares that are kept, of clusters or of single variables. The time's process
has the latency table as its mean. The accuracy's gets the harm that is expected (`harm`) as well,
and accuracies that were denoised by the loss (`denoised`). Trained on 40 trials of one search of
ResNet-56, it ranked those of three others with correlations of 0.82, 0.64 and 0.50; with damages
added up over alike layers in place of the expected harm, 0.60, -0.38 and 0.29.

[ament2023] Ament et al., Unexpected Improvements to Expected Improvement, NeurIPS 2023.
"""

import contextlib
import copy
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from gpytorch.kernels import Kernel, ScaleKernel
from gpytorch.means import Mean
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from linear_operator.utils.warnings import NumericalWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from torch import Tensor

from compressor.search.clustering import IntArray
from compressor.search.costs import FloatArray, LatencyTable
from compressor.search.harm import HarmModel, quietly
from compressor.search.objective import (
    ACCURACY,
    MIN_ERROR,
    TIME,
    TIME_MARGIN,
    Problem,
    finished,
    log_error,
)
from compressor.search.space import SearchSpace, Widths
from compressor.values import Accuracy, Trial

WORTH_TELLING = 0.15  # of accuracy, around the best: how bad a bad plan is matters to nobody
MIN_STEADIED = 8  # trials; fewer do not show how accuracy follows the loss
FIT_STEPS = 60  # of L-BFGS
N_REFITTED = 50  # rows; with more, hyper-parameters are worked out every ten rows only
N_REMEMBERED = 8
_FITTED: dict[bytes, tuple[dict[str, Any], dict[str, Any]]] = {}  # data -> hyper-parameters
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
        harm_model: What predicts harm, where it is known.
    """

    def __init__(
        self,
        space: SearchSpace,
        table: LatencyTable,
        clusters: IntArray,
        harm_model: HarmModel | None,
    ) -> None:
        self._space, self._table = space, table
        self.clusters, self.harm_model = clusters, harm_model

    @property
    def shares(self) -> tuple[int, ...]:
        """Columns of shares."""
        return tuple(range(2, 3 + int(self.clusters.max())))

    def __call__(self, plans: Sequence[Widths]) -> Tensor:
        """`(n_plans, 2 + n_shares)` float64.

        Logarithm of the speed-up by the table, expected harm, shares kept.
        """
        ratios = self._space.ratios(plans)
        columns = [-np.log(self._table.times(plans))]
        columns += [self.harm_model(plans) if self.harm_model else np.zeros(len(ratios))]
        columns += [ratios[:, self.clusters == k].mean(axis=1) for k in range(len(self.shares))]
        return torch.from_numpy(np.stack(columns, axis=1))


class _ByTable(Mean):  # type: ignore[misc]
    """The first column: what the latency table says."""

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = x[..., 0]
        return first


class _ByHarm(Mean):  # type: ignore[misc]
    """A line in the second column: the more harm is expected, the lower."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("bias", torch.nn.Parameter(torch.zeros(())))
        self.register_parameter("raw_slope", torch.nn.Parameter(torch.zeros(())))

    def forward(self, x: Tensor) -> Tensor:
        line: Tensor = self.bias - torch.nn.functional.softplus(self.raw_slope) * x[..., 1]
        return line


class LogConstrainedEI:
    """The acquisition function of plans, by all finished trials."""

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
        self._features, self._objective = features, problem.objective
        x = features(
            [problem.space.original, *(problem.space.from_names(t.widths) for t in known)]
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._worth = _worth_process(problem, known, features, x, informed=informed)
            self._speed = _speed_process(problem, trials, features, informed=informed)
        limits, min_accuracy = problem.objective.limits, problem.objective.min_accuracy
        within = [all(limit >= 1 for limit in limits.values())]
        within += [problem.excess(trial) == 0 for trial in known]
        self._has_feasible = any(within)
        if min_accuracy is not None:
            within[0] = True
            self._best = _best(self._speed, x[torch.tensor(within)])
        elif self._has_feasible and problem.objective.weights is None:
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


def _worth_process(
    problem: Problem, known: Sequence[Trial], features: Features, x: Tensor, *, informed: bool
) -> SingleTaskGP:
    """Of accuracy, or of the weighted sum."""
    accuracies = [problem.original_accuracy, *(t.accuracy for t in known if t.accuracy)]
    weights = problem.objective.weights
    if weights is not None:
        whole = weights.get(ACCURACY, 0.0)
        worth = [whole, *(problem.value(trial) for trial in known)]
        scale = whole / problem.original_accuracy.value
        noise = [(scale * a.standard_error) ** 2 for a in accuracies]
    elif informed:
        worth, noise = denoised(accuracies)
        best = max(worth[1:], default=worth[0])
        worth = np.clip(worth, best - WORTH_TELLING, best + WORTH_TELLING).tolist()
    else:
        worth = [a.value for a in accuracies]
        noise = [a.standard_error**2 for a in accuracies]

    def kernel() -> Kernel:
        if not features.harm_model:
            return _matern(features.shares, has_ard=True)
        around_line = _matern(features.shares, has_ard=False)
        around_line.register_prior("small", LogNormalPrior(math.log(0.1), 0.7), "outputscale")
        around_line.outputscale = 0.1
        return around_line

    mean = _ByHarm() if features.harm_model else None
    x = x.clone()
    x[:, 0] = 0  # not looked at, and another one after every trial
    return _fit(x, _column(worth), _column(noise), kernel, mean=mean)


def _speed_process(
    problem: Problem, trials: Sequence[Trial], features: Features, *, informed: bool
) -> SingleTaskGP:
    """Of the logarithm of the speed-up."""
    timed = problem.all_timed(trials)
    x = features([problem.space.original, *(problem.space.from_names(t.widths) for t in timed)])
    speedups = [1.0, *(t.speedup for t in timed)]
    errors = [MIN_ERROR, *(log_error(t.speedup_ci95) for t in timed)]

    def kernel() -> Kernel:
        around_table = _matern(features.shares, has_ard=not informed)
        around_table.outputscale = SPREAD_OF_TIMES**2 if informed else 0.1
        return around_table

    return _fit(
        x, _column(np.log(speedups)), _column(np.square(errors)), kernel,
        mean=_ByTable() if informed else None, standardised=False,
    )  # fmt: skip


def denoised(accuracies: Sequence[Accuracy]) -> tuple[list[float], list[float]]:
    """What accuracies are when their losses are looked at too: values and variances.

    The loss tells two networks apart from fewer images than the share of right answers does, for
    it sees by how much each answer is right. Accuracy is taken for a smooth function of the
    logarithm of the loss plus something of its own, learned from all trials; returned is the
    posterior. Unchanged where losses are not known.
    """
    values = np.array([a.value for a in accuracies])
    variances = np.array([a.standard_error**2 for a in accuracies])
    losses = [a.loss for a in accuracies if a.loss is not None]
    if len(losses) < max(MIN_STEADIED, len(accuracies)):
        return values.tolist(), variances.tolist()
    x = np.log(np.maximum(losses, 1e-6))[:, None]
    mean, spread = values.mean(), max(values.std(), 1e-3)
    smooth = ConstantKernel(4.0) * RBF(1.0, (0.3, 10.0)) + WhiteKernel(1e-3, (1e-6, 1.0))
    fitted = GaussianProcessRegressor(smooth, alpha=variances / spread**2)
    with quietly():
        fitted.fit(x, (values - mean) / spread)
    prior = fitted.kernel_(x) * spread**2
    gain = np.linalg.solve(prior + np.diag(variances), prior).T
    posterior = np.diag(prior - gain @ prior)
    return (mean + gain @ (values - mean)).tolist(), np.maximum(posterior, 1e-9).tolist()


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


def _matern(columns: tuple[int, ...], *, has_ard: bool) -> Kernel:
    """One length scale a column, or one for all."""
    kernel: Kernel = get_covar_module_with_dim_scaled_prior(
        ard_num_dims=len(columns) if has_ard else 1, use_rbf_kernel=False, active_dims=columns
    )
    return ScaleKernel(kernel)


def _fit(
    x: Tensor,
    values: Tensor,
    variances: Tensor,
    make_kernel: Callable[[], Kernel],
    *,
    mean: Mean | None = None,
    standardised: bool = True,
) -> SingleTaskGP:
    """A process on all rows; its hyper-parameters are those of the first ones, in tens.

    Those were often worked out for the trial before, and are remembered.
    """
    n = len(x) if len(x) < N_REFITTED else len(x) // 10 * 10
    options = {} if standardised else {"outcome_transform": None}

    def model(rows: slice) -> SingleTaskGP:
        return SingleTaskGP(
            x[rows], values[rows], train_Yvar=variances[rows],
            covar_module=make_kernel(), mean_module=copy.deepcopy(mean), **options,
        )  # fmt: skip

    first = slice(0, n)
    data = b"".join(t[first].contiguous().numpy().tobytes() for t in (x, values, variances))
    key = hashlib.sha256(f"{make_kernel()} {mean} {x.shape}".encode() + data).digest()
    if key not in _FITTED:
        fitted = model(first)
        likelihood = ExactMarginalLogLikelihood(fitted.likelihood, fitted)
        fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": {"maxiter": FIT_STEPS}})
        _FITTED[key] = (fitted.covar_module.state_dict(), fitted.mean_module.state_dict())
        while len(_FITTED) > N_REMEMBERED:
            _FITTED.pop(next(iter(_FITTED)))
    whole = model(slice(None))
    whole.covar_module.load_state_dict(_FITTED[key][0])
    whole.mean_module.load_state_dict(_FITTED[key][1])
    return whole.eval()


def _column(values: Sequence[float] | FloatArray) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float64).unsqueeze(-1)
