"""A model's answers + data -> accuracy with its standard error; and do two models agree.

Whatever answers is called as the network is, with tensors of `(batch, ...)`, and returns what the
network does, for classification logits `(batch, n_classes)`: a torch module in eval mode, or a
session of any runtime.

[efron1982] Efron, The Jackknife, the Bootstrap and Other Resampling Plans, SIAM 1982.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.containers import answers_in, tensors_in
from compressor.errors import EquivalenceError, MeasurementError, TaskError
from compressor.rows import arranged, each_alone, holds_maps, n_rows
from compressor.running import cloned
from compressor.tasks import CLASSIFICATION, Criterion
from compressor.values import Accuracy, Example, Split, call, full_batches

Predict = Callable[..., Any]

N_PARTS = 50  # of the images, each left out once by the jackknife

# Float32 sums in another order differ by about 1e-6 of the largest term a layer; deep networks
# and other kernels (Winograd) reach 1e-4. A wrong channel shows at 1e-1.
TOLERANCE = 1e-3


def accuracy(
    predict: Predict,
    split: Split,
    *,
    batch_size: int,
    criterion: Criterion = CLASSIFICATION,
    original: float | None = None,
) -> Accuracy:
    """Accuracy on all of `split`, with what its standard error follows from.

    Args:
        predict: Inputs to answers.
        split: Inputs and what is to be answered.
        batch_size: Every call gets exactly this many; the last batch is filled up.
        criterion: What answers are judged by.
        original: The original's metric, of a task that is no classification; None where this is
            the original.

    Raises:
        MeasurementError: An answer, or the metric, is NaN or infinite.
        TaskError: The task's own code failed, or the original's metric is not above 0.
    """
    judged = judgements(predict, split, batch_size=batch_size, criterion=criterion)
    value = criterion.metric(judged)
    if criterion.is_share:
        loss = sum(loss for _, loss in judged) / len(split)
        return Accuracy(value, len(split), loss, name=criterion.name)
    whole = value if original is None else original
    if whole <= 0:
        raise TaskError(
            f"The original's {criterion.name} is {whole:g}; expected a metric above 0, because "
            f"what is kept of it is told as a share."
        )
    parts = [_share(each, whole, criterion) for each in _without_parts(judged, criterion)]
    spread = _jackknife_error(parts)
    kept = _share(value, whole, criterion)
    return Accuracy(kept, len(split), None, value, spread, f"{criterion.name} kept")


def judgements(
    predict: Predict, split: Split, *, batch_size: int, criterion: Criterion = CLASSIFICATION
) -> list[Any]:
    """What `criterion` says of every image of `split`; see `accuracy`."""
    found: list[Any] = []
    with torch.inference_mode():
        for answers, targets, n_new in _answered(predict, split, batch_size):
            found += criterion.judge(answers, targets)[:n_new]
    return found


def posed(
    original: Callable[[], Predict], split: Split, *, batch_size: int, criterion: Criterion
) -> Split:
    """The split with the targets that `criterion` judges by: its own, or the original's answers.

    Args:
        original: Makes what maps images to answers; called only where answers are needed.
        split: Images.
        batch_size: Every call gets exactly this many; the last batch is padded.
        criterion: What answers are judged by.

    Raises:
        MeasurementError: An answer is NaN or infinite.
    """

    def answers() -> Iterator[Any]:
        for each, _, n_new in _answered(original(), split, batch_size):
            yield each[:n_new]

    with torch.no_grad():  # and not in inference mode: gradients may be taken with these targets
        return criterion.posed(split, answers())


def _answered(predict: Predict, split: Split, batch_size: int) -> Iterator[tuple[Any, Any, int]]:
    """Answers, targets, and how many of them count, batch by batch; see `full_batches`."""
    for inputs, targets, n_new in full_batches(split, batch_size):
        answers = call(predict, cloned(inputs))
        if not all(each.isfinite().all() for each in tensors_in(answers)):
            raise MeasurementError("The network's answers to real images are not finite.")
        yield answers, targets, n_new


def drop_of(
    before: Sequence[Any], after: Sequence[Any], criterion: Criterion = CLASSIFICATION
) -> tuple[float, float]:
    """How much accuracy is lost between two networks on the same images, and its standard error.

    Both answer most images alike, so the error of the difference is far below that of either
    accuracy. It is the jackknife's over `N_PARTS` parts of the images [efron1982], which fits any
    metric.

    Args:
        before: Judgements of the one's answers.
        after: The same of the other.
        criterion: Whose judgements they are.
    """

    def drop(one: float, other: float) -> float:
        if criterion.is_share:
            return one - other
        return 1 - _share(other, one, criterion)

    pairs = zip(_without_parts(before, criterion), _without_parts(after, criterion), strict=True)
    error = _jackknife_error([drop(one, other) for one, other in pairs])
    return drop(criterion.metric(before), criterion.metric(after)), error


def _share(metric: float, whole: float, criterion: Criterion) -> float:
    """What is kept of `whole`: 1 for all of it, 0 for nothing."""
    if criterion.larger_is_better:
        return max(0.0, metric / whole)
    return whole / max(metric, 1e-12)


def _without_parts(judged: Sequence[Any], criterion: Criterion) -> list[float]:
    """The metric without each part of the images in turn; parts are drawn at random."""
    n = len(judged)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    n_parts = min(n, N_PARTS)
    found = []
    for part in range(n_parts):
        gone = set(order[part::n_parts])
        found.append(criterion.metric([each for i, each in enumerate(judged) if i not in gone]))
    return found


def _jackknife_error(values: Sequence[float]) -> float:
    """Standard error of a figure, from its values without each of so many parts [efron1982]."""
    return float(np.sqrt((len(values) - 1) * np.var(values)))


def memory_format(model: nn.Module, images: Example) -> torch.memory_format:
    """Channels-last, in which torch is up to 1.6 times faster here, where `model` can run in it.

    Networks that call `view` on feature maps cannot, and what reads no maps has no such layout.

    Args:
        model: Not changed.
        images: `(batch, c, h, w)`, as the model takes them; other inputs have no layout.
    """
    if not holds_maps(images):
        return torch.contiguous_format
    rearranged = nn.Module.to(copy.deepcopy(model), memory_format=torch.channels_last)
    try:
        with torch.inference_mode():
            call(rearranged, arranged(cloned(images), torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def check_agree(
    what: str, expected: Predict, got: Predict, images: Example, *, tolerance: float = TOLERANCE
) -> float:
    """Largest absolute difference of two models' outputs on `images`, which must be small.

    Args:
        what: The two engines, for the message.
        expected: Inputs to answers.
        got: Inputs to answers; called with one input at a time.
        images: `(n, ...)`, real ones, as the models take them.
        tolerance: Of the largest output.

    Raises:
        EquivalenceError: The difference exceeds `tolerance` times the largest output, or shapes
            differ, or an output is not finite, or a model cannot run at all.
    """
    try:
        with torch.inference_mode():
            want = answers_in(call(expected, cloned(images)))
            alone = [answers_in(call(got, cloned(image))) for image in each_alone(images)]
            parts = list(zip(*alone, strict=True))
            have = [
                torch.cat(part, dim=_batch_dim(whole, part))
                for whole, part in zip(want, parts, strict=False)
            ]
            have += [torch.cat(part) for part in parts[len(want) :]]
    except (RuntimeError, ValueError, IndexError) as err:
        raise EquivalenceError(
            f"{what} cannot be compared: one fails on real images: {err}"
        ) from err
    return check_alike(f"{what} disagree", want, have, n_rows(images), tolerance=tolerance)


def check_alike(
    what: str, want: list[Tensor], have: list[Tensor], n: int, *, tolerance: float = TOLERANCE
) -> float:
    """Largest absolute difference of two models' answers; see `check_agree`.

    Args:
        what: Of the message, which says that they disagree.
        want: Answers of the one model.
        have: Answers of the other.
        n: Inputs, for the message.
        tolerance: Of the largest output.
    """
    shapes = [[tuple(t.shape) for t in side] for side in (want, have)]
    if shapes[0] != shapes[1]:
        wanted, got_ = (", ".join(map(str, side)) for side in shapes)
        raise EquivalenceError(f"{what}: outputs are {wanted} and {got_}.")
    pairs = list(zip(want, have, strict=True))
    errors = [float((h.double() - w.double()).abs().max()) for w, h in pairs]
    largest = [float(w.abs().max()) for w in want]
    if not np.isfinite(errors).all():
        raise EquivalenceError(f"{what}: outputs are NaN or infinite on real images.")
    for error, most in zip(errors, largest, strict=True):
        if error > tolerance * max(1.0, most):
            raise EquivalenceError(
                f"{what}: outputs differ by up to {error:.3g} where the largest is "
                f"{most:.3g} ({n} real images). No model was written."
            )
    return max(errors)


def _batch_dim(whole: Tensor, alone: Sequence[Tensor]) -> int:
    """Along which inputs lie in an answer to all of them, beside answers to each; 0 in doubt."""
    sizes = zip(whole.shape, alone[0].shape, strict=False)
    differing = [dim for dim, (of_all, of_one) in enumerate(sizes) if of_all != of_one]
    return differing[0] if len(differing) == 1 else 0
