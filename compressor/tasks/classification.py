"""One class an image: what it is by its label; or, without labels, by what the original answers.

Agreement: a network is right where it answers as the original does, which is right by definition.
What the original answers is asked by the same engine that other networks' answers come from, so
that rounding decides nothing. Nothing is learned but what it answers to the images as they are
augmented [hinton2015], and its hints: no label enters anything.

[hinton2015] Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.values import Example, Split


@dataclass(frozen=True)
class Classification:
    """One class an image; the metric is the share of right answers.

    Attributes:
        temperature: That answers are divided by before they are compared with the original's;
            the square of it keeps gradients of one size [hinton2015].
        label_smoothing: Share of every label that goes to the other classes.
    """

    temperature: float = 1.0
    label_smoothing: float = 0.0
    name = "accuracy"
    larger_is_better = True
    has_distance = True
    is_share = True

    def posed(self, split: Split, answers: Iterable[Any]) -> Split:
        """The split: its labels are what is judged by."""
        return split

    def lesson(self, temperature: float, label_smoothing: float) -> "Classification":
        """The same with this temperature and smoothing."""
        return Classification(temperature, label_smoothing)

    def distillation(self, asked: float) -> float:
        """As it was asked for."""
        return asked

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of logits `(batch, n_classes)` and labels `(batch,)`."""
        return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)

    def judge(self, outputs: Tensor, targets: Tensor) -> list[tuple[bool, float]]:
        """Whether the answer is right, and its cross-entropy, of every image."""
        right = outputs.argmax(dim=1) == targets
        losses = F.cross_entropy(outputs.double(), targets, reduction="none")
        return list(zip(right.tolist(), losses.tolist(), strict=True))

    def metric(self, judged: Sequence[tuple[bool, float]]) -> float:
        """Share of right answers."""
        return sum(is_right for is_right, _ in judged) / len(judged)

    def distance(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """Kullback-Leibler divergence of softened answers, in nats, times the temperature^2."""
        student = (outputs / self.temperature).log_softmax(dim=1)
        teacher = (wanted / self.temperature).log_softmax(dim=1)
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return divergence * self.temperature**2


CLASSIFICATION = Classification()


@dataclass(frozen=True)
class Agreement:
    """One class an image, that which the original answers; the metric is the share of them.

    Attributes:
        temperature: As for `Classification`.
    """

    temperature: float = 1.0
    name = "agreement"
    larger_is_better = True
    has_distance = True
    is_share = True

    def posed(self, split: Split, answers: Iterable[Tensor]) -> "Answered":
        """The split with the class that the original answers, as the target of every image."""
        return Answered(split, torch.cat([each.argmax(dim=1) for each in answers]))

    def lesson(self, temperature: float, label_smoothing: float) -> "Agreement":
        """Distillation only: there is no label to be smoothed."""
        assert not label_smoothing  # see `Config`
        return Agreement(temperature)

    def distillation(self, asked: float) -> float:
        """All the weight: there is nothing else to learn from."""
        return 1.0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy with the original's answers, which ranks channels; not learned from."""
        return CLASSIFICATION.loss(outputs, targets)

    def judge(self, outputs: Tensor, targets: Tensor) -> list[tuple[bool, float]]:
        """Whether the answer is the original's, and its cross-entropy, of every image."""
        return CLASSIFICATION.judge(outputs, targets)

    def metric(self, judged: Sequence[tuple[bool, float]]) -> float:
        """Share of answers that are the original's."""
        return CLASSIFICATION.metric(judged)

    def distance(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """See `Classification`."""
        return Classification(self.temperature).distance(outputs, wanted)


@dataclass(frozen=True, eq=False)
class Answered:
    """A split whose targets are what the original answers.

    Attributes:
        split: The images; what targets they have is not looked at.
        classes: `(n,)` int64.
    """

    split: Split
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def batch(self, rows: Tensor | slice) -> tuple[Example, Tensor]:
        """Inputs as the model takes them, and the original's classes."""
        return self.split.model_input(rows), self.classes[rows]

    def model_input(self, rows: Tensor | slice) -> Example:
        """The inputs alone."""
        return self.split.model_input(rows)


AGREEMENT = Agreement()
