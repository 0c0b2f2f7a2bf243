"""Class folders and their image files, in the order of torchvision's `ImageFolder`.

Links to folders are followed, as it does. Unlike it, hidden files and folders are left out
(`.ipynb_checkpoints` would be a class of its own), and names that differ only in how accents are
encoded are one name: macOS and Linux write them differently.
"""

import logging
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from compressor.errors import DataError
from compressor.files import read_text
from compressor.inputs import IMAGE_SUFFIXES, folders, loose_images

MAX_NAMES_BYTES = 2**20  # of class folders; those of ImageNet have 30 KiB
MAX_SHOWN = 60  # characters of a name

logger = logging.getLogger(__name__)


def class_folders(folder: Path) -> dict[str, Path]:
    """Class -> its folder, sorted as the names stand on disk.

    Raises:
        DataError: Two names are the same but for how accents are encoded.
    """
    found: dict[str, Path] = {}
    for path in folders(folder):
        name = unicodedata.normalize("NFC", path.name)
        if name in found:
            raise DataError(
                f"{folder} has two folders of class {name}, whose accents are encoded in two ways "
                f"(NFC and NFD); put their images into one."
            )
        found[name] = path
    return found


def class_order(file: Path, names: Sequence[str], folder: Path) -> tuple[str, ...]:
    """The names in `file`, which are those of the class folders in another order.

    Args:
        file: Text, a name a line.
        names: Of the class folders.
        folder: Where these lie.

    Raises:
        DataError: A name is missing, unknown or there twice, or the file cannot be read.
    """
    try:
        lines = read_text(file, MAX_NAMES_BYTES).removeprefix("\ufeff").split("\n")
    except (OSError, ValueError) as err:
        raise DataError(f"--classes {file} cannot be read as text: {err}.") from err
    order = tuple(unicodedata.normalize("NFC", line.strip()) for line in lines if line.strip())
    twice = sorted(name for name, n in Counter(order).items() if n > 1)
    unknown, missing = sorted(set(order) - set(names)), sorted(set(names) - set(order))
    faults = [
        f"{what}: {', '.join(name[:MAX_SHOWN] for name in which[:5])}"
        for what, which in (
            ("there twice", twice),
            ("no class folder", unknown),
            ("not in the file", missing),
        )
        if which
    ]
    if faults:
        raise DataError(
            f"--classes {file} must name every class folder of {folder} once, in the order of the "
            f"network's outputs; {'; '.join(faults)}."
        )
    return order


def check_no_classes_beside(source: Path, splits: Sequence[Path]) -> None:
    """Whether splits that hold images alone may be what they are called, not classes.

    Raises:
        DataError: Other folders beside them hold images too.
    """
    others = [path for path in folders(source) if path not in splits and loose_images(path)]
    if others:
        names = (", ".join(path.name for path in which[:5]) for which in (splits, others))
        raise DataError(
            "{} holds images in {} and in {}; the first are names of splits, the others are not. "
            "Where all are classes, put them into {}; else move the others away.".format(
                source, *names, source / "train"
            )
        )


def image_files(folder: Path) -> list[Path]:
    """The image files in and below `folder`, by folder and name.

    Raises:
        DataError: Folders below it cannot be read.
    """
    found: list[tuple[str, list[Path]]] = []
    no_files: list[Path] = []
    try:
        n_hidden = _walk(folder, (), found, no_files)
    except (OSError, RecursionError) as err:  # a link to where nobody may look, or very deep
        raise DataError(f"What lies in {folder} cannot be read: {err}.") from err
    if n_hidden:
        logger.warning("%s: %d hidden files or folders are left out", folder, n_hidden)
    if no_files:
        text = "%s is no file (a link to nothing, or a pipe); %d such are left out"
        logger.warning(text, no_files[0], len(no_files))
    return [path for _, paths in sorted(found) for path in paths]


def _walk(
    folder: Path,
    around: tuple[Path, ...],
    found: list[tuple[str, list[Path]]],
    no_files: list[Path],
) -> int:
    """Adds what is in `folder` to `found` and `no_files`; how much in it is hidden."""
    real = folder.resolve()
    if real in around:  # a link to a folder that it lies in
        return 0
    files: list[Path] = []
    n_hidden = 0
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            n_hidden += path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES
        elif path.is_dir():
            n_hidden += _walk(path, (*around, real), found, no_files)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            (files if path.is_file() else no_files).append(path)
    found.append((str(folder), files))
    return n_hidden
