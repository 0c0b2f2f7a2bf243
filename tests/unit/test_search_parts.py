"""Parts of the searches against closed forms, brute force and other implementations."""

import itertools

import numpy as np
import pytest
import torch
from botorch.acquisition.analytic import LogExpectedImprovement
from botorch.models import SingleTaskGP
from torch import nn

from compressor.features import channel_maps, fisher_ratios
from compressor.goals import MACS
from compressor.graph import channel_groups
from compressor.search.baselines import CmaEs
from compressor.search.genetic import evolve, haar
from compressor.search.objective import TIME, History, Objective, Problem, TimedPlan
from compressor.search.space import SearchSpace
from compressor.search.surrogate import denoised, log_expected_improvement
from compressor.search.swarm import first_particle
from compressor.search.warm_start import (
    Knapsack,
    clipped_to_limit,
    damages,
    fitted,
    global_importance,
    limits_of,
    scaled_to,
    uniform,
    warm_starts,
)
from compressor.values import (
    Accuracy,
    Branch,
    ChannelGroup,
    GroupFeatures,
    LayerCost,
    Trial,
)


def make_problem(limit: float = 0.5, metric: str = MACS, n_branches: int = 2) -> Problem:
    """Four groups of 64 in four layers of unlike cost; branches hold groups 1 and 2."""
    costs, n_groups = (4, 1, 3, 2), 4
    groups = tuple(ChannelGroup(f"g{i}", 64, ()) for i in range(n_groups))
    branches = tuple(
        Branch(f"b{i}", f"add{i}", 0, (), (f"m{i + 1}",), (f"g{i + 1}",), 1, "add", i)
        for i in range(n_branches)
    )
    layers = tuple(
        LayerCost(f"m{i}.weight", c * 10**6, 64, (64,), ({f"g{i}": 1.0},))
        for i, c in enumerate(costs)
    )
    scores = tuple(np.random.default_rng(i).random(64) for i in range(n_groups))
    choices = (*((16, 32, 48, 64) for _ in groups), *((0, 1) for _ in branches))
    space = SearchSpace(groups, scores, choices, branches)
    names = dict(zip(space.names, (0.02, 0.2, 0.05, 0.01, 0.3, 0.06), strict=False))
    wanted = Objective(limits={metric: limit})
    return Problem(space, wanted, Accuracy(0.9, 1000), 20, 2, 0, layers, damages=names)


def every_plan(space: SearchSpace) -> list[tuple[int, ...]]:
    return sorted(set(space.written_once(list(itertools.product(*space.choices)))))


def test_log_expected_improvement_is_botorchs() -> None:
    torch.manual_seed(0)
    x = torch.rand(12, 2, dtype=torch.float64)
    model = SingleTaskGP(x, x.sum(dim=1, keepdim=True).sin(), torch.full_like(x[:, :1], 1e-4))
    grid = torch.rand(200, 2, dtype=torch.float64) * 3 - 1
    for best in (-1.0, 0.5, 3.0, 40.0):
        with torch.no_grad():
            theirs = LogExpectedImprovement(model, best_f=best)(grid.unsqueeze(-2))
            posterior = model.posterior(grid)
            mean, sigma = posterior.mean.squeeze(-1), posterior.variance.squeeze(-1).sqrt()
            torch.testing.assert_close(log_expected_improvement(mean, sigma, best), theirs)


def test_losses_steady_accuracies() -> None:
    """Binomial noise on accuracies that follow the loss: most of it goes."""
    generator = np.random.default_rng(0)
    n, losses = 500, np.linspace(0.2, 1.5, 40)
    truth = 1 - 0.35 * losses
    seen = generator.binomial(n, truth) / n
    values, variances = denoised(
        [Accuracy(v, n, loss) for v, loss in zip(seen, losses, strict=True)]
    )
    before, after = np.abs(seen - truth).mean(), np.abs(np.array(values) - truth).mean()
    assert after < before / 2
    errors = (np.array(values) - truth) / np.sqrt(variances)
    assert 0.4 < float(np.sqrt((errors**2).mean())) < 2  # and the variances say so


def test_accuracies_that_do_not_follow_the_loss_stay_as_they_are() -> None:
    generator = np.random.default_rng(1)
    seen = generator.uniform(0.3, 0.9, 40)
    losses = generator.permutation(np.linspace(0.2, 1.5, 40))
    values, _ = denoised([Accuracy(v, 2000, x) for v, x in zip(seen, losses, strict=True)])
    assert np.abs(np.array(values) - seen).max() < 0.02
    unknown = [Accuracy(v, 2000) for v in seen]
    assert denoised(unknown)[0] == seen.tolist()
    assert denoised(unknown)[1] == [a.standard_error**2 for a in unknown]


def test_a_knapsack_is_nearly_the_best_by_its_own_figures() -> None:
    """Least sum of damages among all 1,024 plans within half of the MACs, by brute force."""
    problem = make_problem()
    space, harm = problem.space, damages(problem)
    table = problem.table([])
    plans = every_plan(space)
    floors = np.array([choice[0] for choice in space.choices]) / space.sizes
    per_share = harm / (1 - floors)

    def lost(some: list[tuple[int, ...]]) -> np.ndarray:
        ratios = space.ratios(some)
        there = ratios > 0
        there[:, len(space.groups) :] = True
        return ((1 - ratios) * there) @ per_share

    within = [p for p, m in zip(plans, problem.costs.macs(plans), strict=True) if m <= 0.5]
    found = Knapsack(problem, table, {MACS: 0.5}).plan(harm)
    assert found in within
    assert lost([found])[0] <= lost(within).min() + 0.03
    assert lost([found])[0] < np.median(lost(within)) / 2.5


def test_families_meet_the_limit_with_their_weakest_plan() -> None:
    problem = make_problem()
    table = problem.table([])
    even = fitted(problem, table, {MACS: 0.5}, uniform(problem))
    assert even == (32, 32, 32, 32, 1, 1)
    by_score = fitted(problem, table, {MACS: 0.5}, global_importance(problem))
    assert by_score is not None
    assert 0.35 < float(problem.costs.macs([by_score])[0]) <= 0.5
    assert by_score[4:] == (1, 1)
    assert fitted(problem, table, {MACS: 0.01}, uniform(problem)) is None


@pytest.mark.parametrize("fit", [scaled_to, clipped_to_limit])
def test_plans_are_brought_to_a_limit(fit: object) -> None:
    problem = make_problem()
    table = problem.table([])
    asked = np.random.default_rng(0).random((50, 6))
    plans = fit(problem, table, {MACS: 0.5}, asked)  # type: ignore[operator]
    macs = problem.costs.macs(plans)
    assert macs.max() <= 0.5
    small = problem.costs.macs(problem.space.snap(asked)) <= 0.5
    assert small.any()
    if fit is scaled_to:  # what meets it is left as it is
        kept = [p for p, s in zip(plans, small, strict=True) if s]
        floors = np.array([c[0] for c in problem.space.choices]) / problem.space.sizes
        same = problem.space.snap(np.maximum(asked[small], floors))
        assert kept == same


def test_the_wall_lets_late_layers_pay() -> None:
    """Asked for everything everywhere, the first group stays whole and the last ones starve."""
    problem = make_problem(n_branches=0)
    (plan,) = clipped_to_limit(problem, problem.table([]), {MACS: 0.6}, np.ones((1, 4)))
    assert plan[0] == 64
    assert plan[-1] == 16


def test_warm_starts_are_within_the_limit_and_differ() -> None:
    for metric in (MACS, TIME):
        problem = make_problem(metric=metric)
        table = problem.table([])
        plans = warm_starts(problem, table)
        assert len(plans) == len(set(plans)) >= 4
        (limits,) = limits_of(problem)
        assert problem.expected(metric, plans, table).max() <= limits[metric] + 1e-9


def test_the_table_learns_from_trials_too() -> None:
    problem = make_problem(metric=TIME)
    names = problem.space.by_name(problem.space.narrowest)
    timed = [TimedPlan(names, 2.0, (1.98, 2.02))]
    trial = Trial(0, names, "", Accuracy(0.5, 100), 2.0, (1.98, 2.02), 1.0)
    narrowest = [problem.space.narrowest]
    before = problem.table([]).times(narrowest)[0]
    after = problem.table([trial]).times(narrowest)[0]
    assert abs(after - 0.5) < 0.02 < abs(before - 0.5)
    assert len(problem.all_timed([trial])) == 1
    assert timed[0].speedup == 2.0


def test_haar_keeps_energy_and_splits_means_from_edges() -> None:
    maps = np.random.default_rng(0).random((5, 6, 8))
    bands = haar(maps)
    assert bands.shape == (5, 48)
    np.testing.assert_allclose((bands**2).sum(axis=1), (maps**2).sum(axis=(1, 2)))
    flat = haar(np.ones((1, 4, 4)))
    np.testing.assert_allclose(flat[0, :4], 2.0)
    np.testing.assert_allclose(flat[0, 4:], 0.0)
    assert haar(np.ones((3, 1, 1))).shape == (3, 1)


def test_stronger_cost_keeps_fewer_channels() -> None:
    generator = np.random.default_rng(0)
    features = [GroupFeatures(generator.random((32, 4, 4)), generator.random(32), ())]
    shares = [
        evolve(features, strength, np.random.default_rng(1))[0] for strength in (0.0, 0.6, 4.0)
    ]
    assert shares[0] > shares[1] > shares[2] >= 0


def test_a_discriminative_channel_is_worth_keeping() -> None:
    """Two classes that only channel 0 tells apart."""
    generator = np.random.default_rng(0)
    classes = np.repeat([0, 1], 50)
    answers = generator.standard_normal((100, 4))
    answers[:, 0] += 4 * classes
    ratios = fisher_ratios(answers, classes)
    assert ratios[0] > 10 * ratios[1:].max()


def test_maps_are_means_of_what_the_producer_writes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()  # fmt: skip
    images, labels = torch.randn(20, 1, 8, 8), torch.arange(20) % 2
    groups = channel_groups(net, images[:1])
    batches = [(images[:12], labels[:12]), (images[12:], labels[12:])]
    maps = channel_maps(net, groups, batches)
    with torch.no_grad():
        written = net[0](images).double().numpy()
    np.testing.assert_allclose(maps["0"][0], written.mean(axis=0), rtol=1e-5, atol=1e-6)
    pooled = written.mean(axis=(2, 3))
    np.testing.assert_allclose(maps["0"][1], fisher_ratios(pooled, labels.numpy()), rtol=1e-4)


def test_the_first_particle_has_as_many_channels_as_clusters_at_the_limit() -> None:
    problem = make_problem()
    counts = ((60, 32, 20), (60, 32, 20), (60, 32, 20), (60, 32, 20))
    features = {
        g.name: GroupFeatures(np.ones((64, 2, 2)), np.ones(64), c)
        for g, c in zip(problem.space.groups, counts, strict=True)
    }
    wanted = Problem(**{**vars(problem), "features": features, "objective": problem.objective})
    points = first_particle(wanted)
    floor = 16 / 64
    np.testing.assert_allclose(points[:4], (32 / 64 - floor) / (1 - floor))
    np.testing.assert_allclose(points[4:], 1)


def test_cma_es_draws_nearer_to_what_was_good() -> None:
    """Worth falls with the distance from the widest plan within the limit: it goes there."""
    problem = make_problem(limit=0.9, metric=TIME)
    trials: list[Trial] = []
    while len(trials) < 60:
        proposal = CmaEs().propose(problem, History(trials))
        if proposal is None:
            break
        macs = float(problem.costs.macs([proposal.widths])[0])
        names = problem.space.by_name(proposal.widths)
        accuracy = Accuracy(0.9 - abs(macs - 0.3), 1000)
        trials.append(Trial(len(trials), names, "", accuracy, 1 / macs, (1 / macs, 1 / macs), 1.0))
    values = [t.accuracy.value for t in trials if t.accuracy]
    assert np.mean(values[-15:]) > np.mean(values[:15])
