"""Searching: one file per strategy; only this package knows BoTorch and Optuna."""

from collections.abc import Mapping

from compressor.search.bocr import Bocr
from compressor.search.objective import Strategy

STRATEGIES: Mapping[str, Strategy] = {
    "bocr": Bocr(),
    "bo": Bocr(clusters=False, is_informed=False),
}
