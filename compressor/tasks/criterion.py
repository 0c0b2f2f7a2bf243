"""What answers are judged by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from compressor.values import Split


class Criterion(Protocol):
    """A task, as the product sees it.

    Attributes:
        name: Of the metric.
        larger_is_better: Of the metric.
        has_distance: Whether `distance` is fit to be learned from.
        is_share: Whether the metric is a share of the images. Then a judgement is (is right,
            cross-entropy in nats), and a drop is told in points.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def larger_is_better(self) -> bool: ...  # noqa: D102
    @property
    def has_distance(self) -> bool: ...  # noqa: D102
    @property
    def is_share(self) -> bool: ...  # noqa: D102

    def posed(self, split: Split, answers: Iterable[Any]) -> Split:
        """The split with the targets that answers are judged by.

        Args:
            split: As the data has it.
            answers: Of the original to its images, batch by batch; computed where asked for.
        """

    def lesson(self, temperature: float, label_smoothing: float) -> Criterion:
        """What is learned, where it is not quite what is measured; see `Classification`."""

    def distillation(self, asked: float) -> float:
        """Weight of `distance` in what is learned, where `asked` was; `loss` has the rest."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """See `Task`."""

    def judge(self, outputs: Any, targets: Any) -> Sequence[Any]:
        """See `Task`."""

    def metric(self, judged: Sequence[Any]) -> float:
        """See `Task`; raises `MeasurementError` where it is no number."""

    def distance(self, outputs: Any, wanted: Any) -> Tensor:
        """How far a network's answers are from the original's, mean over the batch; 0: alike."""
