"""Genetic search with wavelet channel aggregation, after GWCS [chen2021].

[chen2021] Chen, Gong, Shi, Shang, Pruning by genetic wavelet channel search, Frontiers in
    Computational Neuroscience 15, 2021. Only its abstract was read: this is a reconstruction,
    and says nothing about the paper's own results.

What is known of it: the channels of all layers are split by depth into stages, each stage a
chromosome of one bit a channel; fitness aggregates wavelet coefficients of feature maps, to keep
the most representative and discriminative channels; how many stay is found on the way.

What is ours: stages are thirds of the groups, in graph order. Fitness of a set of channels is the
cosine between the sums of its Haar coefficients and those of all channels, plus the Fisher ratio
of what it keeps, less `strength` times its share of MACs. Strengths come from a bisection on what
trials were worth. A trial takes from a chromosome how many channels each group keeps; which ones,
the criterion of importance decides, as in all searches here. Feature maps say nothing about
leaving branches out, so from the middle of the budget on, whole plans are bred from the best
trials, with their worth as fitness.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from compressor.search.baselines import untried
from compressor.search.objective import (
    FEATURES,
    History,
    Problem,
    Proposal,
    WithoutSettings,
    best_first,
)
from compressor.search.space import Ratios
from compressor.values import GroupFeatures, Trial

N_STAGES = 3
POPULATION, GENERATIONS, PATIENCE = 30, 30, 8
TOURNAMENT, CROSSOVER, ELITE, MIN_MUTATION = 3, 0.8, 2, 0.01
DISCRIMINATION = 0.5  # weight of the Fisher ratio
STRENGTHS = (0.05, 4.0)  # of the cost, between which is bisected
N_PARENTS = 8

Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Genetic(WithoutSettings):
    """See the module."""

    needs: ClassVar[frozenset[str]] = frozenset({FEATURES})

    def propose(self, problem: Problem, history: History) -> Proposal | None:
        """See `Strategy.propose`."""
        trials = history.trials
        generator = np.random.default_rng([problem.seed, history.n_proposed])
        has_parents = len(best_first(trials, problem)) > 1
        if history.n_proposed < problem.n_trials / 2 or not has_parents:
            points = self._by_wavelets(problem, trials, generator)
        else:
            points = self._bred(problem, trials, generator)
        return untried(problem, history, points, "genetic", generator)

    def _by_wavelets(
        self, problem: Problem, trials: Sequence[Trial], generator: np.random.Generator
    ) -> Ratios:
        space = problem.space
        low, high = np.log(STRENGTHS)
        for trial in trials:  # too dear: stronger; within the limits: weaker
            middle = (low + high) / 2
            if high - low < 0.05:
                break
            is_within = trial.accuracy is not None and problem.excess(trial) == 0
            low, high = (low, middle) if is_within else (middle, high)
        strength = float(np.exp((low + high) / 2 + 0.1 * generator.standard_normal()))
        points = np.ones(len(space.choices))
        known = [i for i, group in enumerate(space.groups) if group.name in problem.features]
        for stage in np.array_split(np.array(known, dtype=np.int64), N_STAGES):
            if len(stage):
                features = [problem.features[space.groups[i].name] for i in stage]
                for i, kept in zip(stage, evolve(features, strength, generator), strict=True):
                    floor = space.choices[i][0] / space.sizes[i]
                    points[i] = np.clip((kept - floor) / (1 - floor), 0, 1)
        return points

    def _bred(
        self, problem: Problem, trials: Sequence[Trial], generator: np.random.Generator
    ) -> Ratios:
        """Uniform crossover of two of the best trials, then mutation."""
        space = problem.space
        best = best_first(trials, problem)[:N_PARENTS]
        chosen = generator.choice(len(best), 2, replace=False)
        parents = np.array([space.from_names(best[int(i)].widths) for i in chosen])
        mask = generator.random(len(space.choices)) < 0.5
        widths = np.where(mask, parents[0], parents[1])
        rate = max(1.5 / len(widths), MIN_MUTATION)
        for i in np.flatnonzero(generator.random(len(widths)) < rate):
            widths[i] = generator.choice(space.choices[i])
        return space.points_of(widths / space.sizes)


def evolve(
    features: Sequence[GroupFeatures], strength: float, generator: np.random.Generator
) -> list[float]:
    """The share of channels that each group of one stage keeps.

    Args:
        features: Of the stage's groups.
        strength: Weight of the cost.
        generator: Of every draw.
    """
    sizes = [len(f.fisher) for f in features]
    bands = [haar(f.maps) for f in features]
    wholes = [band.sum(axis=0) for band in bands]
    fishers = [f.fisher / max(float(f.fisher.sum()), 1e-12) for f in features]
    edges = np.cumsum([0, *sizes])

    def fitness(population: Bits) -> npt.NDArray[np.float64]:
        total = np.zeros(len(population))
        for i, (band, whole, fisher) in enumerate(zip(bands, wholes, fishers, strict=True)):
            bits = population[:, edges[i] : edges[i + 1]].astype(np.float64)
            sums = bits @ band
            norms = np.linalg.norm(sums, axis=1) * np.linalg.norm(whole)
            total += (sums @ whole) / np.maximum(norms, 1e-12) + DISCRIMINATION * bits @ fisher
            total -= strength * bits.mean(axis=1)
        return total

    n_bits = int(edges[-1])
    shares = generator.uniform(0.3, 0.9, size=(POPULATION, 1))
    population: Bits = generator.random((POPULATION, n_bits)) < shares
    population[0] = True
    scores = fitness(population)
    best, n_without = scores.max(), 0
    rate = max(1 / n_bits, MIN_MUTATION)
    for _ in range(GENERATIONS):
        elite = population[np.argsort(-scores)[:ELITE]]
        drawn = generator.integers(POPULATION, size=(2, POPULATION, TOURNAMENT))
        winners = np.take_along_axis(drawn, scores[drawn].argmax(axis=2)[..., None], 2)[..., 0]
        mothers, fathers = population[winners[0]], population[winners[1]]
        mixed = generator.random((POPULATION, n_bits)) < 0.5
        crossed = generator.random((POPULATION, 1)) < CROSSOVER
        children = np.where(crossed & mixed, fathers, mothers)
        children ^= generator.random(children.shape) < rate
        population = np.concatenate([elite, children])[:POPULATION]
        scores = fitness(population)
        n_without = 0 if scores.max() > best + 1e-9 else n_without + 1
        best = max(best, scores.max())
        if n_without == PATIENCE:
            break
    winner = population[int(scores.argmax())]
    return [float(winner[edges[i] : edges[i + 1]].mean()) for i in range(len(sizes))]


def haar(maps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`(n, 4 * (h // 2) * (w // 2))`: one level of the 2-D Haar transform of `(n, h, w)` maps.

    Sub-bands in the order LL, LH, HL, HH; an odd last row or column is left out. Maps smaller
    than 2 x 2 are returned as they are.
    """
    n, h, w = maps.shape
    if h < 2 or w < 2:
        return maps.reshape(n, -1)
    even = maps[:, : h // 2 * 2, : w // 2 * 2]
    a, b = even[:, ::2, ::2], even[:, ::2, 1::2]
    c, d = even[:, 1::2, ::2], even[:, 1::2, 1::2]
    bands = (a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d)
    return np.concatenate([(band / 2).reshape(n, -1) for band in bands], axis=1)
