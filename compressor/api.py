"""Public doors beside `compress` that need several steps."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter

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
    RunFolderError,
    unknown_name,
)
from compressor.export import export_onnx
from compressor.exporter import whole_inputs
from compressor.graph import channel_groups
from compressor.graph.branches import residual_branches
from compressor.graph.costs import ran
from compressor.importance import scores_by
from compressor.job import read_model, read_part, read_task
from compressor.latency.device import OPENING, TIMING_BOTH, open_device
from compressor.latency.layers import Profiled, layer_rows, profiled
from compressor.latency.probe import probe, save
from compressor.latency.targets import load_target
from compressor.latency.timing import FINAL
from compressor.model_io import read_checkpoint
from compressor.model_io.architectures import build
from compressor.model_io.weights import load_weights
from compressor.plugins import IMPORTANCES
from compressor.prunable import (
    PROGRAM,
    TRACED,
    Prunable,
    disagreement,
    in_form,
    make_prunable,
    with_branches,
)
from compressor.report import text_report, trials_json, trials_report
from compressor.report.html import html_report
from compressor.rows import example_of
from compressor.scratch import Scratch
from compressor.search.dashboard import Dashboard, dashboard_of
from compressor.search.space import make_space
from compressor.search.study import read_trials
from compressor.surgery import check_dropped, check_plan, cut
from compressor.values import (
    TIMING_LAYERS,
    Basis,
    Branch,
    Example,
    Explained,
    LoadedModel,
    Plan,
    Progress,
    ProgressCallback,
    Role,
    Staircase,
    Target,
    call,
)

Batches = Callable[[], Iterable[tuple[Example, Tensor]]]  # (inputs, labels), anew at each call


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
    its state_dict. Without a residual branch it is an fx.GraphModule too.

    Args:
        model: In eval mode.
        example_input: `(1, c, h, w)`, as the model takes it; a tuple holds positional arguments,
            a dict keyword arguments.
        plan_or_keep_ratio: Which channels and residual branches stay; or the share in (0, 1] that
            every group keeps. `compress inspect` lists the names of both; so does the error for
            an unknown one.
        importance: Which channels stay where a ratio is given: one of `plugins.IMPORTANCES`.
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
    if plan.dropped:
        prunable = with_branches(prunable, example_input)
        if not prunable.branches:
            raise PlanError(
                f"Plan leaves out {', '.join(plan.dropped)}, but {type(model).__name__} has no "
                f"residual branch that can be left out."
            )
    check_plan(prunable.groups, plan)
    check_dropped(prunable.branches, plan)
    fault = disagreement(prunable, plan, example_input)
    if fault is not None:
        raise EquivalenceError(f"The pruned network is not the masked original: {fault}.")
    return prunable.without(plan)


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
            yield F.cross_entropy(call(network, images), labels)

    scores = scores_by(
        importance, prunable.module, prunable.groups, None if batches is None else losses
    )
    space = make_space(prunable.groups, scores, step=step, min_keep_ratio=0.0)
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
            `load_model(...).module`; or the part of it that the task's `network` returned.

    Raises:
        ModelError: The file is not a `model.pt` of a run, or does not fit the original.
    """
    saved = read_checkpoint(path)
    if original is None and saved.get("part_of"):
        raise ModelError(
            f"{path} is a part of its model, the one that `network` of the task "
            f"{saved['part_of']!r} returns; name it: original=task.network(model)."
        )
    if original is None and arch is None:
        how = f"arch={saved['arch']!r}" if saved["arch"] else "original=load_model(...).module"
        raise ModelError(f"{path} can be rebuilt with {how}; name it.")
    if original is None:
        assert arch is not None
        original = build(arch, dict(arch_args or saved["arch_args"]), beside=path.parent).eval()
    example = saved.get("example", torch.zeros(1, *saved["input_shape"]))
    if saved.get("form") in (TRACED, PROGRAM):
        original = in_form(original, saved["form"], example)
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


def inspect_model(
    config: Config, *, on_progress: ProgressCallback = lambda _progress: None
) -> tuple[LoadedModel, Prunable]:
    """The model of `config` and its channel groups, as a run would prune it.

    Args:
        config: What is asked for; its data is needed for the input's shape only.
        on_progress: Told what is done.

    Raises:
        CompressorError: As for `compress`.
    """
    has_data = config.data is not None or config.task is not None
    if has_data and (config.input_shape is None or config.task is not None):
        on_progress(Progress("Reading the images", 0, 1))
        criterion, data = read_task(config, use_labels=False)
        on_progress(Progress("Reading the model", 0, 1))
        loaded = read_part(config, criterion, example_of(data.fit))
    else:
        on_progress(Progress("Reading the model", 0, 1))
        loaded = read_model(config, None)
    on_progress(Progress("Finding channel groups", 0, 1))
    prunable = make_prunable(loaded.module, loaded.example_input)
    on_progress(Progress("Finding residual branches", 0, 1))
    prunable = with_branches(prunable, loaded.example_input)
    return replace(loaded, module=prunable.module), prunable


def explain(
    config: Config, *, on_progress: ProgressCallback = lambda _progress: None
) -> Explained:
    """Where the time of `config`'s model goes on its target, without a search.

    The narrowest plan of the search space is timed: no search can come out faster. Images are
    needed for the shape of the input only.

    Raises:
        CompressorError: As for `compress`.
    """
    target = load_target(
        config.target, device=config.device, precision=config.precision, estimate=config.estimate
    )
    loaded, prunable = inspect_model(config, on_progress=on_progress)
    example, groups = loaded.example_input, prunable.groups
    scores = scores_by("l1", prunable.module, groups, None)
    space = make_space(
        groups, scores,
        step=target.step, min_keep_ratio=config.min_keep_ratio, branches=prunable.branches,
    )  # fmt: skip
    narrow = prunable.without(space.plan(space.narrowest))
    networks = (prunable.module, narrow)
    with Scratch() as folder:
        files = [Path(folder) / f"{i}.onnx" for i in range(len(networks))]
        for i, (network, file) in enumerate(zip(networks, files, strict=True)):
            on_progress(Progress("Exporting both networks", i, 2))
            export_onnx(network, example, file, target=target)
        on_progress(Progress(OPENING, 0, 1))
        with open_device(target, whole_inputs(loaded.module, example)) as device:
            models: list[Profiled] = []
            expected: dict[str, float] = {}
            for network, file in zip(networks, files, strict=True):
                on_progress(Progress(TIMING_LAYERS, len(models), 2, expected=expected))
                began = perf_counter()
                models.append(profiled(device, file, ran(network, example)))
                expected = {TIMING_LAYERS: perf_counter() - began, TIMING_BOTH: FINAL.budget_s}
            on_progress(Progress(TIMING_BOTH, 0, 1))
            at_most = device.compare(*files)
    return Explained(
        target=target,
        layers=layer_rows(*models),
        freedom={
            name: group.name if group.locked_because is None else f"locked: {group.locked_because}"
            for group in groups
            for name in group.modules(Role.PRODUCER)
        },
        at_most=at_most,
        n_free=sum(group.locked_because is None for group in groups),
        n_groups=len(groups),
        n_branches=len(prunable.branches),
    )


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
    on_progress(Progress(OPENING, 0, 1))
    with open_device(target) as device:
        described = device.describe()
        staircase = probe(device, target, on_progress)
    return staircase, save(staircase, target, described)


def who_answers(
    targets: Sequence[Target], *, on_progress: ProgressCallback = lambda _progress: None
) -> dict[str, str]:
    """Name of a target -> "yes: " and what it runs, or "no: " and why it does not answer."""
    answers: dict[str, str] = {}
    for target in targets:
        on_progress(Progress("Asking devices", len(answers), len(targets), target.name))
        try:
            with open_device(target) as device:
                described = device.describe()
        except DeviceError as err:
            answers[target.name] = f"no: {err}"
        else:
            answers[target.name] = f"yes: {described.get('runtime')} {described.get('version')}"
    return answers


@contextmanager
def dashboard(path: Path, *, port: int = 8080) -> Iterator[Dashboard]:
    """The trials of the run in the folder `path`, for a browser on this machine.

    The run may be going on; nothing in its study can be changed from there.

    Args:
        path: The run folder.
        port: Where it is asked for; 0 for any port that is free.

    Raises:
        CompressorError: There is no study, the port cannot be had, or optuna-dashboard is not
            installed.
    """
    with dashboard_of(path / run_folder.STUDY, port) as server:
        yield server


def folder_report(path: Path, *, as_json: bool = False) -> str:
    """The result of the run in the folder `path`, or the trials of one that was not finished.

    Where there is a result, `report.html` is made anew too.

    Raises:
        RunFolderError: There is neither; or the page cannot be written.
    """
    if (path / run_folder.RESULT).is_file():
        result = run_folder.read_result(path)
        study = path / run_folder.STUDY
        page = html_report(result, read_trials(study) if study.is_file() else ())
        try:
            run_folder.RunFolder(path).write_report(page)
        except OSError as err:
            raise RunFolderError(f"{path} cannot be written: {err}.") from err
        return json.dumps(run_folder.to_json(result), indent=2) if as_json else text_report(result)
    trials = read_trials(path / run_folder.STUDY)
    return trials_json(trials) if as_json else trials_report(path, trials)
