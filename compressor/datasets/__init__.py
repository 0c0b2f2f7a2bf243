"""Images -> three splits (fit, search, test); labels and overlap checked at the border.

Two kinds of source:

* an `.npz` with `images` and `labels`, or `fit_images`, `fit_labels`, `search_...`, `test_...`
  (`train_` is read as `fit_`). Images are `(n, c, h, w)`: uint8, scaled here by `mean` and
  `std`; or float32, which the model takes as they are.
* a folder of class folders, or a folder holding `train` or `fit`, `search` or `val`, and `test`
  folders of class folders. Files are what Pillow reads.

Without labels (an `.npz` with images alone, a folder of images in place of class folders, or
because none is to be used) the data has no class names, and splits are cut at random.

What needs more memory than `MAX_BYTES` stays on disk: files are read when they are asked for.

Without a fit split nothing is trained; search images repair pruned networks then.

Up to 1 % of a split may be in another one too, as duplicates are usual in real data; more is an
error. A search or test split that is not given is cut from fit, by `seed` and by class.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from compressor.datasets.files import ImageFiles, Read, reader
from compressor.datasets.folders import class_folders, class_order, image_files
from compressor.errors import DataError
from compressor.files import UNREADABLE, check_size
from compressor.inputs import check_data, folders, loose_images, no_classes
from compressor.values import NO_LABEL, SPLITS, Data, Images, LabelledImages

ALIASES = {"train": "fit", "val": "search", "valid": "search", "validation": "search"}
HELD_OUT_SHARE = 0.2  # of every class, for a split that is not given
MAX_LABEL = 999_999
FEW = 0.01  # of the images may be in two splits, or beside the class folders
WAY_OUT = "Or give --labels none, for accuracy that is agreement with the original's answers."
MAX_BYTES = 2 * 2**30  # of a split in memory, as uint8

logger = logging.getLogger(__name__)

_Arrays = dict[str, tuple[Images, Tensor]]
_ReadFiles = Callable[[Path, Sequence[Path]], Images]  # those of a folder
_T = TypeVar("_T")


def load_data(
    source: Path,
    *,
    image_size: int | None = None,
    n_channels: int | None = None,
    classes: Path | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    seed: int = 0,
    use_labels: bool = True,
) -> Data:
    """The three splits of `source`.

    Args:
        source: An `.npz` file or a folder; see the module's text.
        image_size: Side in pixels that image files are resized and centre-cropped to.
        n_channels: 1 for grey, 3 for colour; how image files are read. Default 3.
        classes: Text file with the names of class folders, one a line, in the order of the
            network's outputs; None for the order of names.
        mean: Per channel, after scaling uint8 to [0, 1]; empty for none.
        std: Per channel; as long as `mean`.
        seed: Decides which images are held out where the source has no such split.
        use_labels: False reads images alone, whatever labels or class folders there are.

    Raises:
        DataError: Nothing there, unreadable, empty classes, labels out of range, mixed sizes.
    """
    check_data(source, image_size=image_size, n_channels=n_channels, classes=classes)
    if source.is_dir():
        read = reader(image_size, n_channels or 3)
        is_resized = image_size is not None
        arrays, class_names = _read_folder(
            source, partial(_read_files, read=read, is_resized=is_resized), classes, use_labels
        )
    else:
        arrays, class_names = _read_npz(source, use_labels)
    if len(mean) != len(std):
        raise DataError(f"mean and std must be equally long; got mean={mean} and std={std}.")
    generator = np.random.default_rng(seed)
    is_trainable = "fit" in arrays
    largest = "fit" if is_trainable else "search"
    for name in ("test", "search"):
        if name not in arrays:
            arrays[largest], arrays[name] = _hold_out(*arrays[largest], generator, source)
    for name, (images, labels) in arrays.items():
        _check(source, name, images, labels, class_names, arrays[largest][0], mean)
    splits = {
        name: LabelledImages(*content, tuple(mean), tuple(std)) for name, content in arrays.items()
    }
    _check_disjoint(source, splits)
    return Data(
        fit=splits[largest],
        search=splits["search"],
        test=splits["test"],
        class_names=class_names,
        fingerprint=_fingerprint(splits),
        is_trainable=is_trainable,
    )


def _read_npz(source: Path, use_labels: bool) -> tuple[_Arrays, tuple[str, ...]]:
    try:
        check_size(source)
        with np.load(source, allow_pickle=False) as archive:
            found = {key: np.asarray(archive[key]) for key in archive.files}
    except UNREADABLE as err:
        raise DataError(f"{source} cannot be read as .npz: {err}.") from err
    arrays: _Arrays = {}
    of_images = {key: key.replace("images", "labels") for key in found if _is_of_images(key)}
    use_labels = use_labels and found.keys() != of_images.keys()
    for key, of_it in of_images.items():
        if use_labels and of_it not in found:
            others = ", ".join(sorted(found.keys() - of_images.keys()))
            raise DataError(f"{source} has {key} but no {of_it}, beside {others}. {WAY_OUT}")
        tensors = _to_tensors(source, key, found[key], found[of_it] if use_labels else None)
        _add(arrays, key.rpartition("_")[0] or "fit", tensors, source)
    if "fit" not in arrays and "search" not in arrays:
        raise DataError(
            f"{source} needs the arrays images and labels, or fit_images and fit_labels, or at "
            f"least search_images and search_labels (or images alone, where there are no "
            f"labels); it has {sorted(found) or 'none'}."
        )
    if not use_labels:
        return arrays, ()
    _, of_most = arrays.get("fit") or arrays["search"]
    n_classes = int(of_most.max()) + 1 if len(of_most) else 0
    return arrays, tuple(str(label) for label in range(n_classes))


def _is_of_images(key: str) -> bool:
    return key.rpartition("_")[2] == "images"


def _to_tensors(
    source: Path, key: str, images: np.ndarray, labels: np.ndarray | None
) -> tuple[Tensor, Tensor]:
    images = images.astype(images.dtype.newbyteorder("="), copy=False)
    if images.ndim != 4 or images.dtype not in (np.uint8, np.float32) or 0 in images.shape[1:]:
        raise DataError(
            f"{source}: {key} must be uint8 or float32 of shape (n, c, h, w); "
            f"got {images.dtype} of shape {images.shape}."
        )
    if labels is None:
        return torch.from_numpy(images), torch.full((len(images),), NO_LABEL)
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{source}: the labels of {key} must be {len(images)} integers; "
            f"got {labels.dtype} of shape {labels.shape}."
        )
    if len(labels) and (labels.min() < 0 or labels.max() > MAX_LABEL):
        raise DataError(
            f"{source}: the labels of {key} must lie in 0..{MAX_LABEL}; they run from "
            f"{labels.min()} to {labels.max()}."
        )
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def _read_folder(
    source: Path, read_files: _ReadFiles, classes: Path | None, use_labels: bool
) -> tuple[_Arrays, tuple[str, ...]]:
    named: dict[str, Path] = {}
    for child in folders(source):
        _add(named, child.name, child, source)
    if not named:
        named = {"fit": source}
    elif "fit" not in named and "search" not in named:
        found = ", ".join(p.name for p in named.values())
        raise DataError(
            f"{source} holds {found} but no train folder to learn from, nor a val folder to rank "
            f"plans by."
        )
    largest = named.get("fit") or named["search"]
    class_names = tuple(class_folders(largest))
    if not class_names and not loose_images(largest):
        raise DataError(no_classes(largest, source))
    if classes is not None:
        class_names = class_order(classes, class_names, largest)
    if use_labels and class_names:
        read = partial(_read_classes, class_names=class_names, read_files=read_files)
        return {name: read(path) for name, path in named.items()}, class_names
    if use_labels:
        for path in named.values():
            _check_without_classes(path)
    return {name: _read_unlabelled(path, read_files) for name, path in named.items()}, ()


def _check_beside(folder: Path, others: Sequence[Path]) -> None:
    """Raises where more than a few images lie in `folder` itself, beside the folders of images."""
    loose = loose_images(folder)
    if not loose:
        return
    beside = f"beside {', '.join(path.name for path in others[:5]) or 'no class folder'}"
    if len(loose) > FEW * sum(len(image_files(path)) for path in others):
        raise DataError(
            f"{folder} holds {len(loose)} images itself ({loose[0].name}, ...), {beside}; nothing "
            f"says which class they are. Move them into class folders, or out of the folder. "
            f"{WAY_OUT}"
        )
    logger.warning("%s: %d images %s are left out", folder, len(loose), beside)


def _check_without_classes(folder: Path) -> None:
    """Raises where `folder` has class folders although others have none."""
    found = folders(folder)
    if found:
        raise DataError(
            f"{folder} has class folders ({found[0].name}, ...), other splits have images without "
            f"any; expected the same in all. {WAY_OUT}"
        )


def _add(splits: dict[str, _T], name: str, content: _T, source: Path) -> None:
    """Files `content` under the split that `name` means; other names are left out."""
    split = ALIASES.get(name.lower(), name.lower())
    if split in splits:
        raise DataError(f"{source} has two {split} splits; {name!r} is the second.")
    if split in SPLITS:
        splits[split] = content


def _read_unlabelled(folder: Path, read_files: _ReadFiles) -> tuple[Images, Tensor]:
    paths = image_files(folder)
    if not paths:
        raise DataError(f"{folder} has no image.")
    return read_files(folder, paths), torch.full((len(paths),), NO_LABEL)


def _read_classes(
    folder: Path, class_names: Sequence[str], read_files: _ReadFiles
) -> tuple[Images, Tensor]:
    by_class = class_folders(folder)
    _check_beside(folder, list(by_class.values()))
    files = {name: image_files(path) for name, path in by_class.items()}
    strange = by_class.keys() - set(class_names)
    if strange:
        raise DataError(f"{folder} has classes that the fit split lacks: {sorted(strange)}.")
    empty = [name for name in by_class if not files[name]]
    empty += [name for name in class_names if name not in files]
    if empty:
        raise DataError(f"{folder} has no image of class {', '.join(empty)}.")
    paths = [path for name in class_names for path in files[name]]
    labels = [label for label, name in enumerate(class_names) for _ in files[name]]
    return read_files(folder, paths), torch.tensor(labels)


def _read_files(folder: Path, paths: Sequence[Path], *, read: Read, is_resized: bool) -> Images:
    """The images in these files, in memory or left on disk."""
    first = read(paths[0])
    if first.nbytes * len(paths) > MAX_BYTES:
        if not is_resized:
            raise DataError(
                f"{folder}: {len(paths)} images of {first.shape} need "
                f"{first.nbytes * len(paths) / 2**30:.1f} GiB. More than "
                f"{MAX_BYTES / 2**30:.0f} GiB are read from disk as they are needed, for which "
                f"all must come out alike: give --image-size."
            )
        return ImageFiles(paths, read, first.shape)
    images = np.empty((len(paths), *first.shape), dtype=np.uint8)
    for row, path in enumerate(paths):
        image = read(path)
        if image.shape != first.shape:
            raise DataError(
                f"Images must be of one size: {paths[0]} is {first.shape}, {path} is "
                f"{image.shape} (c, h, w). Give --image-size to resize and crop them."
            )
        images[row] = image
    return torch.from_numpy(images)


def _hold_out(
    images: Images, labels: Tensor, generator: np.random.Generator, source: Path
) -> tuple[tuple[Images, Tensor], tuple[Images, Tensor]]:
    """(rest, held out); `HELD_OUT_SHARE` of every class, at least one image of each.

    Without labels all images are of one kind.
    """
    taken = []
    for label in labels.unique():
        rows = generator.permutation(np.flatnonzero(labels.numpy() == label.item()))
        n_taken = max(1, round(HELD_OUT_SHARE * len(rows)))
        if n_taken >= len(rows):
            which, way_out = f"class {label.item()} has", f" {WAY_OUT}"
            if label == NO_LABEL:
                which, way_out = "there are", ""
            raise DataError(
                f"{source}: {which} {len(rows)} images left; at least 2 are needed to hold one "
                f"out. Add images or give the splits yourself.{way_out}"
            )
        taken.append(rows[:n_taken])
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    if taken:
        held_out[torch.from_numpy(np.concatenate(taken))] = True
    return (
        (_only(images, ~held_out), labels[~held_out]),
        (_only(images, held_out), labels[held_out]),
    )


def _only(images: Images, mask: Tensor) -> Images:
    if isinstance(images, ImageFiles):
        paths = [path for path, is_kept in zip(images.paths, mask, strict=True) if is_kept]
        return ImageFiles(paths, images.read, tuple(images.shape[1:]))
    return images[mask]


def _check(
    source: Path,
    name: str,
    images: Images,
    labels: Tensor,
    class_names: Sequence[str],
    fit_images: Images,
    mean: Sequence[float],
) -> None:
    where = f"{source}, {name} split"
    if not len(labels):
        raise DataError(f"{where}: no images.")
    if images.shape[1:] != fit_images.shape[1:] or images.dtype != fit_images.dtype:
        raise DataError(
            f"{where}: images are {images.dtype} {tuple(images.shape[1:])}, those of the fit "
            f"split {fit_images.dtype} {tuple(fit_images.shape[1:])}."
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if class_names and (lowest < 0 or highest >= len(class_names)):
        raise DataError(
            f"{where}: labels must lie in 0..{len(class_names) - 1} (the classes of the fit "
            f"split); they run from {lowest} to {highest}."
        )
    seen = set(labels.unique().tolist())
    absent = [class_name for i, class_name in enumerate(class_names) if i not in seen]
    if 2 * len(absent) >= len(class_names) > 1:
        raise DataError(
            f"{where}: {len(absent)} of {len(class_names)} classes have no image ({absent[0]}, "
            f"...); what becomes of them could not be seen. Give images of every class. {WAY_OUT}"
        )
    if absent:
        logger.warning("%s: no image of class %s", where, ", ".join(absent[:5]))
    if images.dtype.is_floating_point and not images[:].isfinite().all():
        raise DataError(f"{where}: images hold NaN or infinity.")
    if mean and len(mean) not in (1, images.shape[1]):
        raise DataError(
            f"mean and std must have one value, or one for each of {images.shape[1]} channels; "
            f"got mean={tuple(mean)}."
        )


def _check_disjoint(source: Path, splits: Mapping[str, LabelledImages]) -> None:
    """No image in two splits: accuracy on an image the model was fitted to proves nothing."""
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


def _digests(images: Images) -> set[bytes]:
    """Of every image; of a file on disk, its size and its beginning."""
    if isinstance(images, ImageFiles):
        return set(images.digests)
    pixels = images[:].numpy()
    return {hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels}


def _fingerprint(splits: Mapping[str, LabelledImages]) -> str:
    digest = hashlib.sha256()
    for name in filter(splits.__contains__, SPLITS):
        digest.update(f"{name} {tuple(splits[name].images.shape)}".encode())
        images = splits[name].images
        if isinstance(images, ImageFiles):
            digest.update(b"".join(images.digests))
        else:
            digest.update(np.ascontiguousarray(images[:].numpy()).data)
        digest.update(splits[name].labels.numpy().data)
    return digest.hexdigest()
