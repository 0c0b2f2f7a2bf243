"""What repairs accuracy after channels were removed: BatchNorm recalibration and fine-tuning."""

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from compressor.values import BATCH_NORMS, Progress, ProgressCallback, Split

logger = logging.getLogger(__name__)


def recalibrate_batch_norm(
    model: nn.Module,
    split: Split,
    *,
    n_images: int = 256,
    batch_size: int = 64,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> nn.Module:
    """A copy whose batch-norm statistics are those of the pruned network.

    Removed channels change what the next layers see, so the running statistics no longer
    describe it. They are replaced by the plain mean over a few batches.

    Args:
        model: Not changed.
        split: The fit split.
        n_images: Drawn at random, always the same ones: splits are often sorted by class.
        batch_size: At least 2; batch-norm of one image has no variance.
        memory_format: In which images go through; what comes back is contiguous.
    """
    recalibrated = copy.deepcopy(model).to(memory_format=memory_format)
    norms = [m for m in recalibrated.modules() if isinstance(m, BATCH_NORMS)]
    momenta = [norm.momentum for norm in norms]
    if not norms or len(split) < 2:
        return recalibrated.eval()
    recalibrated.eval()  # dropout stays off; only the norms look at the batch
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
        norm.train()
    with torch.inference_mode():
        for rows in split.draw(n_images).split(batch_size):
            if len(rows) > 1:
                recalibrated(split.model_input(rows).to(memory_format=memory_format))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return recalibrated.to(memory_format=torch.contiguous_format).eval()


@dataclass(frozen=True)
class FineTuneRecipe:
    """How the chosen network is trained on.

    Attributes:
        n_epochs: Passes over the fit split; 0 leaves the weights as they are.
        learning_rate: Peak, reached after the first tenth of the steps, then cosine to 0.
        batch_size: Images per step.
        weight_decay: On weights; not on norms and biases.
        seed: Decides the order of the images.
    """

    n_epochs: int
    learning_rate: float
    batch_size: int = 64
    weight_decay: float = 5e-4
    seed: int = 0


def fine_tune(
    model: nn.Module,
    fit: Split,
    recipe: FineTuneRecipe,
    *,
    score: Callable[[nn.Module], float],
    on_progress: ProgressCallback,
) -> nn.Module:
    """A trained copy: SGD with Nesterov momentum; the best epoch by `score` is kept.

    Args:
        model: Not changed; where no epoch is better, a copy of it comes back.
        fit: What may be learned from.
        recipe: Epochs, learning rate, and so on.
        score: Larger is better; called after every epoch, on images that are not in `fit`.
        on_progress: Told after every epoch, and within it every 10 steps.
    """
    student = copy.deepcopy(model).requires_grad_(True)
    best, best_score = copy.deepcopy(model).eval(), score(model)
    n_batches = max(1, len(fit) // recipe.batch_size)
    n_steps = recipe.n_epochs * n_batches
    if not n_steps:
        return best
    parameters: list[dict[str, Any]] = [
        {"params": [p for p in student.parameters() if p.ndim > 1],
         "weight_decay": recipe.weight_decay},
        {"params": [p for p in student.parameters() if p.ndim <= 1]},
    ]  # fmt: skip
    optimizer = torch.optim.SGD(
        parameters,
        lr=recipe.learning_rate, momentum=0.9, nesterov=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate_at, n_steps=n_steps))
    generator = torch.Generator().manual_seed(recipe.seed)
    for epoch in range(recipe.n_epochs):
        student.train()
        order = torch.randperm(len(fit), generator=generator)
        for step in range(n_batches):
            rows = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            loss = F.cross_entropy(student(fit.model_input(rows)), fit.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done = epoch * n_batches + step + 1
            if done % 10 == 0:
                on_progress(Progress("Fine-tuning", done, n_steps, f"loss {loss.item():.3f}"))
        epoch_score = score(student.eval())
        if epoch_score > best_score:
            best, best_score = copy.deepcopy(student), epoch_score
        logger.info("epoch %d: search accuracy %.4f", epoch + 1, epoch_score)
        note = f"accuracy {epoch_score:.2%}"
        on_progress(Progress("Fine-tuning", (epoch + 1) * n_batches, n_steps, note))
    return best.eval()


def _rate_at(step: int, *, n_steps: int) -> float:
    """Share of the peak rate at `step`: up over the first tenth of the steps, then cosine to 0."""
    n_warm_up = max(1, n_steps // 10)
    if step < n_warm_up:
        return (step + 1) / n_warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - n_warm_up) / max(1, n_steps - n_warm_up)))
