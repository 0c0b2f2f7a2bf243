"""What is compressed for what: read, checked, and in memory, before anything is written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from torch import Tensor, nn

from compressor import run_folder
from compressor.bench import BATCH_SIZE, Recovery, check_surgery
from compressor.config import AUTO, Config
from compressor.datasets import load_data
from compressor.errors import ConfigError, DataError
from compressor.graph import outputs
from compressor.importance import IMPORTANCES
from compressor.latency.ssh import find_device
from compressor.latency.targets import load_target
from compressor.prunable import Prunable, load_model, make_prunable, with_branches
from compressor.search.space import SearchSpace, make_space
from compressor.training import Recipe, suitable
from compressor.values import ChannelGroup, Data, LoadedModel, Split, Target

N_RANKING_IMAGES = 500  # that gradients are averaged over, where importance looks at them


@dataclass(frozen=True, eq=False)
class Job:
    """What is compressed for what, checked and in memory."""

    config: Config
    target: Target
    loaded: LoadedModel
    data: Data
    prunable: Prunable
    space: SearchSpace

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
        n_batches = max(1, len(self.data.fit) // self.config.batch_size)
        return self.config.fine_tune_epochs * n_batches

    def recipe(self, n_steps: int, seed: int) -> Recipe:
        """How it is trained on."""
        config = self.config
        return Recipe(
            n_steps=n_steps,
            learning_rate=config.learning_rate,
            batch_size=config.batch_size,
            distillation=config.distillation,
            temperature=config.temperature,
            label_smoothing=config.label_smoothing,
            ema_decay=config.ema,
            augmentations=self.augmentations,
            is_compiled=config.compile,
            seed=seed,
        )

    @cached_property
    def augmentations(self) -> tuple[str, ...]:
        """What becomes of images while the network is trained."""
        if self.config.augment == AUTO:
            return suitable(self.model, self.data.search)
        return tuple(self.config.augment)

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Its channel groups."""
        return self.prunable.groups

    @property
    def example(self) -> Tensor:
        """`(1, c, h, w)`; `prepare` has checked that the model takes one tensor."""
        assert isinstance(self.loaded.example_input, Tensor)
        return self.loaded.example_input


def prepare(config: Config) -> Job:
    """Everything that bad input can break, before anything is written."""
    config.check_goal()
    if config.device is not None:
        find_device(config.device)
    if config.out is not None:
        run_folder.check_free(config.out)
    target = load_target(
        config.target,
        device=config.device,
        precision=config.precision,
        estimate=config.estimate,
    )
    if config.data is None:
        raise ConfigError("No images to rank plans by; give --data FILE.npz or --data FOLDER.")
    data = read_data(config, config.data)
    if config.input_shape is not None and config.input_shape != data.input_shape:
        raise ConfigError(
            f"--input-shape is {config.input_shape}, but the images are {data.input_shape}."
        )
    loaded = read_model(config, data.input_shape)
    _check_outputs(loaded, data, is_folder=config.data.is_dir())
    prunable = make_prunable(loaded.module, loaded.example_input)
    if config.depth:
        prunable = with_branches(prunable, loaded.example_input)
    groups = prunable.groups
    scores = IMPORTANCES[config.importance].scores(
        prunable.module, groups, partial(_ranking_batches, data.fit)
    )
    space = make_space(
        groups,
        {name: score.numpy() for name, score in scores.items()},
        step=target.step,
        min_keep_ratio=config.min_keep_ratio,
        branches=prunable.branches,
    )
    job = Job(config, target, loaded, data, prunable, space)
    check_surgery(prunable, space.plan(space.narrowest), data)
    return job


def _ranking_batches(fit: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """What importance may look at: some images of every kind, always the same ones."""
    for rows in fit.draw(N_RANKING_IMAGES).split(BATCH_SIZE):
        yield fit.model_input(rows), fit.labels[rows]


def _check_outputs(loaded: LoadedModel, data: Data, *, is_folder: bool) -> None:
    """Raises `DataError` where the model has not one logit for every class."""
    if not isinstance(loaded.example_input, Tensor):
        raise DataError("The model takes several inputs; images alone cannot rank its plans.")
    output = outputs(loaded.module, loaded.example_input)
    if not isinstance(output, Tensor) or output.ndim != 2:
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise DataError(
            f"The model must return one tensor of logits, shape (1, n_classes); it returns {what}."
        )
    n_classes, n_logits = len(data.class_names), output.shape[1]
    if n_logits < n_classes or (is_folder and n_logits != n_classes):
        raise DataError(
            f"The data has {n_classes} classes ({data.class_names[0]} to {data.class_names[-1]}), "
            f"the model {n_logits} logits. Class folders, sorted by name, must be its outputs."
        )


def read_data(config: Config, source: Path) -> Data:
    """The images at `source`, as `config` wants them read."""
    return load_data(
        source,
        image_size=config.image_size,
        n_channels=config.input_shape[0] if config.input_shape else None,
        mean=config.mean,
        std=config.std,
        seed=config.seed,
    )


def read_model(config: Config, input_shape: Sequence[int] | None) -> LoadedModel:
    """The model of `config`."""
    return load_model(
        config.model,
        arch=config.arch,
        arch_args=config.arch_args,
        input_shape=input_shape,
        trust=config.trust,
    )
