"""Commands that begin a run, go on with one, or show one."""

import contextlib
import json
import time
from collections.abc import Sequence
from typing import Annotated

import typer
from compressor.cli import options
from compressor.cli.outcome import EXIT_ERROR, EXIT_NOT_MET, exit_with, print_result, refusing
from compressor.cli.progress import LOADING, ProgressDisplay

import compressor


def run(
    model: options.Model,
    target: options.Target = None,
    speedup: options.Speedup = None,
    max_latency: options.MaxLatency = None,
    max_drop: options.MaxDrop = None,
    constraint: options.Constraints = None,
    weight: options.Weights = None,
    pareto: options.Pareto = None,
    device: options.Device = None,
    estimate: options.Estimate = None,
    precision: options.Precision = None,
    data: options.Data = None,
    classes: options.Classes = None,
    labels: options.Labels = None,
    task: options.Task = None,
    arch: options.Arch = None,
    arch_arg: options.ArchArgs = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    input_shape: options.InputShape = None,
    weights_key: options.WeightsKey = None,
    trust: options.Trust = None,
    trials: options.Trials = None,
    time_budget: options.TimeBudget = None,
    search: options.Search = None,
    clusters: options.Clusters = None,
    clustering: options.Clustering = None,
    rollback: options.Rollback = None,
    bounds: options.Bounds = None,
    fit_to_limit: options.FitToLimit = None,
    depth: options.Depth = None,
    least_squares: options.LeastSquares = None,
    recalibration_images: options.RecalibrationImages = None,
    importance: options.Importance = None,
    min_keep_ratio: options.MinKeepRatio = None,
    seed: options.Seed = None,
    fine_tune_epochs: options.FineTuneEpochs = None,
    learning_rate: options.LearningRate = None,
    schedule: options.Schedule = None,
    weight_decay: options.WeightDecay = None,
    batch_size: options.BatchSize = None,
    finalists: options.Finalists = None,
    distillation: options.Distillation = None,
    hints: options.Hints = None,
    temperature: options.Temperature = None,
    label_smoothing: options.LabelSmoothing = None,
    ema: options.Ema = None,
    augment: options.Augment = None,
    compile_: options.Compile = None,
    out: options.Out = None,
    as_json: options.AsJson = False,
    json_progress: options.JsonProgress = False,
) -> None:
    """Makes MODEL faster on a device and proves it.

    Any option may stand in a `compress.toml` beside the model, under the option's name.

    Example: compress model.pt --arch net:make --data images/ --target host-cpu --speedup 2
    """
    flags = options.given(locals())

    def work() -> int:
        from compressor import border

        began = time.monotonic()  # loading torch counts, too
        with refusing():
            config = compressor.load_config(model, flags)
            border.check_run(config)
        with ProgressDisplay(as_json=json_progress) as display:
            display.begins(LOADING)
            work_on = compressor.compress_front if config.pareto else compressor.compress
            found = work_on(
                config, since=began, on_trial=display.on_trial, on_progress=display.on_progress
            )
        return _print_found(found, as_json)

    exit_with(work, as_json=json_progress)


def resume(
    run_folder: options.RunFolder,
    force: Annotated[
        bool,
        typer.Option("--force", help="Although model, data or config.toml changed meanwhile."),
    ] = False,
    trust: options.Trust = None,
    as_json: options.AsJson = False,
    json_progress: options.JsonProgress = False,
) -> None:
    """Goes on with a run that was stopped: by Ctrl-C, a power cut, or whatever it was.

    Trials and training are taken up where they stood; at most the trial, or the pass over the
    images, that was under way is done again.

    Example: compress resume runs/model-host-cpu
    """

    def work() -> int:
        from compressor import border

        began = time.monotonic()
        with refusing():
            border.check_resumed(run_folder, trust=bool(trust))
        with ProgressDisplay(as_json=json_progress) as display:
            display.begins(LOADING)
            found = compressor.resume(
                run_folder, force=force, trust=bool(trust), since=began,
                on_trial=display.on_trial, on_progress=display.on_progress,
            )  # fmt: skip
        return _print_found(found, as_json)

    exit_with(work, as_json=json_progress)


def replay(
    run_folder: options.RunFolder,
    trust: options.Trust = None,
    json_progress: options.JsonProgress = False,
) -> None:
    """Searches again with the measurements that a run has kept: does the same plan come out?

    Nothing is measured. Exit code 1 where another plan follows.

    Example: compress replay runs/model-host-cpu
    """

    def work() -> int:
        from compressor import border

        with refusing():
            border.check_replayed(run_folder, trust=bool(trust))
        with ProgressDisplay(as_json=json_progress) as display:
            display.begins(LOADING)
            found = compressor.replay(
                run_folder, trust=bool(trust), on_progress=display.on_progress
            )
        print_result(compressor.replay_report(run_folder, found))
        return 0 if found.differs_at is None else EXIT_ERROR

    exit_with(work, as_json=json_progress)


def _print_found(found: "compressor.Result | Sequence[compressor.Result]", as_json: bool) -> int:
    """The result, or those of a front; and the exit code."""
    is_front = not isinstance(found, compressor.Result)
    results = (found,) if isinstance(found, compressor.Result) else found
    if as_json:
        contents = [compressor.to_json(each) for each in results]
        print_result(json.dumps(contents if is_front else contents[0], indent=2))
    elif is_front:
        print_result(compressor.front_report(results))
    else:
        print_result(compressor.text_report(results[0]))
    is_met = any(result.verdict is compressor.Verdict.MET for result in results)
    return 0 if is_met else EXIT_NOT_MET


def report(
    run_folder: options.RunFolder,
    as_json: options.AsJson = False,
) -> None:
    """Shows the result of a run and makes report.html anew; or the trials of one that was stopped.

    Example: compress report runs/model-host-cpu
    """

    def work() -> int:
        from compressor import border

        with refusing():
            border.check_reported(run_folder)
        with ProgressDisplay() as display:
            display.begins(LOADING)
            text = compressor.folder_report(run_folder, as_json=as_json)
        print_result(text)
        return 0

    exit_with(work)


def dashboard(
    run_folder: options.RunFolder,
    port: Annotated[
        int, typer.Option(help="Of this machine; 0 for any that is free.", min=0, max=65535)
    ] = 8080,
) -> None:
    """Shows a run's trials in a browser, also while it goes on; Ctrl-C ends it.

    The study is opened for reading only, and nobody but this machine is answered. Needs
    optuna-dashboard: pip install 'compressor[dashboard]'.

    Example: compress dashboard runs/model-host-cpu
    """

    def work() -> int:
        from compressor import border

        with refusing():
            border.check_dashboard(run_folder)
        with contextlib.ExitStack() as stack:
            with ProgressDisplay() as display:
                display.begins(LOADING)
                server = stack.enter_context(compressor.dashboard(run_folder, port=port))
            print_result(f"{server.address} shows {run_folder}; Ctrl-C ends it.")
            with contextlib.suppress(KeyboardInterrupt):
                server.serve()
        return 0

    exit_with(work)
