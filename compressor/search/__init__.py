"""Searching: one file per strategy; only this package knows BoTorch and Optuna.

`plugins.STRATEGIES` has their names; a package may bring more.
"""

from typing import cast

from compressor.config import Config
from compressor.plugins import STRATEGIES
from compressor.search.objective import Strategy


def make_strategy(config: Config) -> Strategy:
    """The strategy that is asked for.

    Raises:
        PluginError: It is of a package that cannot be used.
    """
    strategy = cast(type[Strategy], STRATEGIES.load(config.search))
    with STRATEGIES.running(config.search):
        return strategy.from_config(config)
