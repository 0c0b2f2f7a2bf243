"""Which images a split has, and whether another one has them too."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from compressor.containers import tensors_in
from compressor.datasets.arrays import Inputs
from compressor.datasets.files import ImageFiles
from compressor.errors import DataError
from compressor.values import SPLITS, Images, LabelledImages, LabelledInputs

FEW = 0.01  # of the images may be in two splits, or beside the class folders

Stored = Images | Inputs

logger = logging.getLogger(__name__)


def check_disjoint(source: Path, splits: Mapping[str, LabelledImages | LabelledInputs]) -> None:
    """No image in two splits: accuracy on an image the model was fitted to proves nothing.

    Raises:
        DataError: More than a few are.
    """
    seen = {name: _digests(split.images) for name, split in splits.items()}
    for one, other in (("fit", "test"), ("search", "test"), ("fit", "search")):
        if one not in seen:
            continue
        n_shared = len(seen[one] & seen[other])
        if n_shared > FEW * len(splits[other]):  # a few duplicates are usual in real data
            raise DataError(
                f"{source}: {n_shared} of {len(splits[other])} images of the {other} split are "
                f"also in the {one} split; the splits must not overlap."
            )
        if n_shared:
            logger.warning("%s: %d images of %s are in %s too", source, n_shared, other, one)


def _digests(images: Stored) -> set[bytes]:
    """Of every image; of a file on disk, its size and its beginning."""
    if isinstance(images, ImageFiles):
        return set(images.digests)
    stored = [each.numpy() for each in tensors_in(images)]
    return {
        hashlib.blake2b(b"".join(each.tobytes() for each in row), digest_size=16).digest()
        for row in zip(*stored, strict=True)
    }


def fingerprint(splits: Mapping[str, LabelledImages | LabelledInputs]) -> str:
    """Of all images and labels, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name in filter(splits.__contains__, SPLITS):
        images = splits[name].images
        if isinstance(images, ImageFiles):
            digest.update(f"{name} {tuple(images.shape)}".encode())
            digest.update(b"".join(images.digests))
        for each in tensors_in(images):
            digest.update(f"{name} {tuple(each.shape)}".encode())
            digest.update(np.ascontiguousarray(each.numpy()).data)
        digest.update(splits[name].labels.numpy().data)
    return digest.hexdigest()


def kind(images: Stored) -> str:
    """Names, kinds and shapes of what one example has."""
    if isinstance(images, dict):
        return ", ".join(f"{name} {kind(each)}" for name, each in sorted(images.items()))
    if isinstance(images, tuple):
        return ", ".join(map(kind, images))
    return f"{images.dtype} {tuple(images.shape[1:])}"
