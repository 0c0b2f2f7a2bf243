"""Fine-tuning: the pruned network learns the images again, and what the original says of them.

Distillation [hinton2015]: beside the labels, the student learns the original's softened answers,
which cost nothing but its forward pass and say more of an image than its label does. And it is to
read, deep within, what the original reads there (`hints`).

Gradients are clipped [pascanu2013]: a network that has lost most of its layers is steep. An
EfficientNet-Lite0 at 0.41 of its time fell from 67 % to below that in 200 steps, or to no number,
and came to 79.5 % with gradients no longer than 5; at 1 to 78.3 %. ResNet-56, which needs none,
ends as high with 5 (88.2 and 88.3 %), and a point lower with 1.

What is trained is what evaluation runs: see `running` for which parts are in training mode.

[hinton2015] Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015.
[pascanu2013] Pascanu, Mikolov, Bengio, On the difficulty of training RNNs, ICML 2013.
"""

import copy
import io
import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compressor.augmentation import augmented
from compressor.errors import MeasurementError
from compressor.files import UNREADABLE, write_whole
from compressor.hints import NO_HINTS, Hints
from compressor.learner import Learner, failures
from compressor.tasks import CLASSIFICATION, Criterion
from compressor.values import FINE_TUNING, Example, Progress, ProgressCallback, Split

SMALL_STEP, QUICK_STEP_S = 8, 5.0  # images, seconds: how a step is timed
N_CHECKED = 2  # images of the step that shows whether anything can be learned
CONTEST_SHARE, MIN_SHORT = 0.2, 50  # of all steps, and steps: short trainings of finalists
SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the peak, of the way since it
    "cosine": lambda way: 0.5 * (1 + math.cos(math.pi * way)),
    "linear": lambda way: 1 - way,
    "constant": lambda _way: 1.0,
}
MOMENTUM = 0.9
MAX_NORM = 5.0  # of a step's gradient, over all weights; longer ones are shortened

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained on.

    Attributes:
        n_steps: Batches; 0 leaves the weights as they are.
        learning_rate: Peak, reached after the first tenth of the steps.
        batch_size: Images per step.
        schedule: Of `SCHEDULES`: how the rate goes down from its peak.
        weight_decay: On weights; not on norms and biases.
        distillation: Weight of the original's answers in the loss, in [0, 1]; the labels have the
            rest.
        hints: Weight of what the original's layers read, on top of that.
        ema_decay: Of the average of weights over steps that is kept in place of the last; 0 for
            none.
        augmentations: Of `augmentation.AUGMENTATIONS`.
        is_compiled: Whether torch.compile is used.
        seed: Decides the order of the images and what becomes of them.
    """

    n_steps: int
    learning_rate: float
    batch_size: int = 64
    schedule: str = "cosine"
    weight_decay: float = 5e-4
    distillation: float = 0.0
    hints: float = 0.0
    ema_decay: float = 0.0
    augmentations: tuple[str, ...] = ()
    is_compiled: bool = False
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Tuned:
    """What training has come to.

    Attributes:
        model: The best of all that were looked at, the one before training included.
        score: Its score.
        score_before: That of the network before training.
        stopped_because: Why training ended early; None where it did not.
    """

    model: nn.Module
    score: float
    score_before: float
    stopped_because: str | None = None


def fine_tune(
    model: nn.Module,
    fit: Split,
    recipe: Recipe,
    *,
    criterion: Criterion = CLASSIFICATION,
    teacher: nn.Module | None = None,
    hints: Hints = NO_HINTS,
    score: Callable[[nn.Module], float],
    on_progress: ProgressCallback,
    checkpoint: Path | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    has_time: Callable[[], bool] = lambda: True,
) -> Tuned:
    """A trained copy: SGD with Nesterov momentum; the best by `score` is kept.

    Training uses CUDA where it is there, in bfloat16 where the GPU can.

    Args:
        model: Not changed.
        fit: What may be learned from.
        recipe: Steps, learning rate, and so on.
        criterion: What is learned.
        teacher: The original; needed for distillation and hints.
        hints: Which layers of `model` and `teacher` are to read the same.
        score: Larger is better; called after every pass over `fit` and at the end, on images
            that are not in it.
        on_progress: Told of every tenth step.
        checkpoint: Written after every pass. Where it is there already, and of this recipe,
            training goes on from it, and comes out as if it had never stopped.
        memory_format: In which images go through the network.
        has_time: Asked after every step; where it says no, training ends there.

    Raises:
        TrainingError: The network's code, or that of the loss, failed.
    """
    training = _Training(model, fit, recipe, criterion, teacher, hints, score, memory_format)
    if checkpoint is not None and checkpoint.is_file() and not training.load(checkpoint):
        logger.warning("%s is no checkpoint of this training, which begins anew", checkpoint)
        training = _Training(model, fit, recipe, criterion, teacher, hints, score, memory_format)
    per_pass = training.n_batches
    while training.step < recipe.n_steps and training.stopped_because is None:
        end = min((training.step // per_pass + 1) * per_pass, recipe.n_steps)
        training.go_on(end, on_progress, has_time)
        if checkpoint is not None:
            training.save(checkpoint)
    return Tuned(
        training.best.eval(), training.best_score, training.score_before, training.stopped_because
    )


def check_step(
    model: nn.Module,
    fit: Split,
    recipe: Recipe,
    *,
    criterion: Criterion,
    teacher: nn.Module,
    hints: Hints,
    memory_format: torch.memory_format,
) -> float:
    """The loss of one step with a few images, after its backward pass; see `fine_tune`.

    Raises:
        TaskError: Nothing can be learned from the loss or distance of a task of the user's own.
        TrainingError: The network cannot be trained.
    """
    n_images = min(N_CHECKED, recipe.batch_size, len(fit))
    small = replace(recipe, n_steps=1, batch_size=n_images, is_compiled=False)
    training = _Training(
        model, fit, small, criterion, teacher, hints, lambda _model: 0.0, memory_format
    )
    training.learner.begin()
    images, targets = next(training._batches(0, 1))
    loss = training.learner.checked_loss(images, targets)
    with failures("cannot be trained"):
        loss.backward()
    return loss.item()


def step_seconds(
    model: nn.Module,
    fit: Split,
    recipe: Recipe,
    *,
    criterion: Criterion,
    teacher: nn.Module,
    hints: Hints,
    memory_format: torch.memory_format,
) -> float:
    """What one step of training `model` takes: a small one, and a whole one if that was quick."""
    seconds = 0.0
    for n_images in (min(SMALL_STEP, recipe.batch_size), recipe.batch_size):
        one = replace(recipe, n_steps=1, batch_size=n_images, is_compiled=False)
        training = _Training(
            model, fit, one, criterion, teacher, hints, lambda _model: 0.0, memory_format
        )
        began = time.perf_counter()
        training.go_on(1, lambda _progress: None)
        seconds = (time.perf_counter() - began) * recipe.batch_size / n_images
        if seconds > QUICK_STEP_S:
            break
    return seconds


class _Training:
    """A student, its optimizer, and the best that it has been."""

    def __init__(
        self,
        model: nn.Module,
        fit: Split,
        recipe: Recipe,
        criterion: Criterion,
        teacher: nn.Module | None,
        hints: Hints,
        score: Callable[[nn.Module], float],
        memory_format: torch.memory_format,
    ) -> None:
        self.fit, self.recipe, self.criterion, self.score = fit, recipe, criterion, score
        self.learner = Learner(
            model, fit.model_input(torch.arange(1)), criterion, teacher, hints, memory_format,
            distillation=recipe.distillation, hints_weight=recipe.hints,
            is_compiled=recipe.is_compiled,
        )  # fmt: skip
        self.student = self.learner.student
        self.average = None
        if recipe.ema_decay:
            averaged = get_ema_multi_avg_fn(recipe.ema_decay)
            self.average = AveragedModel(self.student, multi_avg_fn=averaged, use_buffers=True)
        self.best = copy.deepcopy(model).eval()
        self.best_score = self.score_before = score(self.best)
        self.step = 0
        self.stopped_because: str | None = None
        self.n_batches = max(1, len(fit) // recipe.batch_size)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.student.parameters() if p.ndim > 1],
             "weight_decay": recipe.weight_decay},
            {"params": [p for p in self.student.parameters() if p.ndim <= 1]},
        ]  # fmt: skip
        self.optimizer = torch.optim.SGD(
            groups, lr=recipe.learning_rate, momentum=MOMENTUM, nesterov=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, partial(_rate_at, n_steps=recipe.n_steps, schedule=recipe.schedule)
        )

    def go_on(
        self,
        end: int,
        on_progress: ProgressCallback,
        has_time: Callable[[], bool] = lambda: True,
    ) -> None:
        """Trains until step `end`, then looks at what has come of it."""
        epoch = self.step // self.n_batches
        self.learner.begin()
        for images, targets in _ahead(self._batches(epoch, end - self.step)):
            loss = self.learner.loss(images, targets)
            if not torch.isfinite(loss):
                self.stopped_because = f"the loss was {loss.item()} in epoch {epoch + 1}"
                logger.warning("fine-tuning stopped: %s", self.stopped_because)
                return
            self.optimizer.zero_grad()
            with failures("failed while it was trained"):
                loss.backward()
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), MAX_NORM)
            self.optimizer.step()
            self.schedule.step()
            if self.average is not None:
                self.average.update_parameters(self.student)
            self.step += 1
            if self.step % 10 == 0:
                note = f"loss {loss.item():.3f}"
                on_progress(Progress(FINE_TUNING, self.step, self.recipe.n_steps, note))
            if self.step < end and not has_time():
                n_steps = self.recipe.n_steps
                self.stopped_because = f"the time budget was spent at step {self.step}/{n_steps}"
                logger.warning("fine-tuning stopped: %s", self.stopped_because)
                break
        candidate = self._as_it_came()
        try:
            score = self.score(candidate)
        except MeasurementError as err:
            self.stopped_because = f"{err} (after epoch {epoch + 1})"
            logger.warning("fine-tuning stopped: %s", self.stopped_because)
            return
        logger.info("epoch %d: score %.4f", epoch + 1, score)
        if score >= self.best_score:  # what came was chosen for its score, what learned was not
            self.best, self.best_score = candidate, score
        on_progress(Progress(FINE_TUNING, self.step, self.recipe.n_steps, f"score {score:.4f}"))

    def _batches(self, epoch: int, n: int) -> Iterator[tuple[Example, Any]]:
        """The first `n` of a pass; the same ones whenever they are asked for."""
        generator = torch.Generator().manual_seed(self.recipe.seed + 7919 * epoch)
        order = torch.randperm(len(self.fit), generator=generator)
        for rows in order.split(self.recipe.batch_size)[:n]:
            images, targets = self.fit.batch(rows)
            if self.recipe.augmentations:
                assert isinstance(images, Tensor)  # `Job.augmentations` has seen to it
                images = augmented(images, self.recipe.augmentations, generator)
            yield images, targets

    def _as_it_came(self) -> nn.Module:
        """The network to look at: a copy that nobody watches, on the CPU and contiguous."""
        network = self.student if self.average is None else self.average.module
        copied = copy.deepcopy(self.best)
        copied.load_state_dict(network.state_dict())
        return copied

    def save(self, path: Path) -> None:
        """Writes all that training needs to go on."""
        content = {
            "recipe": asdict(self.recipe),
            "criterion": repr(self.criterion),
            "step": self.step,
            "student": self.student.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best": self.best.state_dict(),
            "best_score": self.best_score,
            "score_before": self.score_before,
            "stopped_because": self.stopped_because,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_whole(path, buffer.getvalue())

    def load(self, path: Path) -> bool:
        """Goes back to where `save` was called; False, and of no more use, where that fails."""
        try:
            content = torch.load(path, weights_only=True, map_location=self.learner.device)
            own = asdict(self.recipe), repr(self.criterion)
            if (content["recipe"], content["criterion"]) != own:
                return False
            self.step, self.best_score = int(content["step"]), float(content["best_score"])
            self.score_before = float(content["score_before"])
            self.stopped_because = content["stopped_because"]
            self.student.load_state_dict(content["student"])
            if self.average is not None:
                self.average.load_state_dict(content["average"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.schedule.load_state_dict(content["schedule"])
            self.best.load_state_dict(content["best"])
        except UNREADABLE as err:
            logger.warning("%s cannot be read: %s", path, err)
            return False
        return True


def _ahead(batches: Iterator[tuple[Example, Any]]) -> Iterator[tuple[Example, Any]]:
    """The same; each is made while the one before is learned from."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch


def halving(n_plans: int, n_steps: int) -> list[tuple[int, int]]:
    """Successive halving [jamieson2016]: (plans, steps each) of every round but the last.

    A fifth of the steps is spent on the rounds, each round the same; the winner has the rest.
    Fewer plans take part where `MIN_SHORT` steps each would be more than that, and one alone needs
    no round. When the rounds took half of 200 steps, ResNet-56 ended 0.75 points lower than when
    the first plan had them all (one seed).

    [jamieson2016] Jamieson, Talwalkar, Non-stochastic Best Arm Identification, AISTATS 2016.
    """
    n_rounds = math.ceil(math.log2(n_plans))
    rounds = []
    for _ in range(n_rounds):
        rounds.append((n_plans, int(CONTEST_SHARE * n_steps / (n_rounds * n_plans))))
        n_plans = math.ceil(n_plans / 2)
    if rounds and rounds[0][1] < MIN_SHORT:
        return halving(rounds[0][0] - 1, n_steps)
    return rounds


def _rate_at(step: int, *, n_steps: int, schedule: str) -> float:
    """Share of the peak rate at `step`: up over the first tenth of the steps, then as said."""
    n_warm_up = max(1, n_steps // 10)
    if step < n_warm_up:
        return (step + 1) / n_warm_up
    return SCHEDULES[schedule]((step - n_warm_up) / max(1, n_steps - n_warm_up))
