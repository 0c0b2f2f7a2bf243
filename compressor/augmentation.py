"""What becomes of images while a network learns from them: flipped, shifted, or left alone.

Random erasing is that of [zhong2020], with one shape of rectangle instead of many.

[zhong2020] Zhong et al., Random Erasing Data Augmentation, AAAI 2020.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.rows import is_images
from compressor.values import Split

FLIP, CROP, JITTER, ERASE = "flip", "crop", "jitter", "erase"
MAY_SUIT = (FLIP, CROP)  # what is tried; the others must be asked for
CROP_SHARE = 8  # images are shifted by at most an eighth of their side
ERASE_SHARE = 3  # sides of what is erased: a third of the image's
JITTER_BY = 0.2  # of contrast, and of brightness in standard deviations of the training images
N_TRIED_IMAGES = 500  # that the original must know when they are augmented
LOST_AT_MOST = 0.01  # of accuracy, by an augmentation that suits the data


def augmented(images: Tensor, names: Sequence[str], generator: torch.Generator) -> Tensor:
    """A copy in which each image is changed at random, in ways that `names` names.

    Args:
        images: `(batch, c, h, w)`, as the model takes them: 0 is the mean, of the border that
            comes in and of what is erased.
        names: "jitter" changes contrast and brightness, "flip" mirrors half of the images, "crop"
            shifts them, "erase" blanks a rectangle in half of them.
        generator: Of every draw.
    """
    n, c, h, w = images.shape
    if JITTER in names:
        contrast, brightness = JITTER_BY * (2 * torch.rand(2, n, 1, 1, 1, generator=generator) - 1)
        means = images.mean(dim=(1, 2, 3), keepdim=True)
        images = means + (images - means) * (1 + contrast) + brightness
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
    if ERASE in names:
        high, wide = max(1, h // ERASE_SHARE), max(1, w // ERASE_SHARE)
        top = torch.randint(0, h - high + 1, (n, 1), generator=generator)
        left = torch.randint(0, w - wide + 1, (n, 1), generator=generator)
        is_erased = torch.rand(n, 1, generator=generator) < 0.5
        rows = (torch.arange(h) >= top) & (torch.arange(h) < top + high) & is_erased
        columns = (torch.arange(w) >= left) & (torch.arange(w) < left + wide)
        images = images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
    return images


def suitable(model: nn.Module, split: Split) -> tuple[str, ...]:
    """The augmentations that the network was trained to bear: it answers as well under them.

    Digits must not be flipped, photographs may be; nobody has to say which these are. Nothing is
    known of inputs that are no images.

    Args:
        model: The original.
        split: At most `N_TRIED_IMAGES`, with the classes that are right.
    """
    images, labels = split.batch(slice(0, N_TRIED_IMAGES))
    if not is_images(images):
        return ()
    assert isinstance(images, Tensor)

    def share_right(names: Sequence[str]) -> float:
        seen = augmented(images, names, torch.Generator().manual_seed(0))
        with torch.inference_mode():
            answers = torch.cat([model(batch.clone()) for batch in seen.split(50)])
        return float((answers.argmax(dim=1) == labels).float().mean())

    whole = share_right(())
    return tuple(n for n in MAY_SUIT if share_right((n,)) >= whole - LOST_AT_MOST)
