"""What becomes of images while a network learns from them: flipped, shifted, or left alone."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.values import Split, draw

FLIP, CROP = "flip", "crop"
AUGMENTATIONS = (FLIP, CROP)
CROP_SHARE = 8  # images are shifted by at most an eighth of their side
N_TRIED_IMAGES = 500  # that the original must know when they are augmented
LOST_AT_MOST = 0.01  # of accuracy, by an augmentation that suits the data


def augmented(images: Tensor, names: Sequence[str], generator: torch.Generator) -> Tensor:
    """A copy in which every image is flipped or not, and shifted, at random.

    Args:
        images: `(batch, c, h, w)`, as the model takes them: the border that comes in is 0, the
            mean.
        names: Of `AUGMENTATIONS`.
        generator: Of every draw.
    """
    n, c, h, w = images.shape
    if FLIP in names:
        flips = torch.rand(n, generator=generator) < 0.5
        images = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
    if CROP in names:
        most = max(1, max(h, w) // CROP_SHARE)
        padded = F.pad(images, [most] * 4)
        top, left = torch.randint(0, 2 * most + 1, (2, n), generator=generator)
        rows = (top[:, None] + torch.arange(h)).view(n, 1, h, 1)
        columns = (left[:, None] + torch.arange(w)).view(n, 1, 1, w)
        each = torch.arange(n).view(n, 1, 1, 1)
        images = padded[each, torch.arange(c).view(1, c, 1, 1), rows, columns]
    return images


def suitable(model: nn.Module, split: Split) -> tuple[str, ...]:
    """The augmentations that the network was trained to bear: it answers as well under them.

    Digits must not be flipped, photographs may be; nobody has to say which these are.

    Args:
        model: The original.
        split: Labelled images; a few are looked at.
    """
    images, labels = split.batch(draw(split, N_TRIED_IMAGES))

    def share_right(names: Sequence[str]) -> float:
        seen = augmented(images, names, torch.Generator().manual_seed(0))
        with torch.inference_mode():
            answers = torch.cat([model(batch) for batch in seen.split(50)])
        return float((answers.argmax(dim=1) == labels).float().mean())

    whole = share_right(())
    return tuple(n for n in AUGMENTATIONS if share_right((n,)) >= whole - LOST_AT_MOST)
