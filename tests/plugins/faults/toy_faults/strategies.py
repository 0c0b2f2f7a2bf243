"""Strategies that are none."""

from dataclasses import dataclass
from typing import ClassVar, Self

from compressor.config import Config
from compressor.search.objective import History, Problem, Proposal

RUNGS = 20  # no strategy at all


@dataclass(frozen=True)
class Stubborn:
    """Proposes the original, which is no new plan."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return cls()

    def propose(self, problem: Problem, history: History) -> Proposal | None:
        return Proposal(problem.space.original, "stubborn")


@dataclass(frozen=True)
class Raising(Stubborn):
    """Fails in the middle of a search, and means to end the program."""

    def propose(self, problem: Problem, history: History) -> Proposal | None:
        raise SystemExit("I have had enough")
