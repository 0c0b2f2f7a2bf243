"""Searching: one file per strategy; only this package knows BoTorch and Optuna."""

from collections.abc import Mapping
from typing import Any

from compressor.search.bocr import Bocr
from compressor.search.genetic import Genetic
from compressor.search.objective import Strategy
from compressor.search.rivals import CmaEs, RandomSearch, Tpe
from compressor.search.swarm import Swarm

STRATEGIES: Mapping[str, Strategy] = {
    "bocr": Bocr(),
    "bo": Bocr(clusters=False, is_informed=False),
    "random": RandomSearch(),
    "tpe": Tpe(),
    "cma-es": CmaEs(),
    "genetic": Genetic(),
    "swarm": Swarm(),
}


def make_strategy(name: str, **options: Any) -> Strategy:
    """The strategy of that name; `options` are BOCR's, and others ignore them."""
    return Bocr(**options) if name == "bocr" else STRATEGIES[name]
