"""What is compressed for what: read, checked, and in memory, before anything is written."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor import border
from compressor.augmentation import N_TRIED_IMAGES, suitable
from compressor.bench import check_surgery
from compressor.config import AUTO, NO_LABELS, Config, make_config
from compressor.datasets import load_data
from compressor.errors import ConfigError, TrainingError
from compressor.evaluate import memory_format, posed
from compressor.hints import NO_HINTS, choose_hints
from compressor.importance import scores_by
from compressor.latency.targets import load_target
from compressor.matching import check_outputs, check_whole_numbers
from compressor.prunable import Prunable, load_model, make_prunable, with_branches
from compressor.recovery import Recovery
from compressor.rows import example_of, images_at_once, is_images
from compressor.search import make_strategy
from compressor.search.objective import FEATURES, Strategy
from compressor.search.space import SearchSpace, make_space
from compressor.tasks import (
    AGREEMENT,
    CLASSIFICATION,
    Criterion,
    OwnTask,
    load_task,
    task_data,
)
from compressor.training import Recipe, check_step
from compressor.values import (
    READING,
    ChannelGroup,
    Data,
    Example,
    LoadedModel,
    Plan,
    Progress,
    ProgressCallback,
    Split,
    Target,
    batches,
    call,
    example_shapes,
    few,
)

LONG_CHECK_S = 2.0  # of the first networks whose training is tried; then there is no third
N_PARTS = 7  # of what is read and checked
N_RANKING_IMAGES = 500  # that gradients are averaged over, where importance looks at them

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Job:
    """What is compressed for what, checked and in memory."""

    config: Config
    target: Target
    loaded: LoadedModel
    criterion: Criterion
    data: Data
    prunable: Prunable
    space: SearchSpace
    strategy: Strategy

    @property
    def model(self) -> nn.Module:
        """The original, in the form in which it is pruned."""
        return self.prunable.module

    @property
    def recovery(self) -> Recovery:
        """What is done to pruned networks before their accuracy is taken."""
        config = self.config
        return Recovery(config.least_squares, config.recalibration_images)

    @property
    def n_steps(self) -> int:
        """Of all training together."""
        if not self.data.is_trainable:
            return 0
        n_batches = max(1, len(self.data.fit) // self.config.batch_size)
        return self.config.fine_tune_epochs * n_batches

    def recipe(self, n_steps: int, seed: int) -> Recipe:
        """How it is trained on."""
        config = self.config
        return Recipe(
            n_steps=n_steps,
            learning_rate=config.learning_rate,
            schedule=config.schedule,
            weight_decay=config.weight_decay,
            batch_size=config.batch_size,
            distillation=self.distillation,
            hints=config.hints,
            ema_decay=config.ema,
            augmentations=self.augmentations,
            is_compiled=config.compile,
            seed=seed,
        )

    @property
    def lesson(self) -> Criterion:
        """What is learned, where it is not quite what is measured."""
        return self.criterion.lesson(self.config.temperature, self.config.label_smoothing)

    @property
    def distillation(self) -> float:
        """Weight of the original's answers."""
        return self.criterion.distillation(self.config.distillation)

    @cached_property
    def augmentations(self) -> tuple[str, ...]:
        """What becomes of images while the network is trained."""
        if self.config.augment != AUTO:
            if self.config.augment and not is_images(self.example):
                raise ConfigError(
                    f"--augment changes images, (n, c, h, w); the inputs here are "
                    f"{example_shapes(self.example)}. Leave it away."
                )
            return tuple(self.config.augment)
        if not self.criterion.is_share:  # its dataset's own business
            return ()
        some = posed_part(self.data.search, N_TRIED_IMAGES, self.model, self.criterion)
        return suitable(self.model, some)

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Its channel groups."""
        return self.prunable.groups

    @property
    def example(self) -> Example:
        """One input, as the model takes it."""
        return self.loaded.example_input


def prepare(
    config: Config,
    *,
    is_new: bool = True,
    on_progress: ProgressCallback = lambda _progress: None,
) -> Job:
    """Everything that bad input can break, before anything is written.

    Args:
        config: What is asked for.
        is_new: Whether its folder must be free; not where a run goes on.
        on_progress: Told which part is being read or checked.
    """

    def tell(n_done: int, note: str) -> None:
        on_progress(Progress(READING, n_done, N_PARTS, note))

    tell(0, "images")
    border.check_run(config, is_new=is_new)
    strategy = make_strategy(config)
    if FEATURES in strategy.needs and config.task is not None:
        raise ConfigError(f"--search {config.search} looks at classes; a task has none.")
    target = load_target(
        config.target,
        device=config.device,
        precision=config.precision,
        estimate=config.estimate,
    )
    criterion, data = read_task(config)
    if criterion is AGREEMENT:  # which may have come to light just now
        config = make_config(dict(config) | {"labels": NO_LABELS})
    example = example_of(data.fit)
    tell(1, "the model")
    loaded = read_part(config, criterion, example)
    check_whole_numbers(loaded.module, data)
    check_outputs(loaded, data, criterion, config)
    tell(2, "channel groups")
    prunable = make_prunable(loaded.module, loaded.example_input)
    if config.depth:
        tell(3, "residual branches")
        prunable = with_branches(prunable, loaded.example_input)
    groups = prunable.groups
    tell(4, "which channels matter")
    some = posed_part(data.fit, N_RANKING_IMAGES, prunable.module, criterion)
    losses = partial(_ranking_losses, some, criterion)
    scores = scores_by(config.importance, prunable.module, groups, losses)
    space = make_space(
        groups,
        scores,
        step=target.step,
        min_keep_ratio=config.min_keep_ratio,
        branches=prunable.branches,
    )
    job = Job(config, target, loaded, criterion, data, prunable, space, strategy)
    _ = config.augment == AUTO or job.augmentations
    tell(5, "whether the narrowest network answers rightly")
    check_surgery(prunable, space.plan(space.narrowest), data)
    tell(6, "whether networks can be trained")
    check_training(job)
    tell(N_PARTS, "")
    return job


def check_training(job: Job) -> None:
    """One step forward and back, on few images, of networks of every kind that may be trained.

    These are the original, the narrowest network, and one without every second branch, each with
    the loss that it would be trained with. Where a step takes long, the last one is left out.

    Raises:
        TaskError: Nothing can be learned from the task's loss or distance.
        TrainingError: A network cannot be trained, or the original's loss is no number.
    """
    if not job.n_steps:
        return
    began = time.perf_counter()
    space, names = job.space, [branch.name for branch in job.prunable.branches]
    plans = {
        "the original": Plan({}),
        "the narrowest plan's network": space.plan(space.narrowest),
    }
    if names[::2] != names:
        plans[f"the network without {', '.join(names[::2])}"] = Plan({}, tuple(names[::2]))
    few = job.data.fit.model_input(torch.arange(min(2, len(job.data.fit))))
    layout = memory_format(job.model, few)
    for what, plan in plans.items():
        if plan.dropped and plan.kept == {} and time.perf_counter() - began > LONG_CHECK_S:
            logger.info("whether %s can be trained was not tried", what)
            continue
        loss = _one_step(job, what, plan, layout)
        if not plan.kept and not plan.dropped and not math.isfinite(loss):
            raise TrainingError(
                f"The loss of the original is {loss} on real images; expected a finite number. "
                f"Look at what the loss divides by or takes a logarithm of, and at the targets."
            )
        if not math.isfinite(loss):
            logger.warning("the loss of %s is %s before anything was repaired", what, loss)


def _one_step(job: Job, what: str, plan: Plan, layout: torch.memory_format) -> float:
    """The loss of the network that `plan` leaves; errors say which network it was."""
    network = job.prunable.without(plan)
    config, hints = job.config, NO_HINTS
    recipe = Recipe(  # without augmentations, which take long to be chosen
        1, config.learning_rate, config.batch_size, distillation=job.distillation,
        hints=config.hints, seed=config.seed,
    )  # fmt: skip
    if recipe.hints:
        kept = job.prunable.kept_positions(plan)
        hints = choose_hints(job.model, network, kept, job.example)
    try:
        return check_step(
            network, job.data.fit, recipe,
            criterion=job.lesson, teacher=job.model, hints=hints, memory_format=layout,
        )  # fmt: skip
    except TrainingError as err:
        raise TrainingError(
            f"{err} It was tried with {what}, before anything was searched. Nothing is trained "
            f"with --fine-tune-epochs 0."
        ) from err


def posed_part(split: Split, n: int, original: nn.Module, criterion: Criterion) -> Split:
    """At most `n` images at random, always the same ones, with what is judged by."""
    n_at_once = images_at_once(split)
    return posed(lambda: original, few(split, n), batch_size=n_at_once, criterion=criterion)


def _ranking_losses(some: Split, criterion: Criterion, network: nn.Module) -> Iterator[Tensor]:
    """What importance may look at: losses on some images."""
    for images, targets in batches(some, images_at_once(some)):
        yield criterion.loss(call(network, images), targets)


def read_task(config: Config, *, use_labels: bool = True) -> tuple[Criterion, Data]:
    """What the network is for, and its images; False for the images alone."""
    if config.task is not None:
        task = load_task(config.task, beside=config.model.parent)
        return task, task_data(task)
    assert config.data is not None  # see `Config.check_goal`
    data = read_data(config, config.data, use_labels=use_labels)
    if data.class_names:
        return CLASSIFICATION, data
    if use_labels and config.labels != NO_LABELS:
        logger.warning(
            "%s has no labels: accuracy is agreement with the original's answers", config.data
        )
    return AGREEMENT, data


def read_data(config: Config, source: Path, *, use_labels: bool = True) -> Data:
    """The images at `source`, as `config` wants them read; False for the images alone."""
    return load_data(
        source,
        image_size=config.image_size,
        n_channels=config.input_shape[0] if config.input_shape else None,
        classes=config.classes,
        mean=config.mean,
        std=config.std,
        seed=config.seed,
        use_labels=use_labels and config.labels != NO_LABELS,
    )


def read_part(config: Config, criterion: Criterion, example: Example) -> LoadedModel:
    """What is compressed: the model of `config`, or the part of it that its task picks.

    Raises:
        ConfigError: `--input-shape` is not what the data has.
        CompressorError: As for `load_model`; or the task's own code failed.
    """
    shape = config.input_shape
    if shape is not None and example_shapes(example) != example_shapes(torch.empty(1, *shape)):
        raise ConfigError(
            f"--input-shape is {shape}, but one input of the data is {example_shapes(example)}."
        )
    loaded = read_model(config, example)
    if isinstance(criterion, OwnTask):
        return replace(loaded, module=criterion.network(loaded.module))
    return loaded


def read_model(config: Config, example: Example | None) -> LoadedModel:
    """The model of `config`, which takes what `example` is, where there is one."""
    return load_model(
        config.model,
        arch=config.arch,
        arch_args=config.arch_args,
        input_shape=config.input_shape if example is None else None,
        example=example,
        trust=config.trust,
        weights_key=config.weights_key,
    )
