"""Public doors beside `compress` that need several steps."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from compressor import run_folder
from compressor.config import Config
from compressor.errors import (
    ConfigError,
    DeviceError,
    EquivalenceError,
    ModelError,
    PlanError,
    unknown_name,
)
from compressor.graph import channel_groups
from compressor.graph.branches import residual_branches, traced
from compressor.importance import IMPORTANCES
from compressor.job import read_data, read_model
from compressor.latency.device import open_device
from compressor.latency.probe import probe, save
from compressor.model_io import load_weights, read_checkpoint
from compressor.model_io.architectures import build
from compressor.program import export_program
from compressor.prunable import (
    PROGRAM,
    TRACED,
    Prunable,
    disagreement,
    make_prunable,
    with_branches,
)
from compressor.report import text_report, trials_json, trials_report
from compressor.search.space import make_space
from compressor.search.study import read_trials
from compressor.surgery import check_plan, cut, remove_channels
from compressor.values import (
    Basis,
    Branch,
    Example,
    LoadedModel,
    Plan,
    ProgressCallback,
    Staircase,
    Target,
)

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # (images, labels), anew at each call


def prune(
    model: nn.Module,
    example_input: Example,
    plan_or_keep_ratio: Plan | float,
    *,
    importance: str = "l1",
    step: int = 1,
    batches: Batches | None = None,
) -> nn.Module:
    """A smaller copy of `model`, proven to answer like the masked original.

    The input is untouched.

    Where the forward code follows the widths of its tensors, the copy is of the model's own
    class; otherwise it is an fx.GraphModule of its torch.export program, with the same names in
    its state_dict.

    Args:
        model: In eval mode.
        example_input: `(1, c, h, w)`, as the model takes it; a tuple holds positional arguments,
            a dict keyword arguments.
        plan_or_keep_ratio: Which channels stay; or the share in (0, 1] that every group keeps.
        importance: Which channels stay where a ratio is given: a key of `IMPORTANCES`.
        step: Widths become multiples of it where a ratio is given.
        batches: Called for `(images, labels)` pairs by criteria that look at gradients.

    Raises:
        GraphError: The network cannot be recorded, or nothing in it can be pruned.
        PlanError: The plan or the ratio does not fit the network.
        EquivalenceError: The pruned network would not answer like the masked original.
    """
    prunable = make_prunable(model, example_input)
    plan = plan_or_keep_ratio
    if not isinstance(plan, Plan):
        plan = _plan(prunable, plan, importance=importance, step=step, batches=batches)
    check_plan(prunable.groups, plan)
    fault = disagreement(prunable.module, prunable.groups, plan, example_input)
    if fault is not None:
        raise EquivalenceError(f"The pruned network is not the masked original: {fault}.")
    return remove_channels(prunable.module, prunable.groups, plan)


def _plan(
    prunable: Prunable, keep_ratio: float, *, importance: str, step: int, batches: Batches | None
) -> Plan:
    """Every free group at `keep_ratio` of its channels, the most important ones."""
    if not 0 < keep_ratio <= 1:
        raise PlanError(f"The keep ratio must lie in (0, 1]; got {keep_ratio}.")
    if importance not in IMPORTANCES:
        raise PlanError(unknown_name("importance", importance, IMPORTANCES))

    def losses(network: nn.Module) -> Iterator[Tensor]:
        assert batches is not None
        for images, labels in batches():
            yield F.cross_entropy(network(images), labels)

    scores = IMPORTANCES[importance].scores(
        prunable.module, prunable.groups, None if batches is None else losses
    )
    arrays = {name: score.numpy() for name, score in scores.items()}
    space = make_space(prunable.groups, arrays, step=step, min_keep_ratio=0.0)
    (widths,) = space.snap(np.full((1, len(space.groups)), keep_ratio))
    return space.plan(widths)


def load_compressed(
    path: Path,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, object] | None = None,
    original: nn.Module | None = None,
) -> nn.Module:
    """The compressed network of a run, from its `model.pt`.

    Args:
        path: `model.pt` of a run folder; it holds tensors and plain values only.
        arch: The architecture of the *original* network, as given to the run. The one the file
            names is not called unless you name it here: a file must not decide what code is run.
        arch_args: Keyword arguments of the factory; the run's own where not given.
        original: The original network itself, where the run read a module or a `.pt2` program:
            `load_model(...).module`.

    Raises:
        ModelError: The file is not a `model.pt` of a run, or does not fit the original.
    """
    saved = read_checkpoint(path)
    if original is None and arch is None:
        how = f"arch={saved['arch']!r}" if saved["arch"] else "original=load_model(...).module"
        raise ModelError(f"{path} can be rebuilt with {how}; name it.")
    if original is None:
        assert arch is not None
        original = build(arch, dict(arch_args or saved["arch_args"]), beside=path.parent).eval()
    example = torch.zeros(1, *saved["input_shape"])
    if saved.get("form") == PROGRAM and not isinstance(original, fx.GraphModule):
        original = export_program(original, example)
    if saved.get("form") == TRACED:
        original = traced(original)
    plan = Plan(
        {name: tuple(kept) for name, kept in saved["plan"].items()},
        tuple(saved.get("dropped", ())),
    )
    groups = channel_groups(original, example)
    branches: tuple[Branch, ...] = ()
    if plan.dropped:
        assert isinstance(original, fx.GraphModule)
        branches = residual_branches(original, example, groups)
    compact = cut(original, groups, plan, branches)
    load_weights(path, compact, saved["state_dict"], arch or type(original).__name__)
    return compact.eval()


def inspect_model(config: Config) -> tuple[LoadedModel, Prunable]:
    """The model of `config` and its channel groups, as a run would prune it.

    Needs its data only for the input's shape.

    Raises:
        CompressorError: As for `compress`.
    """
    shape = config.input_shape
    if shape is None and config.data is not None:
        shape = read_data(config, config.data).input_shape
    loaded = read_model(config, shape)
    prunable = with_branches(
        make_prunable(loaded.module, loaded.example_input), loaded.example_input
    )
    return replace(loaded, module=prunable.module), prunable


def probe_target(
    target: Target, *, on_progress: ProgressCallback = lambda _progress: None
) -> tuple[Staircase, Path]:
    """What widths cost on the target's device, measured now, and where that is kept.

    From then on `load_target` takes the step from it, and so do searches.

    Raises:
        ConfigError: An estimate has no staircase to be probed.
        DeviceError: The device does not answer.
        MeasurementError: The runtime cannot run one of the layers.
    """
    if target.basis is Basis.ESTIMATE:
        raise ConfigError("Nothing can be probed in an estimate; leave --estimate away.")
    with open_device(target) as device:
        described = device.describe()
        staircase = probe(device, target, on_progress)
    return staircase, save(staircase, target, described)


def who_answers(targets: Sequence[Target]) -> dict[str, str]:
    """Name of a target -> "yes: " and what it runs, or "no: " and why it does not answer."""
    answers = {}
    for target in targets:
        try:
            with open_device(target) as device:
                described = device.describe()
        except DeviceError as err:
            answers[target.name] = f"no: {err}"
        else:
            answers[target.name] = f"yes: {described.get('runtime')} {described.get('version')}"
    return answers


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
