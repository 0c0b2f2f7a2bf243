"""What a network is for: it decides what is learned, and what counts as right.

Classification needs nothing but labelled images; without any it is the original's answers
that are right. Everything else is a `Task` of the user's own, named by
`--task package.module:object`; `samples/segmentation` has one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from compressor.containers import tensors_in
from compressor.errors import DataError, MeasurementError, TaskError
from compressor.inputs import check_task
from compressor.tasks.classification import (
    AGREEMENT,
    CLASSIFICATION,
    Agreement,
    Answered,
    Classification,
)
from compressor.user_code import USER_CODE_FAILURES, find, importable, told
from compressor.values import SPLITS, Data, Split

__all__ = [
    "AGREEMENT", "CLASSIFICATION", "Agreement", "Answered", "Classification", "Criterion",
    "DatasetSplit", "OwnTask", "Task", "load_task", "task_data",
]  # fmt: skip

PARTS = ("dataset", "loss", "judge", "metric")  # that a task must have
N_LOOKED_AT = 16  # samples of a split that its fingerprint is taken from


class Task(Protocol):
    """What a user's own task must have.

    Attributes:
        larger_is_better: Whether a larger `metric` is a better one.
    """

    larger_is_better: bool

    def dataset(self, split: str) -> Dataset[tuple[Tensor, Any]] | None:
        """Samples of "fit", "search" or "test"; None for "fit" where nothing may be trained.

        A sample is `(image, target)`: the image float32 `(c, h, w)` as the model takes it, the
        target anything. The splits must share no sample.
        """

    def loss(self, outputs: Any, targets: list[Any]) -> Tensor:
        """One differentiable number, smaller is better, mean over the batch.

        Args:
            outputs: What the model returns for a batch of images.
            targets: Of the same images, as the dataset gave them.
        """

    def judge(self, outputs: Any, targets: list[Any]) -> Sequence[Any]:
        """What the metric needs to know of every image of a batch; see `loss` for arguments.

        It is kept in memory for a whole split, so it should be small: an error, the counts of a
        confusion matrix, the boxes that were found.
        """

    def metric(self, judged: list[Any]) -> float:
        """The figure that is reported, above 0 for the original, from what `judge` returned.

        Asked for all images of a split, and for parts of them: its standard error is the
        jackknife's.
        """


class Criterion(Protocol):
    """A task, as the product sees it.

    Attributes:
        name: Of the metric.
        larger_is_better: Of the metric.
        has_distance: Whether `distance` is fit to be learned from.
        is_share: Whether the metric is a share of the images. Then a judgement is (is right,
            cross-entropy in nats), and a drop is told in points.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def larger_is_better(self) -> bool: ...  # noqa: D102
    @property
    def has_distance(self) -> bool: ...  # noqa: D102
    @property
    def is_share(self) -> bool: ...  # noqa: D102

    def posed(self, split: Split, answers: Iterable[Any]) -> Split:
        """The split with the targets that answers are judged by.

        Args:
            split: As the data has it.
            answers: Of the original to its images, batch by batch; computed where asked for.
        """

    def lesson(self, temperature: float, label_smoothing: float) -> Criterion:
        """What is learned, where it is not quite what is measured; see `Classification`."""

    def distillation(self, asked: float) -> float:
        """Weight of `distance` in what is learned, where `asked` was; `loss` has the rest."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """See `Task`."""

    def judge(self, outputs: Any, targets: Any) -> Sequence[Any]:
        """See `Task`."""

    def metric(self, judged: Sequence[Any]) -> float:
        """See `Task`; raises `MeasurementError` where it is no number."""

    def distance(self, outputs: Any, wanted: Any) -> Tensor:
        """How far a network's answers are from the original's, mean over the batch; 0: alike."""


@dataclass(frozen=True)
class OwnTask:
    """A task of the user's own; what goes wrong in it is told as a `TaskError`.

    Attributes:
        reference: "package.module:object".
        task: The object.
    """

    reference: str
    task: Task = field(repr=False)
    is_share = False

    @property
    def name(self) -> str:
        """The object's `name`, or that of its class."""
        return str(getattr(self.task, "name", type(self.task).__name__))

    @property
    def larger_is_better(self) -> bool:
        """See `Task`."""
        return self.task.larger_is_better

    @property
    def has_distance(self) -> bool:
        """Whether the task says how far answers are from the original's."""
        return hasattr(self.task, "distance")

    def posed(self, split: Split, answers: Iterable[Any]) -> Split:
        """The split: its dataset has the targets."""
        return split

    def lesson(self, temperature: float, label_smoothing: float) -> OwnTask:
        """The task's own loss and distance."""
        return self

    def distillation(self, asked: float) -> float:
        """0 where the task does not say how far answers are."""
        return asked if self.has_distance else 0.0

    def loss(self, outputs: Any, targets: list[Any]) -> Tensor:
        """See `Task`."""
        return self._number("loss", outputs, targets)

    def judge(self, outputs: Any, targets: list[Any]) -> Sequence[Any]:
        """See `Task`."""
        judged = list(self._ask("judge", outputs, targets))
        if len(judged) != len(targets):
            raise TaskError(
                f"--task {self.reference}: judge returned {len(judged)} judgements of "
                f"{len(targets)} images; expected one for each."
            )
        return judged

    def metric(self, judged: Sequence[Any]) -> float:
        """See `Task`."""
        value = self._ask("metric", list(judged))
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as err:
            raise self._wrong("metric", value, "a number") from err
        if not math.isfinite(number):
            raise MeasurementError(
                f"--task {self.reference}: the metric of {len(judged)} images is {number}."
            )
        return number

    def distance(self, outputs: Any, wanted: Any) -> Tensor:
        """The task's own, or the mean squared difference as a share of the answers' variance."""
        if self.has_distance:
            return self._number("distance", outputs, wanted)
        pairs = zip(_floats(outputs), _floats(wanted), strict=True)
        parts = [F.mse_loss(a, b) / b.var().clamp_min(1e-12) for a, b in pairs if b.numel() > 1]
        return torch.stack(parts).mean()

    def dataset(self, split: str) -> Dataset[tuple[Tensor, Any]] | None:
        """See `Task`."""
        found: Dataset[tuple[Tensor, Any]] | None = self._ask("dataset", split)
        return found

    def _ask(self, part: str, *args: Any) -> Any:
        try:
            return getattr(self.task, part)(*args)
        except USER_CODE_FAILURES as err:
            raise TaskError(f"--task {self.reference}: {part} failed: {told(err)}.") from err

    def _number(self, part: str, *args: Any) -> Tensor:
        """What can be learned from."""
        value = self._ask(part, *args)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise self._wrong(part, value, "a tensor of one number")
        return value.reshape(())

    def _wrong(self, part: str, value: object, expected: str) -> TaskError:
        what = f"{type(value).__name__}{tuple(getattr(value, 'shape', ()))}"
        return TaskError(f"--task {self.reference}: {part} returned {what}; expected {expected}.")


def _floats(outputs: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]


@dataclass(frozen=True, eq=False)
class DatasetSplit:
    """A split of a task: samples are taken from its dataset when they are asked for.

    Attributes:
        task: Whose dataset it is, for messages.
        name: "fit", "search" or "test".
        dataset: With `__len__`.
        input_shape: `(c, h, w)` of every image.
    """

    task: OwnTask
    name: str
    dataset: Dataset[tuple[Tensor, Any]]
    input_shape: tuple[int, ...] = ()

    def __len__(self) -> int:
        assert isinstance(self.dataset, Sized)
        return len(self.dataset)

    def sample(self, row: int) -> tuple[Tensor, Any]:
        """One image and its target, checked."""
        try:
            found = self.dataset[row]
        except USER_CODE_FAILURES as err:
            raise DataError(f"{self._where(row)} cannot be read: {told(err)}.") from err
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise DataError(
                f"{self._where(row)} is a {type(found).__name__}; expected (image, target)."
            )
        image, target = found
        if not isinstance(image, Tensor) or image.dtype != torch.float32 or image.ndim != 3:
            what = type(image).__name__
            if isinstance(image, Tensor):
                what = f"{image.dtype} {tuple(image.shape)}"
            raise DataError(
                f"{self._where(row)}: the image is {what}; expected a float32 tensor (c, h, w), "
                f"as the model takes it."
            )
        if self.input_shape and tuple(image.shape) != self.input_shape:
            raise DataError(
                f"{self._where(row)}: the image is {tuple(image.shape)}, others are "
                f"{self.input_shape}; all must be alike."
            )
        if not image.isfinite().all():
            raise DataError(f"{self._where(row)}: the image holds NaN or infinity.")
        return image, target

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, list[Any]]:
        """`(n_rows, c, h, w)` and the targets."""
        numbers = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        samples = [self.sample(row) for row in numbers]
        return torch.stack([image for image, _ in samples]), [target for _, target in samples]

    def model_input(self, rows: Tensor | slice) -> Tensor:
        """`(n_rows, c, h, w)`."""
        return self.batch(rows)[0]

    def _where(self, row: int) -> str:
        return f"--task {self.task.reference}: sample {row} of {self.name}"


def load_task(reference: str, *, beside: Path) -> OwnTask:
    """The task that `--task package.module:object` names.

    Args:
        reference: The object is a task, or a function without arguments that returns one.
        beside: Folder of the model.

    Raises:
        TaskError: There is no such object, or it lacks a part.
    """
    check_task(reference, beside=beside)
    task: Any = find("--task", reference, beside=beside, error=TaskError)
    if callable(task) and (isinstance(task, type) or not hasattr(task, "dataset")):
        with importable(beside):
            try:
                task = task()
            except USER_CODE_FAILURES as err:
                raise TaskError(f"--task {reference} failed: {told(err)}.") from err
    missing = [part for part in PARTS if not callable(getattr(task, part, None))]
    if missing:
        raise TaskError(
            f"--task {reference} is a {type(task).__name__} without {', '.join(missing)}. A task "
            f"has the methods {', '.join(PARTS)}, and larger_is_better."
        )
    if not isinstance(getattr(task, "larger_is_better", None), bool):
        raise TaskError(f"--task {reference} must say larger_is_better = True or False.")
    return OwnTask(reference, task)


def task_data(task: OwnTask) -> Data:
    """The three splits of a task; a few samples of each are looked at.

    Raises:
        DataError: A split is missing, empty, or not what `Task.dataset` asks for.
        TaskError: `dataset` failed.
    """
    found: dict[str, DatasetSplit] = {}
    digest = hashlib.sha256()
    shape: tuple[int, ...] = ()
    for name in SPLITS:
        dataset = task.dataset(name)
        if dataset is None and name == "fit":
            continue
        split = _checked(task, name, dataset, shape)
        shape = split.input_shape
        for row in _spread(len(split)):
            digest.update(f"{name} {len(split)} {row}".encode())
            digest.update(split.sample(row)[0].numpy().tobytes())
        if any(split.dataset is other.dataset for other in found.values()):
            raise DataError(
                f"--task {task.reference}: {name} is the very dataset of another split."
            )
        found[name] = split
    return Data(
        fit=found.get("fit", found["search"]),
        search=found["search"],
        test=found["test"],
        class_names=(),
        fingerprint=digest.hexdigest(),
        is_trainable="fit" in found,
    )


def _checked(
    task: OwnTask, name: str, dataset: Dataset[Any] | None, shape: tuple[int, ...]
) -> DatasetSplit:
    what = f"--task {task.reference}: dataset({name!r})"
    if dataset is None:
        use = "plans are ranked by it" if name == "search" else "the result is measured on it"
        raise DataError(f"{what} is None; {use}.")
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{what} is a {type(dataset).__name__}; expected a dataset with __len__ and "
            f"__getitem__ (torch's map-style)."
        )
    if len(dataset) < 2:
        raise DataError(f"{what} has {len(dataset)} samples; expected at least 2.")
    first, _ = DatasetSplit(task, name, dataset, shape).sample(0)
    return DatasetSplit(task, name, dataset, tuple(first.shape))


def _spread(n: int) -> list[int]:
    """A few rows from first to last."""
    return sorted({round(row) for row in torch.linspace(0, n - 1, N_LOOKED_AT).tolist()})
