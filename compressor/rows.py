"""What networks are given: one tensor or several, in which each row belongs to one example."""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from compressor.containers import map_tensors, tensors_in
from compressor.values import Example, Split

BATCH_SIZE = 50  # of accuracy, at most; larger batches leave the cache and gain nothing
INPUT_KINDS = (torch.float32, torch.int32, torch.int64, torch.bool)
N_LOOKED_AT = 16  # inputs of a split that is not in memory
BATCH_NUMBERS = BATCH_SIZE * 3 * 224 * 224  # of a batch's inputs, at most


def n_rows(given: Example) -> int:
    """Examples in `given`."""
    return len(next(tensors_in(given)))


def one_tensor(given: Example) -> Tensor:
    """`given`, which is known to be no more than that."""
    assert isinstance(given, Tensor)
    return given


def each_alone(given: Example) -> list[Example]:
    """Every row of `given` by itself, as a batch of one."""
    return [
        map_tensors(lambda each, row=row: each[row : row + 1], given)  # type: ignore[misc]
        for row in range(n_rows(given))
    ]


def repeated(example: Example, n: int) -> Example:
    """`n` rows that are all like the one of `example`."""
    changed: Example = map_tensors(
        lambda each: each.expand(n, *each.shape[1:]).contiguous(), example
    )
    return changed


def arranged(given: Example, layout: torch.memory_format) -> Example:
    """`given` in a memory layout; only maps have one, `(n, c, h, w)`."""
    changed: Example = map_tensors(
        lambda each: each.to(memory_format=layout) if each.ndim == 4 else each, given
    )
    return changed


def holds_maps(given: Example) -> bool:
    """Whether `(n, c, h, w)` is among the tensors."""
    return any(each.ndim == 4 for each in tensors_in(given))


def is_images(given: Example) -> bool:
    """Whether it is one tensor `(n, c, h, w)` of fractions."""
    return isinstance(given, Tensor) and given.ndim == 4 and given.is_floating_point()


def example_of(split: Split) -> Example:
    """One row like those of `split`: whole numbers are its first row's, others are drawn.

    Only real whole numbers are sure to mean something: ids must lie in their table.
    """
    generator = torch.Generator().manual_seed(0)
    drawn: Example = map_tensors(partial(_drawn, generator), split.model_input(slice(0, 1)))
    return drawn


def _drawn(generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=generator) if like.is_floating_point() else like


def extremes(split: Split) -> Iterator[tuple[Tensor, int, int]]:
    """(rows, least, largest) of every input of whole numbers: rows hold the least and the largest.

    Only `N_LOOKED_AT` inputs of a split that is not in memory are looked at.
    """
    stored = getattr(split, "images", None)
    rows = torch.arange(len(split))
    if not isinstance(stored, (Tensor, tuple, dict)):
        rows = torch.linspace(0, len(split) - 1, min(len(split), N_LOOKED_AT)).long().unique()
        is_whole = any(not t.is_floating_point() for t in tensors_in(split.model_input(rows[:1])))
        stored = split.model_input(rows) if is_whole else ()
    for each in tensors_in(stored):
        if each.dtype in (torch.int32, torch.int64) and each.numel():
            flat = each.flatten(1) if each.ndim > 1 else each[:, None]
            least, most = flat.amin(dim=1), flat.amax(dim=1)
            yield (
                rows[[int(least.argmin()), int(most.argmax())]],
                int(least.min()),
                int(most.max()),
            )


def images_at_once(split: Split) -> int:
    """Examples in a batch: `BATCH_SIZE`, or fewer where they are large."""
    numbers = sum(math.prod(t.shape) for t in tensors_in(split.model_input(slice(0, 1))))
    return max(1, min(BATCH_SIZE, BATCH_NUMBERS // max(1, numbers)))


def kind_of(given: object) -> str | None:
    """Shapes and kinds of one example's input; None where it is none."""
    if isinstance(given, Tensor):
        return f"{given.dtype} {tuple(given.shape)}" if given.dtype in INPUT_KINDS else None
    if isinstance(given, dict):
        parts = [kind_of(each) for each in given.values()]
        told = (f"{name} {part}" for name, part in zip(given, parts, strict=True))
        return ", ".join(told) if parts and all(parts) else None
    if isinstance(given, (tuple, list)):
        parts = [kind_of(each) for each in given]
        return ", ".join(map(str, parts)) if parts and all(parts) else None
    return None


def nothing_in(example: Example) -> str | None:
    """Why nothing can be shown by `example`; None where something can."""
    tensors = list(tensors_in(example))
    if tensors and not any(each.numel() for each in tensors):
        return f"the example input has no numbers, only {told_kind(example)}; give one row"
    if any(each.isnan().any() for each in tensors if each.is_floating_point()):
        return "the example input holds NaN; give numbers as the network takes them"
    return None


def told_kind(given: object) -> str:
    """The same of anything, for messages."""
    if isinstance(given, Tensor):
        return f"{given.dtype} {tuple(given.shape)}"
    if isinstance(given, (tuple, list, dict)):
        inside = given.values() if isinstance(given, dict) else given
        return f"a {type(given).__name__} of {', '.join(map(told_kind, inside)) or 'nothing'}"
    return f"a {type(given).__name__}"
