"""Whether a network and the data that it is to be judged by are for each other."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.config import Config
from compressor.containers import answers_in
from compressor.datasets import WAY_OUT
from compressor.errors import DataError, GraphError, TaskError
from compressor.graph import outputs
from compressor.rows import extremes, told_kind
from compressor.tasks import AGREEMENT, Criterion, OwnTask
from compressor.values import SPLITS, Data, Example, LoadedModel, Split

WRITTEN_IN = (
    "A batch size seems to be written into its code, as in view(1, -1); write flatten(1), or "
    "x.shape[0] in its place."
)


def check_whole_numbers(model: nn.Module, data: Data) -> None:
    """Whether the network takes the least and the largest ids of every split.

    Of a task's splits only some samples are looked at.

    Raises:
        DataError: It does not.
    """
    for name in SPLITS:
        split: Split = getattr(data, name)
        for rows, least, most in extremes(split):
            try:
                outputs(model, split.model_input(rows))
            except GraphError as err:
                if not isinstance(err.__cause__, IndexError):
                    raise
                tables = ", ".join(
                    f"{where} has {table.num_embeddings}"
                    for where, table in model.named_modules()
                    if isinstance(table, nn.Embedding)
                )
                raise DataError(
                    f"The whole numbers of the {name} split run from {least} to {most}, with "
                    f"which {type(model).__name__} fails. Expected ids that lie in its tables"
                    f"{f' (rows: {tables})' if tables else ''}. {err}"
                ) from err


def check_outputs(loaded: LoadedModel, data: Data, criterion: Criterion, config: Config) -> None:
    """Raises `DataError` where the model's answers cannot be judged."""
    output = outputs(loaded.module, loaded.example_input)
    if isinstance(criterion, OwnTask):
        _check_task(loaded.module, data.search, criterion)
        return
    if not isinstance(output, Tensor) or output.ndim != 2:
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise DataError(
            f"The model must return one tensor of logits, shape (1, n_classes); it returns "
            f"{what}. A network that is no classifier needs --task package.module:object."
        )
    n_classes, n_logits = len(data.class_names), output.shape[1]
    of_two = _for_two(loaded.module, data.search.model_input(torch.tensor([0, 0])))
    if not isinstance(of_two, Tensor) or of_two.shape != (2, n_logits):
        raise DataError(
            f"{type(loaded.module).__name__} returns {told_kind(of_two)} for 2 images; expected "
            f"(2, {n_logits}). {WRITTEN_IN}"
        )
    if criterion is AGREEMENT:
        if n_logits < 2:
            raise DataError(
                "The model returns one number an image, so all its answers are class 0; agreement "
                "needs at least 2 logits. Give --task package.module:object, with a threshold."
            )
        return
    is_folder = config.data is not None and config.data.is_dir()
    if n_logits < n_classes or (is_folder and n_logits != n_classes):
        rule = "Labels are the numbers of its outputs, counted from 0."
        if is_folder:
            rule = (
                "Class folders, sorted by name or in the order of --classes, must be its outputs."
            )
        raise DataError(
            f"The data has {n_classes} classes ({data.class_names[0]} to {data.class_names[-1]}), "
            f"the model {n_logits} logits. {rule} {WAY_OUT}"
        )
    if 2 * n_classes <= n_logits:
        raise DataError(
            f"The data has {n_classes} classes, the model {n_logits} logits; what becomes of the "
            f"others could not be seen. Give images of every class, or cut the model's last layer "
            f"to the classes that are shipped. {WAY_OUT}"
        )


def _for_two(model: nn.Module, two: Example) -> Any:
    """What the model returns for two inputs; one alone it has taken."""
    try:
        return outputs(model, two)
    except GraphError as err:
        name, said = type(model).__name__, err.__cause__ or err
        raise DataError(
            f"{name} takes one input, and fails for 2 at once: {said}. {WRITTEN_IN}"
        ) from err


def _check_task(model: nn.Module, split: Split, task: OwnTask) -> None:
    """Raises where the task's parts do not work on two real images."""
    images, targets = split.batch(slice(0, 2))
    answers = _for_two(model, images)
    found = answers_in(answers)
    more = answers_in(outputs(model, split.model_input(torch.tensor([0, 1, 0]))))
    shapes, of_three = ([tuple(t.shape) for t in each] for each in (found, more))
    if len(found) != len(more) or any(map(_lacks_batch, shapes, of_three)):
        raise DataError(
            f"The model returns {_listed(shapes)} for 2 inputs, {_listed(of_three)} for 3; "
            f"expected tensors of which one dimension runs over the inputs, the first one or "
            f"another. Leave what picks results (as NMS does) to the task's judge; where it is a "
            f"part of the model, the task's network(model) returns the part before it."
        )
    try:
        task.loss(answers, targets)
    except TaskError as err:
        raise TaskError(
            f"{err} It was given what the model returns in evaluation mode, a "
            f"{type(answers).__name__} with {_listed(shapes)} for 2 images. The network learns "
            f"from that, too: parts that only training runs are not run."
        ) from err
    task.metric(task.judge(answers, targets))
    task.distance(answers, answers)


def _lacks_batch(of_two: tuple[int, ...], of_three: tuple[int, ...]) -> bool:
    """Whether not just one dimension of an answer runs over the inputs."""
    if len(of_two) != len(of_three):
        return True
    changed = [pair for pair in zip(of_two, of_three, strict=True) if pair[0] != pair[1]]
    return changed != [(2, 3)]


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))
