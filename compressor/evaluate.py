"""A model's answers + data -> accuracy with its standard error; and do two models agree.

Whatever answers is a function from images `(batch, c, h, w)` to logits `(batch, n_classes)`: a
torch module in eval mode, or a session of any runtime.
"""

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import EquivalenceError, MeasurementError
from compressor.values import Accuracy, Split

Predict = Callable[[Tensor], Tensor]

# Float32 sums in another order differ by about 1e-6 of the largest term a layer; deep networks
# and other kernels (Winograd) reach 1e-4. A wrong channel shows at 1e-1.
TOLERANCE = 1e-3


def accuracy(predict: Predict, split: Split, *, batch_size: int) -> Accuracy:
    """Top-1 accuracy on all of `split`, and the loss.

    Args:
        predict: Images to logits.
        split: Labelled images.
        batch_size: Every call gets exactly this many; the last batch is padded.

    Raises:
        MeasurementError: An answer is NaN or infinite.
    """
    n_right, loss = 0, 0.0
    for logits, labels in _answers(predict, split, batch_size):
        n_right += int((logits.argmax(dim=1) == labels).sum())
        loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
    return Accuracy(n_right / len(split), len(split), loss / len(split))


def right_answers(predict: Predict, split: Split, *, batch_size: int) -> Tensor:
    """`(n,)` bool: which images of `split` are answered rightly; see `accuracy`."""
    pairs = _answers(predict, split, batch_size)
    return torch.cat([logits.argmax(dim=1) == labels for logits, labels in pairs])


def drop_of(before: Tensor, after: Tensor) -> tuple[float, float]:
    """How much accuracy is lost between two networks on the same images, and its standard error.

    Both answer most images alike, so the error of the difference is far below that of either
    accuracy.

    Args:
        before: `(n,)` bool, which images the one answers rightly.
        after: The same of the other.
    """
    change = before.double() - after.double()
    return float(change.mean()), float(change.std(correction=1) / len(change) ** 0.5)


def _answers(predict: Predict, split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels of every batch."""
    with torch.inference_mode():
        for images, labels in split.batches(batch_size):
            n_missing = batch_size - len(images)
            if n_missing:
                images = torch.cat([images, images[:1].expand(n_missing, -1, -1, -1)])
            logits = predict(images)[: len(labels)]
            if not torch.isfinite(logits).all():
                raise MeasurementError("The network's answers to real images are not finite.")
            yield logits, labels


def memory_format(model: nn.Module, images: Tensor) -> torch.memory_format:
    """Channels-last, in which torch is up to 1.6 times faster here, where `model` can run in it.

    Networks that call `view` on feature maps cannot.

    Args:
        model: Not changed.
        images: `(batch, c, h, w)`, as the model takes them.
    """
    arranged = copy.deepcopy(model).to(memory_format=torch.channels_last)
    try:
        with torch.inference_mode():
            arranged(images.to(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def check_agree(what: str, expected: Predict, got: Predict, images: Tensor) -> float:
    """Largest absolute difference of two models' outputs on `images`, which must be small.

    Args:
        what: The two engines, for the message.
        expected: Images to logits.
        got: Images to logits; called with one image at a time.
        images: `(n, c, h, w)`, real ones, as the models take them.

    Raises:
        EquivalenceError: The difference exceeds `TOLERANCE` times the largest output, or shapes
            differ, or an output is not finite, or a model cannot run at all.
    """
    try:
        with torch.inference_mode():
            want = expected(images)
            have = torch.cat([got(image[None]) for image in images])
    except (RuntimeError, ValueError, IndexError) as err:
        raise EquivalenceError(
            f"{what} cannot be compared: one fails on real images: {err}"
        ) from err
    if have.shape != want.shape:
        raise EquivalenceError(
            f"{what} disagree: outputs are {tuple(want.shape)} and {tuple(have.shape)}."
        )
    error, largest = float((have - want).abs().max()), float(want.abs().max())
    if not np.isfinite(error):
        raise EquivalenceError(f"{what}: outputs are NaN or infinite on real images.")
    if error > TOLERANCE * max(1.0, largest):
        raise EquivalenceError(
            f"{what} disagree: outputs differ by up to {error:.3g} where the largest is "
            f"{largest:.3g} ({len(images)} real images, float32). No model was written."
        )
    return error
