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
from torch import Tensor, nn
from torch.utils.data import Dataset

from compressor.containers import map_tensors, tensors_in
from compressor.errors import DataError, MeasurementError, TaskError
from compressor.inputs import check_task
from compressor.rows import kind_of, told_kind
from compressor.tasks.classification import (
    AGREEMENT,
    CLASSIFICATION,
    Agreement,
    Answered,
    Classification,
)
from compressor.tasks.criterion import Criterion
from compressor.user_code import USER_CODE_FAILURES, find, importable, told
from compressor.values import SPLITS, Data, Example, Split

__all__ = [
    "AGREEMENT", "CLASSIFICATION", "Agreement", "Answered", "Classification", "Criterion",
    "DatasetSplit", "OwnTask", "Task", "load_task", "task_data",
]  # fmt: skip

PARTS = ("dataset", "loss", "judge", "metric")  # that a task must have
N_LOOKED_AT = 16  # samples of a split that its fingerprint is taken from


class Task(Protocol):
    """What a user's own task must have.

    It may have more: `name`, of the metric; `distance(outputs, wanted)`, how far answers are from
    the original's, one differentiable number that is distilled by; and `network(model)`, the part
    of the model that is compressed, an nn.Module. Where a model ends in what picks results, or
    takes lists, as torchvision's detectors do, that is a module of yours around its layers, from
    tensors to raw heads.

    Attributes:
        larger_is_better: Whether a larger `metric` is a better one.
    """

    larger_is_better: bool

    def dataset(self, split: str) -> Dataset[tuple[Any, Any]] | None:
        """Samples of "fit", "search" or "test"; None for "fit" where nothing may be trained.

        A sample is `(input, target)`. The input is what the model takes for one example, without
        the batch's dimension: a tensor, float32 `(c, h, w)` of an image, of other shapes, or
        int32, int64 or bool; where the model takes several, a tuple of them, or a dict by the
        names of the forward pass's arguments. All samples' inputs are alike. The target is
        anything. The splits must share no sample.
        """

    def loss(self, outputs: Any, targets: list[Any]) -> Tensor:
        """One differentiable number, smaller is better, mean over the batch.

        Args:
            outputs: What the model returns for a batch of inputs, whichever dimension of its
                tensors these lie along.
            targets: Of the same inputs, as the dataset gave them.
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

    def network(self, model: nn.Module) -> nn.Module:
        """What of `model` is compressed, in eval mode: all of it, unless the task says."""
        if not self.has_network:
            return model
        part = self._ask("network", model)
        if not isinstance(part, nn.Module):
            raise self._wrong("network", part, "an nn.Module")
        return part.eval()

    @property
    def has_network(self) -> bool:
        """Whether the task picks a part of the model."""
        return hasattr(self.task, "network")

    def dataset(self, split: str) -> Dataset[tuple[Any, Any]] | None:
        """See `Task`."""
        found: Dataset[tuple[Any, Any]] | None = self._ask("dataset", split)
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
        kind: Of every input, in words; empty where none was looked at.
    """

    task: OwnTask
    name: str
    dataset: Dataset[tuple[Any, Any]]
    kind: str = ""

    def __len__(self) -> int:
        assert isinstance(self.dataset, Sized)
        return len(self.dataset)

    def sample(self, row: int) -> tuple[Example, Any]:
        """One input and its target, checked."""
        try:
            found = self.dataset[row]
        except USER_CODE_FAILURES as err:
            raise DataError(f"{self._where(row)} cannot be read: {told(err)}.") from err
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise DataError(
                f"{self._where(row)} is a {type(found).__name__}; expected (input, target)."
            )
        given, target = found
        kind = kind_of(given)
        if kind is None:
            raise DataError(
                f"{self._where(row)}: the input is {told_kind(given)}; expected what the model "
                f"takes: a tensor of float32, int32, int64 or bool, a tuple of tensors, or a dict "
                f"of them by the names of the forward pass's arguments."
            )
        if self.kind and kind != self.kind:
            raise DataError(
                f"{self._where(row)}: the input is {kind}, others are {self.kind}; all must be "
                f"alike."
            )
        if not all(each.isfinite().all() for each in tensors_in(given)):
            raise DataError(f"{self._where(row)}: the input holds NaN or infinity.")
        return (tuple(given) if isinstance(given, list) else given), target

    def batch(self, rows: Tensor | slice) -> tuple[Example, list[Any]]:
        """Inputs as the model takes them, tensors of `(n_rows, ...)`, and the targets."""
        numbers = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        samples = [self.sample(row) for row in numbers]
        columns = zip(*(tensors_in(given) for given, _ in samples), strict=True)
        stacks = iter([torch.stack(column) for column in columns])
        inputs: Example = map_tensors(lambda _: next(stacks), samples[0][0])
        return inputs, [target for _, target in samples]

    def model_input(self, rows: Tensor | slice) -> Example:
        """The inputs alone."""
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
    kind = ""
    for name in SPLITS:
        dataset = task.dataset(name)
        if dataset is None and name == "fit":
            continue
        split = _checked(task, name, dataset, kind)
        kind = split.kind
        for row in _spread(len(split)):
            digest.update(f"{name} {len(split)} {row}".encode())
            for each in tensors_in(split.sample(row)[0]):
                digest.update(each.numpy().tobytes())
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


def _checked(task: OwnTask, name: str, dataset: Dataset[Any] | None, kind: str) -> DatasetSplit:
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
    first, _ = DatasetSplit(task, name, dataset, kind).sample(0)
    return DatasetSplit(task, name, dataset, kind_of(first) or "")


def _spread(n: int) -> list[int]:
    """A few rows from first to last."""
    return sorted({round(row) for row in torch.linspace(0, n - 1, N_LOOKED_AT).tolist()})
