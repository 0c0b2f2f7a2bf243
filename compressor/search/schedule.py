"""When BOCR changes its phase."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Schedule:
    """When a search of `n_trials` changes phase; the paper's numbers at 200 trials.

    Attributes:
        n_start: Trials of the start design; at least 5.
        earliest: Trial from which a rollback may happen.
        latest: Trial at which it happens at the latest.
        patience: Trials without improvement that bring it about in between.
        second_earliest: The same for the second rollback of a gradual one.
        second_latest: The same for the second rollback of a gradual one.
    """

    n_start: int
    earliest: int
    latest: int
    patience: int
    second_earliest: int
    second_latest: int

    @classmethod
    def scaled(cls, n_trials: int) -> Self:
        """The paper's schedule (10, 80, 100, 20, 130, 150 of 200) scaled to `n_trials`."""
        return cls(
            n_start=min(n_trials, max(5, n_trials // 20)),
            earliest=round(0.4 * n_trials),
            latest=round(0.5 * n_trials),
            patience=max(3, round(0.1 * n_trials)),
            second_earliest=round(0.65 * n_trials),
            second_latest=round(0.75 * n_trials),
        )
