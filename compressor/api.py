"""Public doors beside `compress` that need several steps."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from compressor import run_folder
from compressor.config import Config
from compressor.errors import ModelError, PlanError, unknown_name
from compressor.graph import channel_groups
from compressor.importance import IMPORTANCES
from compressor.model_io import build, load_weights, read_checkpoint
from compressor.pipeline import read_data, read_model
from compressor.report import text_report, trials_json, trials_report
from compressor.search.space import make_space
from compressor.search.study import read_trials
from compressor.surgery import remove_channels
from compressor.values import ChannelGroup, LoadedModel, Plan


def prune(
    model: nn.Module,
    example_input: Tensor,
    plan_or_keep_ratio: Plan | float,
    *,
    importance: str = "l1",
    step: int = 1,
) -> nn.Module:
    """A smaller copy of `model`; the input is untouched.

    Args:
        model: In eval mode.
        example_input: `(1, c, h, w)`, as the model takes it.
        plan_or_keep_ratio: Which channels stay; or the share in (0, 1] that every group keeps.
        importance: Which channels stay where a ratio is given: a key of `IMPORTANCES`.
        step: Widths become multiples of it where a ratio is given.

    Raises:
        GraphError: The network cannot be traced, or nothing in it can be pruned.
        PlanError: The plan or the ratio does not fit the network.
    """
    groups = channel_groups(model, example_input)
    if isinstance(plan_or_keep_ratio, Plan):
        return remove_channels(model, groups, plan_or_keep_ratio)
    keep_ratio = plan_or_keep_ratio
    if not 0 < keep_ratio <= 1:
        raise PlanError(f"The keep ratio must lie in (0, 1]; got {keep_ratio}.")
    if importance not in IMPORTANCES:
        raise PlanError(unknown_name("importance", importance, IMPORTANCES))
    score = IMPORTANCES[importance].score
    scores = {group.name: score(model, group).numpy() for group in groups}
    space = make_space(groups, scores, step=step, min_keep_ratio=0.0)
    (widths,) = space.snap(np.full((1, len(space.groups)), keep_ratio))
    return remove_channels(model, groups, space.plan(widths))


def load_compressed(
    path: Path, *, arch: str | None = None, arch_args: Mapping[str, object] | None = None
) -> nn.Module:
    """The compressed network of a run, from its `model.pt`.

    Args:
        path: `model.pt` of a run folder; it holds tensors and plain values only.
        arch: The factory of the *original* network, as given to the run. The one the file names
            is not called unless you name it here: a file must not decide what code is run.
        arch_args: Keyword arguments of the factory; the run's own where not given.

    Raises:
        ModelError: The file is not a `model.pt` of a run, or does not fit the factory.
    """
    saved = read_checkpoint(path)
    if arch is None:
        raise ModelError(f"{path} was made with arch={saved['arch']!r}; name it to rebuild it.")
    original = build(arch, dict(arch_args or saved["arch_args"]), beside=path.parent)
    example = torch.zeros(1, *saved["input_shape"])
    groups = channel_groups(original.eval(), example)
    plan = Plan({name: tuple(kept) for name, kept in saved["plan"].items()})
    compact = remove_channels(original, groups, plan)
    load_weights(path, compact, saved["state_dict"], arch)
    return compact.eval()


def inspect_model(config: Config) -> tuple[LoadedModel, tuple[ChannelGroup, ...]]:
    """The model of `config` and its channel groups; needs its data only for the input's shape.

    Raises:
        CompressorError: As for `compress`.
    """
    shape = config.input_shape
    if shape is None and config.data is not None:
        shape = read_data(config, config.data).input_shape
    loaded = read_model(config, shape)
    return loaded, channel_groups(loaded.module, loaded.example_input)


def folder_report(path: Path, *, as_json: bool = False) -> str:
    """The result of the run in the folder `path`, or the trials of one that was not finished.

    Raises:
        RunFolderError: There is neither.
    """
    if (path / run_folder.RESULT).is_file():
        result = run_folder.read_result(path)
        return json.dumps(run_folder.to_json(result), indent=2) if as_json else text_report(result)
    trials = read_trials(path / run_folder.STUDY)
    return trials_json(trials) if as_json else trials_report(path, trials)
