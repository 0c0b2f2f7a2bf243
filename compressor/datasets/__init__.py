"""Data -> three splits (fit, search, test); labels and overlap checked at the border.

Two kinds of source:

* an `.npz` with `images` and `labels`, or `fit_images`, `fit_labels`, `search_...`, `test_...`
  (`train_` is read as `fit_`). Images are `(n, c, h, w)`, or of any other layout with a row an
  example: uint8, scaled here by `mean` and `std`; or float32, int32, int64 or bool, which the
  model takes as they are. Several inputs lie in `input_0`, `input_1`, ..., or in arrays called as
  the arguments of the network's forward pass (see `arrays`).
* a folder of class folders, or a folder holding `train` or `fit`, `search` or `val`, and `test`
  folders of class folders. Files are what Pillow reads.

Without labels (an `.npz` with images alone, a folder of images in place of class folders, or
because none is to be used) the data has no class names, and splits are cut at random.

What needs more memory than `MAX_BYTES` stays on disk: files are read when they are asked for.

Without a fit split nothing is trained; search images repair pruned networks then.

Up to 1 % of a split may be in another one too, as duplicates are usual in real data; more is an
error. A search or test split that is not given is cut from fit, by `seed` and by class.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from compressor.containers import map_tensors, tensors_in
from compressor.datasets.arrays import (
    ALIASES,
    IMAGES,
    LABELS,
    Inputs,
    as_inputs,
    by_split,
    labels_key,
)
from compressor.datasets.files import ImageFiles, Read, reader
from compressor.datasets.folders import (
    check_no_classes_beside,
    class_folders,
    class_order,
    image_files,
)
from compressor.datasets.identity import FEW, Stored, check_disjoint, fingerprint, kind
from compressor.errors import DataError
from compressor.files import UNREADABLE, check_size
from compressor.inputs import check_data, folders, loose_images, no_classes
from compressor.values import NO_LABEL, SPLITS, Data, Images, LabelledImages, LabelledInputs

HELD_OUT_SHARE = 0.2  # of every class, for a split that is not given
MAX_LABEL = 999_999
WAY_OUT = "Or give --labels none, for accuracy that is agreement with the original's answers."
MAX_BYTES = 2 * 2**30  # of a split in memory, as uint8

logger = logging.getLogger(__name__)

_Arrays = dict[str, tuple[Stored, Tensor]]
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
    _check_equally_long(mean, std)
    generator = np.random.default_rng(seed)
    is_trainable = "fit" in arrays
    largest = "fit" if is_trainable else "search"
    for name in ("test", "search"):
        if name not in arrays:
            parts = _hold_out(*arrays[largest], generator, source, class_names)
            arrays[largest], arrays[name] = parts
    for name, (images, labels) in arrays.items():
        _check(source, name, images, labels, class_names, arrays[largest][0], mean)
    splits = {
        name: LabelledInputs(images, labels)
        if isinstance(images, (tuple, dict))
        else LabelledImages(images, labels, tuple(mean), tuple(std))
        for name, (images, labels) in arrays.items()
    }
    check_disjoint(source, splits)
    return Data(
        fit=splits[largest],
        search=splits["search"],
        test=splits["test"],
        class_names=class_names,
        fingerprint=fingerprint(splits),
        is_trainable=is_trainable,
    )


def _read_npz(source: Path, use_labels: bool) -> tuple[_Arrays, tuple[str, ...]]:
    try:
        check_size(source)
        with np.load(source, allow_pickle=False) as archive:
            splits = by_split(archive.files, SPLITS)
            wanted = {key for names in splits.values() for key in names.values()}
            if use_labels:
                wanted |= set(map(labels_key, splits))
            found = {
                key: np.asarray(archive[key]) if key in wanted else np.empty(0)
                for key in archive.files
            }
    except UNREADABLE as err:
        raise DataError(f"{source} cannot be read as .npz: {err}.") from err
    arrays: _Arrays = {}
    of_inputs = {key for names in splits.values() for key in names.values()}
    is_of_images = all(IMAGES in names for names in splits.values())
    use_labels = use_labels and not (is_of_images and found.keys() == of_inputs)
    for prefix, names in splits.items():
        key = labels_key(prefix)
        if use_labels and key not in found:
            others = ", ".join(sorted(found.keys() - of_inputs)) or "nothing else"
            raise DataError(
                f"{source} has {', '.join(names.values())} but no {key}, beside {others}. "
                f"Expected an array called {key} of integers, one an example, and inputs called "
                f"{key.replace(LABELS, IMAGES)} or as the arguments of the network. {WAY_OUT}"
            )
        labels = _labels(source, key, found[key]) if use_labels else None
        n = None if labels is None else len(labels)
        inputs = as_inputs(source, {n: found[where] for n, where in names.items()}, n)
        if labels is None:
            labels = torch.full((len(next(tensors_in(inputs))),), NO_LABEL)
        _add(arrays, prefix or "fit", (inputs, labels), source)
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


def _labels(source: Path, key: str, labels: np.ndarray) -> Tensor:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{source}: {key} must be integers, one an example; got {labels.dtype} of shape "
            f"{labels.shape}."
        )
    if len(labels) and (labels.min() < 0 or labels.max() > MAX_LABEL):
        raise DataError(
            f"{source}: {key} must lie in 0..{MAX_LABEL}; they run from {labels.min()} to "
            f"{labels.max()}."
        )
    return torch.from_numpy(labels.astype(np.int64))


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
    if not class_names and largest != source:
        check_no_classes_beside(source, list(named.values()))
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
        raise DataError(f"{folder} has no image of class {', '.join(empty)}. {WAY_OUT}")
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
    images: Stored,
    labels: Tensor,
    generator: np.random.Generator,
    source: Path,
    class_names: Sequence[str],
) -> tuple[tuple[Stored, Tensor], tuple[Stored, Tensor]]:
    """(rest, held out); `HELD_OUT_SHARE` of every class, at least one image of each.

    Without labels all images are of one kind.
    """
    taken = []
    for label in labels.unique():
        rows = generator.permutation(np.flatnonzero(labels.numpy() == label.item()))
        n_taken = max(1, round(HELD_OUT_SHARE * len(rows)))
        if n_taken >= len(rows):
            which, way_out = "there are", ""
            if label != NO_LABEL:
                which, way_out = f"class {class_names[int(label)]} has", f" {WAY_OUT}"
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


def _only(images: Stored, mask: Tensor) -> Stored:
    if isinstance(images, ImageFiles):
        paths = [path for path, is_kept in zip(images.paths, mask, strict=True) if is_kept]
        return ImageFiles(paths, images.read, tuple(images.shape[1:]))
    kept: Inputs = map_tensors(lambda each: each[mask], images)
    return kept


def _check(
    source: Path,
    name: str,
    images: Stored,
    labels: Tensor,
    class_names: Sequence[str],
    fit_images: Stored,
    mean: Sequence[float],
) -> None:
    where = f"{source}, {name} split"
    if not len(labels):
        raise DataError(f"{where}: no images.")
    if kind(images) != kind(fit_images):
        raise DataError(
            f"{where}: images are {kind(images)}, those of the fit split {kind(fit_images)}."
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
    if not all(each.isfinite().all() for each in tensors_in(images)):
        raise DataError(f"{where}: images hold NaN or infinity.")
    if mean:
        _check_mean(mean, images)


def _check_equally_long(mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != len(std):
        raise DataError(f"mean and std must be equally long; got mean={mean} and std={std}.")


def _check_mean(mean: Sequence[float], images: Stored) -> None:
    if isinstance(images, (tuple, dict)) or images.dtype not in (torch.uint8, torch.float32):
        raise DataError(
            f"mean and std are for one input of uint8 or float32; the data has {kind(images)}. "
            f"Leave them away, and store the inputs as the model takes them."
        )
    if len(images.shape) < 3 or len(mean) not in (1, images.shape[1]):
        raise DataError(
            f"mean and std must have one value, or one for each of the channels in dimension 1 "
            f"of {tuple(images.shape)}; got mean={tuple(mean)}."
        )
