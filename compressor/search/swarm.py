"""ACP: particle swarm seeded by clusters of alike feature maps [chang2022].

[chang2022] Chang, Lu, Xue, Xu, Wei, Automatic channel pruning via clustering and swarm
    intelligence optimization for CNN, Applied Intelligence 52, 2022, and its released code.

Particle 0 has as many channels a group as its feature maps have clusters; the others lie around
it, the later the further. Then, every cycle, each particle moves in some randomly chosen groups,
drawn to its own best place and to that of all.

Where we deviate, and why:

* The code has no cost in its fitness, so what is saved follows from the clusters' `eps` alone. We
  search under a limit: of the prepared values of `eps` the one is taken whose plan is expected to
  lie nearest to the limit in MACs, and plans beyond the limit are penalised.
* Fitness is the accuracy of a trial, after repair, not that of three epochs of training: all
  searches are compared at the same cost.
* The code updates the velocities of the first eight layers and moves eight random ones; here
  those are the same. Both draws are independent, as in other swarms.
* Where time is limited, nobody knows which plan meets the limit: later particles lie nearer to the
  narrowest plan.
* A residual branch is a variable from 0 to 1 that is there from 0.5 on; particle 0 has them all.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from compressor.search.baselines import untried, worth
from compressor.search.objective import (
    FEATURES,
    TIME,
    History,
    Problem,
    Proposal,
    WithoutSettings,
)
from compressor.search.space import Ratios

N_CYCLES = 8  # of the inertia's fall; it stays at its last value
SPREAD = 0.05  # of particle i, times i, as a share of the range; the code's is one channel
MAX_VELOCITY = 2.0
CONSTRICTION = 0.729
STEP = 0.05  # of a unit of velocity, as a share of the range


@dataclass(frozen=True)
class Swarm(WithoutSettings):
    """See the module.

    Attributes:
        n_particles: In the swarm.
        n_moved: Variables that move in one cycle.
    """

    n_particles: int = 10
    n_moved: int = 8
    needs: ClassVar[frozenset[str]] = frozenset({FEATURES})

    def propose(self, problem: Problem, history: History) -> Proposal | None:
        """See `Strategy.propose`; the swarm's way so far is gone again."""
        trials = history.trials
        generator = np.random.default_rng(problem.seed)
        n = len(problem.space.choices)
        centre = first_particle(problem)
        signs = generator.integers(-1, 2, size=(self.n_particles, n))
        spread = SPREAD * np.arange(self.n_particles)[:, None]
        places = np.clip(centre + spread * signs, 0, 1)
        if TIME in problem.objective.limits:
            places *= np.linspace(1, problem.objective.limits[TIME], self.n_particles)[:, None]
        velocities = generator.uniform(-MAX_VELOCITY, MAX_VELOCITY, size=(self.n_particles, n))
        own_best, own_worth = places.copy(), np.full(self.n_particles, -np.inf)
        for cycle in range(len(trials) // self.n_particles + 1):
            done = trials[cycle * self.n_particles : (cycle + 1) * self.n_particles]
            if len(done) < self.n_particles:
                drawn = np.random.default_rng([problem.seed, history.n_proposed])
                return untried(problem, history, places[len(done)], "swarm", drawn)
            for i, trial in enumerate(done):
                if worth(trial, problem) > own_worth[i]:
                    own_best[i], own_worth[i] = places[i], worth(trial, problem)
            best = own_best[int(own_worth.argmax())]
            inertia = 0.5 * (N_CYCLES - min(cycle, N_CYCLES - 1)) / 20 + 0.4
            for i in range(self.n_particles):
                moved = generator.choice(n, min(self.n_moved, n), replace=False)
                places[i, moved] = np.clip(
                    places[i, moved] + 2 * STEP * velocities[i, moved], 0, 1
                )
                first, second = generator.random(2)
                drawn_to = 2 * first * (own_best[i] - places[i]) + 2 * second * (best - places[i])
                velocity = CONSTRICTION * (inertia * velocities[i] + drawn_to / STEP)
                velocities[i, moved] = np.clip(velocity, -MAX_VELOCITY, MAX_VELOCITY)[moved]
        raise AssertionError


def first_particle(problem: Problem) -> Ratios:
    """`(n_variables,)` in [0, 1], from each variable's floor to whole: clusters of alike maps."""
    space = problem.space
    limits = problem.objective.limits
    wanted = min(limits.values(), default=0.5)
    found: list[tuple[float, Ratios]] = []
    n_values = max((len(f.n_distinct) for f in problem.features.values()), default=0)
    for at in range(n_values):
        ratios = np.ones(len(space.choices))
        for i, group in enumerate(space.groups):
            if group.name in problem.features:
                ratios[i] = problem.features[group.name].n_distinct[at] / group.n_channels
        share = float(problem.costs.macs(space.snap(ratios[None]))[0])
        found.append((abs(share - wanted), ratios))
    if not found:
        return np.full(len(space.choices), 0.7)
    ratios = min(found, key=lambda pair: pair[0])[1]
    return np.clip(space.points_of(ratios), 0, 1)
