"""A strategy that goes down a ladder: all groups a rung narrower each time."""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from compressor.config import Config
from compressor.search.baselines import untried
from compressor.search.objective import History, Problem, Proposal

N_RUNGS = 20


@dataclass(frozen=True)
class Ladder:
    """Even ratios from wide to narrow; what was proposed before is passed by."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return cls()

    def propose(self, problem: Problem, history: History) -> Proposal | None:
        rung = max(0.0, 1 - history.n_proposed / N_RUNGS)
        points = np.full(len(problem.space.choices), rung)
        generator = np.random.default_rng([problem.seed, history.n_proposed])
        return untried(problem, history, points, "ladder", generator)
