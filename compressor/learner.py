"""A network that learns, and what it learns from: targets, the original's answers, its hints."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.containers import map_tensors, tensors_in
from compressor.errors import CompressorError, TaskError, TrainingError
from compressor.hints import NO_HINTS, Hints, Read, hint_loss, keep
from compressor.rows import arranged
from compressor.running import cloned, frozen_norms, learning, work_on_copies
from compressor.tasks import Criterion, OwnTask
from compressor.user_code import told
from compressor.values import FORWARD_FAILURES, Example, call
from compressor.watching import watch


class Learner:
    """A copy of a network, on the device where it learns, with the original beside it.

    Attributes:
        student: The copy; all of it learns but norms that its owner has frozen.
        teacher: A copy of the original; None where nothing is learned from it.
        device: CUDA where it is there.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        criterion: Criterion,
        teacher: nn.Module | None,
        hints: Hints,
        memory_format: torch.memory_format,
        *,
        distillation: float,
        hints_weight: float,
        is_compiled: bool,
    ) -> None:
        self.criterion, self._format = criterion, memory_format
        self._distillation = 0.0 if teacher is None else distillation
        self._hints_weight = hints_weight
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        student = copy.deepcopy(model).eval()
        frozen = frozen_norms(student)
        student.requires_grad_(True)
        for norm in frozen:
            norm.requires_grad_(False)
        self.student = _placed_network(student, self.device, memory_format)
        with failures("cannot be trained, because it does not run"):
            one = self._placed(example)
            work_on_copies(self.student, one)
            self._learning = learning(self.student, one)
        self._forward = torch.compile(self.student) if is_compiled else self.student
        self.teacher = None
        self.hints = hints if hints_weight and teacher is not None else NO_HINTS
        if teacher is not None and (self._distillation or self.hints):
            self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
            _placed_network(self.teacher, self.device, memory_format)
        self._read: Read = {}
        self._wanted: Read = {}
        watch(self.student, self.hints, keep(self._read))
        if self.teacher is not None:
            watch(self.teacher, self.hints, keep(self._wanted))

    def begin(self) -> None:
        """Puts what learns in training mode into it; the rest is in evaluation mode."""
        self.student.eval()
        for module in self._learning:
            module.training = True

    def loss(self, images: Example, targets: Any) -> Tensor:
        """What is to become smaller.

        Args:
            images: As the network takes them; not changed.
            targets: Of these images.

        Raises:
            TrainingError: The network's code, or that of the loss, failed.
        """
        with failures("failed while it was trained"), self._precision():
            outputs, wanted = self._answers(images)
            return self._sum_of_losses(outputs, wanted, self._on_device(targets))

    def checked_loss(self, images: Example, targets: Any) -> Tensor:
        """The loss, after it was looked at whether anything can be learned from it.

        Raises:
            TaskError: Not from the loss or distance of the user's own task.
            TrainingError: Not from this network.
        """
        with failures("cannot be trained", but=(TaskError,)), self._precision():
            outputs, wanted = self._answers(images)
            targets = self._on_device(targets)
            if not any(tensor.requires_grad for tensor in tensors_in(outputs)):
                raise TrainingError(
                    f"{type(self.student).__name__} cannot be trained: its answers have no "
                    f"gradient. Its forward code must not detach them, nor run under no_grad."
                )
            if self._distillation < 1:
                _check_gradient("loss", self.criterion.loss(outputs, targets), self.criterion)
            if self._distillation:
                distance = self.criterion.distance(outputs, wanted)
                _check_gradient("distance", distance, self.criterion)
            return self._sum_of_losses(outputs, wanted, targets)

    def _placed(self, images: Example) -> Example:
        placed: Example = map_tensors(lambda each: each.to(self.device), images)
        return arranged(placed, self._format)

    def _on_device(self, targets: Any) -> Any:
        return map_tensors(lambda each: each.to(self.device), targets)

    def _precision(self) -> torch.autocast:
        in_half = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=in_half)

    def _answers(self, images: Example) -> tuple[Any, Any]:
        """Those of the network and of the original; each may write over its images."""
        placed = self._placed(images)
        outputs = call(self._forward, cloned(placed))
        if self.teacher is None:
            return outputs, None
        with torch.no_grad():
            return outputs, call(self.teacher, cloned(placed))

    def _sum_of_losses(self, outputs: Any, wanted: Any, targets: Any) -> Tensor:
        loss, share = torch.zeros(()), self._distillation
        if share < 1:
            loss = loss + (1 - share) * self.criterion.loss(outputs, targets)
        if share:
            loss = loss + share * self.criterion.distance(outputs, wanted)
        if self.hints:
            hinted = hint_loss(self.student, self.hints, self._read, self._wanted)
            loss = loss + self._hints_weight * hinted
        return loss


@contextmanager
def failures(what: str, *, but: tuple[type[CompressorError], ...] = ()) -> Iterator[None]:
    """Makes a `TrainingError` of what code that is not ours raises while a network is trained."""
    try:
        yield
    except but:
        raise
    except (TaskError, *FORWARD_FAILURES) as err:
        reason = str(err) if isinstance(err, TaskError) else told(err)
        raise TrainingError(f"The network {what}: {reason}") from err


def _check_gradient(part: str, loss: Tensor, criterion: Criterion) -> None:
    """Raises where nothing can be learned from one part of the loss."""
    if loss.requires_grad:
        return
    whose = f"--task {criterion.reference}: " if isinstance(criterion, OwnTask) else ""
    raise TaskError(
        f"{whose}{part} returned a tensor without a gradient; expected one that torch computed "
        f"from the outputs. Leave out .detach(), .item(), NumPy and torch.no_grad()."
    )


def _placed_network(
    network: nn.Module, device: torch.device, memory_format: torch.memory_format
) -> nn.Module:
    """`network`, moved by torch's own `to`: a class of the user's may mean another thing by it."""
    return nn.Module.to(nn.Module.to(network, device), memory_format=memory_format)
