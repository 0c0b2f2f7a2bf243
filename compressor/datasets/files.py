"""Images that are files: read by Pillow, and left on disk where they are many."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from compressor.errors import DataError
from compressor.files import UNREADABLE

# What Pillow may take a file for, whatever it is called: those of `IMAGE_SUFFIXES`. Of others, EPS
# runs Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF")
DIGEST_BYTES = 16 * 1024  # of a file on disk, which tell whether it is in two splits

Read = Callable[[Path], np.ndarray]


class ImageFiles:
    """Images that stay on disk.

    Attributes:
        paths: A file an image.
        read: File to `(c, h, w)` uint8.
    """

    dtype = torch.uint8

    def __init__(self, paths: Sequence[Path], read: Read, shape: tuple[int, ...]) -> None:
        """Nothing is read yet.

        Args:
            paths: A file an image.
            read: File to pixels.
            shape: `(c, h, w)` of every image.
        """
        self.paths, self.read = tuple(paths), read
        self.shape = torch.Size((len(self.paths), *shape))
        self._readers = ThreadPoolExecutor(thread_name_prefix="images")

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """One a file: of its size and its beginning."""
        return tuple(map(_file_digest, self.paths))

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """`(n_rows, c, h, w)`, several files at once: Pillow decodes outside Python's lock."""
        numbers = range(len(self.paths))[rows] if isinstance(rows, slice) else rows.tolist()
        images = list(self._readers.map(self.read, [self.paths[i] for i in numbers]))
        if not images:
            return torch.empty((0, *self.shape[1:]), dtype=self.dtype)
        return torch.from_numpy(np.stack(images))


def reader(image_size: int | None, n_channels: int) -> Read:
    """What turns a file into `(c, h, w)` uint8, resized and cropped where a size is given."""

    def read(path: Path) -> np.ndarray:
        try:
            with Image.open(path, formats=FORMATS) as file:
                if file.mode.startswith(("I", "F")):  # converting would clip them to white
                    raise DataError(
                        f"{path} has {file.mode} pixels; expected 8 bits a channel. "
                        f"Convert it as the network was trained, or give an .npz of float32."
                    )
                image = file.convert("L" if n_channels == 1 else "RGB")
        except (*UNREADABLE, Image.DecompressionBombError) as err:
            raise DataError(f"{path} cannot be read as an image: {err}.") from err
        if image_size is not None:
            scale = image_size / min(image.size)
            width, height = (max(image_size, round(side * scale)) for side in image.size)
            left, top = (width - image_size) // 2, (height - image_size) // 2
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            image = image.crop((left, top, left + image_size, top + image_size))
        pixels = np.asarray(image, dtype=np.uint8)
        return pixels[None] if n_channels == 1 else pixels.transpose(2, 0, 1)

    return read


def _file_digest(path: Path) -> bytes:
    digest = hashlib.blake2b(str(path.stat().st_size).encode(), digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(DIGEST_BYTES))
    return digest.digest()
