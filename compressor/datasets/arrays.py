"""Which arrays of an `.npz` are inputs, and of what kinds they may be."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compressor.errors import DataError

ALIASES = {
    "train": "fit", "training": "fit", "val": "search", "valid": "search", "validation": "search",
    "testing": "test",
}  # fmt: skip
IMAGES, LABELS = "images", "labels"
NUMBERED = re.compile(r"input_(\d+)")
KINDS = (np.uint8, np.float32, np.int32, np.int64, np.bool_)  # that an input may be of

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


def by_split(keys: Iterable[str], splits: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Prefix of a split, as it stands in the file -> input's name -> its key.

    Inputs are, of what is there for any split: `input_0`, `input_1`, ...; else `images`; else
    whatever is no label, each called as an argument of the network's forward pass.
    """
    prefixes = (*splits, *ALIASES)
    named: dict[str, dict[str, str]] = {}
    for key in keys:
        prefix, _, name = key.partition("_")
        if prefix.lower() not in prefixes or not name:
            prefix, name = "", key
        if name != LABELS:
            named.setdefault(prefix, {})[name] = key
    every = {name for names in named.values() for name in names}
    if any(map(NUMBERED.fullmatch, every)):
        every = set(filter(NUMBERED.fullmatch, every))
    elif IMAGES in every:
        every = {IMAGES}
    found = {
        prefix: {name: key for name, key in names.items() if name in every}
        for prefix, names in named.items()
    }
    return {prefix: names for prefix, names in found.items() if names}


def labels_key(prefix: str) -> str:
    """Where the labels of a split lie."""
    return f"{prefix}_{LABELS}" if prefix else LABELS


def as_inputs(source: Path, arrays: Mapping[str, np.ndarray], n: int | None) -> Inputs:
    """What the network is to get: one tensor; several by position, or by name.

    Args:
        source: The file, for messages.
        arrays: Name -> `(n, ...)`; the names of several inputs say which they are.
        n: Labels; None where there are none.

    Raises:
        DataError: An array is of another kind or length, or one is missing in between.
    """
    tensors = {name: _tensor(source, name, array) for name, array in arrays.items()}
    lengths = {name: len(tensor) for name, tensor in tensors.items()}
    if n is not None:
        lengths[LABELS] = n
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(
            f"{source}: the arrays of a split must be equally long, a row an example; they have "
            f"{told}."
        )
    numbers = sorted(int(match[1]) for match in map(NUMBERED.fullmatch, tensors) if match)
    if numbers and numbers != list(range(len(numbers))):
        raise DataError(
            f"{source}: inputs are numbered from 0 without gaps; there are "
            f"{', '.join(f'input_{i}' for i in numbers)}."
        )
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    return tuple(tensors[f"input_{i}"] for i in numbers) if numbers else tensors


def _tensor(source: Path, name: str, array: np.ndarray) -> Tensor:
    if array.dtype.hasobject or array.dtype.newbyteorder("=") not in KINDS:
        raise DataError(
            f"{source}: {name} is {array.dtype}; expected uint8 (which is scaled to [0, 1]), "
            f"float32, int32, int64 or bool, which the model takes as they are."
        )
    if not array.ndim or 0 in array.shape[1:]:
        raise DataError(
            f"{source}: {name} has the shape {array.shape}; expected (n, ...), a row an example."
        )
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
