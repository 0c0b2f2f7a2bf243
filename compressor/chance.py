"""Is the original better than chance; and where it is not, what would explain that.

Without labels nobody can tell; but one that answers every image alike is refused.

A network whose classes stand in another order than the data's, or that sees images prepared
otherwise than it was trained on, is right by chance only. Compressing it to the same chance would
end as a success.
"""

import logging
import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest
from torch import Tensor

from compressor.errors import DataError
from compressor.running import cloned
from compressor.tasks import Answered
from compressor.values import Split, batches, call, full_batches

EXPLAINS = 0.5  # of the images right in another order, and better than chance: that is it
FAR_MORE = 1.5  # times as many right as in the given order
MAX_LUCK, N_ORDERS = 0.025, 399  # share of random orders that are as good; how many are tried
WELL_ABOVE = 1.25  # times chance: few images cannot tell, but it looks better
N_NAMED = 6  # classes in a message
NEARLY_ALL = 0.9  # of the images in one class: agreement says little

Predict = Callable[..., Tensor]
logger = logging.getLogger(__name__)

Labels = npt.NDArray[np.int64]


def check_better_than_chance(
    predict: Predict,
    split: Split,
    class_names: Sequence[str],
    *,
    n_right: int,
    batch_size: int,
    is_folder: bool = True,
) -> None:
    """Whether the original has more images right than its answers would have by chance.

    Part of the classes may stand where they should (0 and 1, where 10 comes before 2), so that it
    is better than chance; where another order has far more right, it is refused as well.

    Chance is what answers of the same kinds in a random order would have right: the sum over
    classes of their share among the answers times that among the labels.

    Args:
        predict: Inputs to logits `(batch_size, n_outputs)`.
        split: Images and labels.
        class_names: In the order of the labels.
        n_right: Of `split`.
        batch_size: Of every call.
        is_folder: Whether classes are folders, whose order `--classes` gives.

    Raises:
        DataError: It has not, beyond doubt; the usual causes are told, and an order of the
            classes in which it would be right.
    """
    labels = _labels(split, batch_size)
    commonest = np.bincount(labels).max() / len(labels)
    low, high = _interval(n_right, len(labels))
    if low > max(commonest, EXPLAINS):
        return  # whatever it answers
    answers, n_outputs = _answers(predict, split, batch_size)
    way = "--classes FILE gives it, a name a line" if is_folder else "renumber the labels"
    chance = _chance(answers, labels)
    explained = _explained(answers, labels, n_outputs, class_names, is_folder)
    luck = _luck(answers, labels)
    if luck <= MAX_LUCK and not explained:
        return
    if n_right >= WELL_ABOVE * chance * len(labels) and not explained:
        logger.warning(
            "the original has %.1f %% of %d search images right, chance %.1f %%; give more images "
            "to tell them apart",
            100 * n_right / len(labels),
            len(labels),
            100 * chance,
        )
        return
    raise DataError(
        f"The original has {n_right / len(labels):.1%} of the {len(labels)} search images right "
        f"(95 % interval {low:.1%} to {high:.1%}), where chance has {chance:.1%}. Either the "
        f"classes stand in another order than the network's outputs ({way}), or images are "
        f"prepared otherwise than in training (--mean, --std, --image-size), or these are not "
        f"the trained weights."
        f"{explained}"
    )


def check_answers_differ(split: Split) -> None:
    """Whether the original tells images apart; where it does not, agreement means nothing.

    Args:
        split: As `Agreement.posed` made it.

    Raises:
        DataError: It answers the same class to every image.
    """
    assert isinstance(split, Answered)
    counts = np.bincount(split.classes.numpy())
    most, share = int(counts.argmax()), float(counts.max() / counts.sum())
    if share == 1:
        raise DataError(
            f"The original answers class {most} to each of the {len(split)} search images, and a "
            f"network that answers nothing else would agree with it; expected several classes. "
            f"Either images are prepared otherwise than in training (--mean, --std, "
            f"--image-size), or these are not the trained weights, or the images are too few or "
            f"all alike."
        )
    if share > NEARLY_ALL:
        logger.warning(
            "the original answers class %d to %.1f %% of the %d search images; a network that "
            "answers nothing else agrees with it on as many",
            most,
            100 * share,
            len(split),
        )


def _labels(split: Split, batch_size: int) -> Labels:
    found = [torch.as_tensor(labels) for _, labels in batches(split, batch_size)]
    return torch.cat(found).numpy().astype(np.int64)


def _answers(predict: Predict, split: Split, batch_size: int) -> tuple[Labels, int]:
    """The class that each image is taken for, and how many the network knows."""
    found, n_outputs = [], 0
    with torch.inference_mode():
        for images, _, n_new in full_batches(split, batch_size):
            logits = call(predict, cloned(images))[:n_new]
            n_outputs = logits.shape[1]
            found.append(logits.argmax(dim=1).numpy())
    return np.concatenate(found), n_outputs


def _chance(answers: Labels, labels: Labels) -> float:
    n_classes = int(max(answers.max(), labels.max())) + 1
    of_answers, of_labels = (np.bincount(x, minlength=n_classes) for x in (answers, labels))
    return float(of_answers @ of_labels) / len(labels) ** 2


def _luck(answers: Labels, labels: Labels) -> float:
    """How often the same answers in a random order have as many right, as a share."""
    n_right = int((answers == labels).sum())
    generator = np.random.default_rng(0)
    n_as_good = sum(
        int((generator.permutation(answers) == labels).sum()) >= n_right for _ in range(N_ORDERS)
    )
    return (1 + n_as_good) / (1 + N_ORDERS)


def _interval(n_right: int, n: int) -> tuple[float, float]:
    """Wilson's, 95 %."""
    found = binomtest(n_right, n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def _explained(
    answers: Labels, labels: Labels, n_outputs: int, class_names: Sequence[str], is_folder: bool
) -> str:
    """An order of the classes in which most answers would be right, in words; else nothing.

    It is found on half of the images and judged on the others.
    """
    fitted, judged = np.arange(len(labels)) % 2 == 0, np.arange(len(labels)) % 2 == 1
    counts = np.zeros((n_outputs, max(n_outputs, len(class_names))))
    np.add.at(counts, (answers[fitted], labels[fitted]), 1)
    _, means = linear_sum_assignment(-counts)  # output -> class
    if not judged.any():
        return ""
    right = float(np.mean(means[answers[judged]] == labels[judged]))
    if right < max(EXPLAINS, FAR_MORE * float(np.mean(answers == labels))):
        return ""
    numbers = sorted(range(len(class_names)), key=lambda i: _as_number(class_names[i]))
    said = f" In another order of the classes {right:.0%} would be right"
    seen = np.unique(answers)
    if (
        is_folder
        and n_outputs == len(class_names)
        and all(means[each] == numbers[each] for each in seen)
    ):
        names = ", ".join(class_names[i] for i in numbers[:N_NAMED])
        return f"{said}: {names}, ..., as numbers are sorted. Give it with --classes FILE."
    pairs = (f"output {each} is {class_names[means[each]]}" for each in seen[:N_NAMED])
    way = "Give it with --classes FILE." if is_folder else "Renumber the labels like that."
    return f"{said}: {', '.join(pairs)}, .... {way}"


def _as_number(name: str) -> tuple[tuple[int, str], ...]:
    """By which people sort 2 before 10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)
