"""`compress MODEL ...` and its sister commands.

Progress goes to stderr; stdout has the result and nothing else. Exit codes: 0 met, 1 our error,
2 usage, 3 the constraint cannot be met, 130 stopped with Ctrl-C.
"""

import json
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from compressor.cli.progress import ProgressDisplay

import compressor
from compressor.errors import CompressorError, ConfigError, InterruptedRunError

EXIT_ERROR, EXIT_USAGE, EXIT_NOT_MET, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 3, 130, 143


# Two apps, because `compress MODEL` needs no command word: `main` looks at the first word.
run_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
commands = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

EPILOG = """Other commands, each with its own --help:

compress inspect MODEL      channel groups, and which are locked and why

compress measure M.onnx     times a model, or two against each other

compress targets            device profiles, and which of them answer

compress probe              what each width costs on a device

compress resume RUN         goes on with a run that was stopped, however that was

compress replay RUN         does the plan follow from the measurements that were kept

compress report RUN         the result of a run, or what an unfinished one has
"""

Model = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="Trained network: state_dict, checkpoint or .pt2."),
]
Target = Annotated[
    str | None, typer.Option(help="Device profile: a name from `compress targets`, or a path.")
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="ssh://USER@HOST",
        help="Where the device is: a URL, or a name from ~/.config/compressor/devices.toml. "
        "Without it: this machine.",
    ),
]
Estimate = Annotated[
    bool | None,
    typer.Option(
        "--estimate", help="Estimate latency from the profile's figures; nothing is measured."
    ),
]
Precision = Annotated[
    str | None, typer.Option(help="fp32 or fp16, in place of the profile's own.")
]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="LIB:NAME",
        help="What builds a state_dict's network: torchvision:resnet18, timm:NAME, or your own "
        "package.module:function.",
    ),
]
ArchArg = Annotated[
    list[str] | None,
    typer.Option(metavar="K=V", help="Keyword argument of that function; may be repeated."),
]
Data = Annotated[Path | None, typer.Option(help="Images: an .npz, or a folder of class folders.")]
InputShape = Annotated[
    str | None, typer.Option(metavar="C,H,W", help="Shape of one input, where there is no data.")
]
Trust = Annotated[
    bool | None, typer.Option("--trust", help="Read pickles in MODEL; runs code from it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@run_app.command(epilog=EPILOG)
def run(
    model: Model,
    target: Target = None,
    speedup: Annotated[
        float | None, typer.Option(help="Must be this many times faster than the original.")
    ] = None,
    max_latency: Annotated[
        str | None, typer.Option(metavar="12ms", help="Or: must not take longer than this.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Or: the fastest network that loses at most so many points."),
    ] = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option(metavar="K=V", help="Largest share of macs or params; may be repeated."),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K=V",
            help="Or: the largest weighted sum of accuracy and savings in time, macs, params.",
        ),
    ] = None,
    pareto: Annotated[
        bool | None,
        typer.Option("--pareto", help="Or: a model for every speed, each in its own folder."),
    ] = None,
    device: Device = None,
    estimate: Estimate = None,
    precision: Precision = None,
    data: Data = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="PKG.MOD:OBJECT",
            help="What a network is for that is no classifier: its data, loss and metric.",
        ),
    ] = None,
    arch: Arch = None,
    arch_arg: ArchArg = None,
    trials: Annotated[int | None, typer.Option(help="Plans to measure. Default 60.")] = None,
    time_budget: Annotated[
        str | None, typer.Option(metavar="30m", help="Begin no new trial after this long.")
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(help="bocr, bo, random, tpe, cma-es, genetic or swarm. Default bocr."),
    ] = None,
    clusters: Annotated[
        int | None, typer.Option(help="Clusters channel groups start in. Default 3.")
    ] = None,
    clustering: Annotated[
        str | None,
        typer.Option(help="What makes groups alike: eu or js (importances), st (structure)."),
    ] = None,
    rollback: Annotated[
        str | None,
        typer.Option(help="From clusters to single groups: direct, gradual or none."),
    ] = None,
    bounds: Annotated[
        str | None,
        typer.Option(help="What the best plans bound after it: global or per-dimension."),
    ] = None,
    fit_to_limit: Annotated[
        str | None,
        typer.Option(help="How plans are brought to a limit on MACs: scale or wall."),
    ] = None,
    depth: Annotated[
        bool | None,
        typer.Option("--depth/--no-depth", help="Whether residual branches may go whole."),
    ] = None,
    least_squares: Annotated[
        bool | None,
        typer.Option(
            "--least-squares/--no-least-squares", help="Whether trials refit cut layers."
        ),
    ] = None,
    recalibration_images: Annotated[
        int | None,
        typer.Option(help="For the batch-norms of every trial; 0 for none. Default 256."),
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(
            help="How channels are ranked: l1, l2, geometric-median, bn-scale, taylor, cpmc, "
            "random. Default l1."
        ),
    ] = None,
    min_keep_ratio: Annotated[
        float | None, typer.Option(help="Floor of every group's width. Default 0.1.")
    ] = None,
    fine_tune_epochs: Annotated[
        int | None, typer.Option(help="Passes over the fit split at the end. Default 10.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate of fine-tuning. Default 0.02.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per step of fine-tuning. Default 64.")
    ] = None,
    finalists: Annotated[
        int | None,
        typer.Option(help="Plans that are trained a little before one gets the rest. Default 4."),
    ] = None,
    distillation: Annotated[
        float | None,
        typer.Option(help="Weight of the original's answers beside the labels. Default 0.7."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of both answers in distillation. Default 4.")
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Share of each label given to other classes. Default 0.")
    ] = None,
    ema: Annotated[
        float | None, typer.Option(help="Decay of averaged weights, like 0.999. Default 0: none.")
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(
            metavar="flip,crop",
            help="Of training images: flip, crop, both, none; auto takes what the original bears.",
        ),
    ] = None,
    compile_: Annotated[
        bool | None, typer.Option("--compile", help="Train with torch.compile.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Resize and crop image files to this side.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Subtracted after scaling to 0..1.")
    ] = None,
    std: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Divided by after that.")
    ] = None,
    input_shape: InputShape = None,
    seed: Annotated[int | None, typer.Option(help="Of every random draw. Default 0.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Empty folder for the run. Default runs/MODEL-TARGET.")
    ] = None,
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Makes MODEL faster on a device and proves it.

    Any option may stand in a `compress.toml` beside the model, under the option's name.

    Example: compress model.pt --arch net:make --data images/ --target host-cpu --speedup 2
    """
    flags = _given(locals())

    def work() -> int:
        config = compressor.load_config(model, flags)
        with ProgressDisplay() as display:
            work_on = compressor.compress_front if config.pareto else compressor.compress
            found = work_on(config, on_trial=display.on_trial, on_progress=display.on_progress)
        return _print_found(found, as_json)

    _exit(work)


@commands.command()
def resume(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    force: Annotated[
        bool,
        typer.Option("--force", help="Although model, data or config.toml changed meanwhile."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Goes on with a run that was stopped: by Ctrl-C, a power cut, or whatever it was.

    Trials and training are taken up where they stood; at most the trial, or the pass over the
    images, that was under way is done again.

    Example: compress resume runs/model-host-cpu
    """

    def work() -> int:
        with ProgressDisplay() as display:
            found = compressor.resume(
                run_folder, force=force,
                on_trial=display.on_trial, on_progress=display.on_progress,
            )  # fmt: skip
        return _print_found(found, as_json)

    _exit(work)


@commands.command()
def replay(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
) -> None:
    """Searches again with the measurements that a run has kept: does the same plan come out?

    Nothing is measured. Exit code 1 where another plan follows.

    Example: compress replay runs/model-host-cpu
    """

    def work() -> int:
        with ProgressDisplay() as display:
            found = compressor.replay(run_folder, on_progress=display.on_progress)
        _print(compressor.replay_report(run_folder, found))
        return 0 if found.differs_at is None else EXIT_ERROR

    _exit(work)


def _print_found(found: "compressor.Result | Sequence[compressor.Result]", as_json: bool) -> int:
    """The result, or those of a front; and the exit code."""
    if isinstance(found, compressor.Result):
        content: object = compressor.to_json(found) if as_json else compressor.text_report(found)
        results: Sequence[compressor.Result] = [found]
    else:
        content = [compressor.to_json(each) for each in found]
        content = content if as_json else compressor.front_report(found)
        results = found
    _print(content if isinstance(content, str) else json.dumps(content, indent=2))
    is_met = any(result.verdict is compressor.Verdict.MET for result in results)
    return 0 if is_met else EXIT_NOT_MET


@commands.command()
def inspect(
    model: Model,
    arch: Arch = None,
    arch_arg: ArchArg = None,
    data: Data = None,
    input_shape: InputShape = None,
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Lists channel groups, what they cost, and why some are locked, before hours are spent.

    Example: compress inspect weights.pt --arch torchvision:resnet50
    """
    flags = _given(locals()) | {"target": "host-cpu"}

    def work() -> int:
        loaded, prunable = compressor.inspect_model(compressor.load_config(model, flags))
        if as_json:
            _print(
                json.dumps(compressor.groups_json(prunable.groups, prunable.branches), indent=2)
            )
        else:
            paper = compressor.cost(loaded.module, loaded.example_input)
            _print(compressor.groups_report(prunable.groups, prunable.branches, paper))
        return 0

    _exit(work)


@commands.command()
def measure(
    onnx_file: Annotated[Path, typer.Argument(metavar="M.onnx", help="Model to time.")],
    target: Annotated[str, typer.Option(help="Device profile.")],
    against: Annotated[
        Path | None, typer.Option(help="Original to compare with; itself where not given.")
    ] = None,
    device: Device = None,
    estimate: Estimate = None,
    precision: Precision = None,
    as_json: AsJson = False,
) -> None:
    """Times one ONNX model, or two in the same rounds with the ratio's interval.

    Example: compress measure model.onnx --against original.onnx --target raspberry-pi-5
    --device ssh://pi@raspberrypi.local
    """

    def work() -> int:
        for path in filter(None, (onnx_file, against)):
            if not path.is_file():
                raise ConfigError(f"No ONNX file at {path}.")
        wanted = compressor.load_target(
            target, device=device, precision=precision, estimate=bool(estimate)
        )
        pair = compressor.compare_latency(against or onnx_file, onnx_file, wanted)
        if as_json:
            _print(compressor.latency_json(pair))
        else:
            _print(compressor.latency_report(pair, is_pair=against is not None))
        return 0

    _exit(work)


@commands.command()
def targets(
    name: Annotated[
        str | None, typer.Argument(help="Everything about this profile, with its sources.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Lists device profiles, what they run, and which of them answer.

    Example: compress targets jetson-nano --device ssh://nvidia@nano.local
    """

    def work() -> int:
        names = [name] if name else list(compressor.target_names())
        found = [compressor.load_target(each, device=device) for each in names]
        answers = compressor.who_answers(found)
        if as_json:
            _print(compressor.targets_json(found, answers))
        elif name:
            _print(compressor.target_report(found[0], answers[found[0].name]))
        else:
            _print(compressor.targets_report(found, answers))
        return 0

    _exit(work)


@commands.command()
def probe(
    target: Annotated[str, typer.Option(help="Device profile.")],
    device: Device = None,
    precision: Precision = None,
    as_json: AsJson = False,
) -> None:
    """Measures what each channel width costs on a device, and keeps the step that follows.

    Runs for that target and device take their step from it from then on. With ONNX Runtime it
    takes a minute; with trtexec, which builds an engine a width, half an hour.

    Example: compress probe --target jetson-orin-nano --device ssh://nvidia@orin.local
    """

    def work() -> int:
        wanted = compressor.load_target(target, device=device, precision=precision)
        with ProgressDisplay() as display:
            staircase, kept_in = compressor.probe_target(wanted, on_progress=display.on_progress)
        if as_json:
            _print(compressor.staircase_json(staircase))
        else:
            _print(compressor.staircase_report(staircase, wanted, kept_in))
        return 0

    _exit(work)


@commands.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: AsJson = False,
) -> None:
    """Shows the result of a run, or the trials of one that was stopped."""

    def work() -> int:
        _print(compressor.folder_report(run_folder, as_json=as_json))
        return 0

    _exit(work)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the `compress` command."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what libraries tell each other; ours are errors or logs
    signal.signal(signal.SIGTERM, _terminate)
    words = list(sys.argv[1:] if args is None else args)
    names = {c.name or c.callback.__name__ for c in commands.registered_commands if c.callback}
    app = commands if words and words[0] in names else run_app
    app(args=words or ["--help"], prog_name="compress")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does, but for the exit code."""


def _terminate(_number: int, _frame: object) -> None:
    raise _Terminated


def _exit(work: Callable[[], int]) -> None:
    """Runs `work` and ends the process with its exit code."""
    try:
        code = work()
    except (InterruptedRunError, KeyboardInterrupt) as err:
        for number in (signal.SIGINT, signal.SIGTERM):  # all is kept; what is left is to exit
            signal.signal(number, signal.SIG_IGN)
        is_told = isinstance(err, InterruptedRunError)
        typer.echo(f"\n{err}" if is_told else "\nStopped.", err=True)
        stopped_by = err.__cause__ if is_told else err
        is_terminated = isinstance(stopped_by, _Terminated)
        code = EXIT_TERMINATED if is_terminated else EXIT_INTERRUPTED
    except CompressorError as err:
        typer.echo(f"error: {err}", err=True)
        code = EXIT_USAGE if isinstance(err, ConfigError) else EXIT_ERROR
    raise typer.Exit(code)


def _print(text: str) -> None:
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except (OSError, AttributeError) as err:  # full, closed, or a pipe that nobody reads
        raise CompressorError(f"The result cannot be written to stdout: {err}.") from err


def _given(flags: dict[str, Any]) -> dict[str, object]:
    """The settings that were given as flags, in the form that `load_config` takes."""
    given: dict[str, object] = {}
    for name, value in flags.items():
        if value in (None, []) or name in ("model", "as_json"):
            continue
        if name in ("mean", "std", "input_shape"):
            given[name] = [part.strip() for part in value.split(",")]
        elif name == "augment" and value != "auto":
            names = [part.strip() for part in value.split(",")]
            given[name] = [] if names == ["none"] else names
        elif name == "compile_":
            given["compile"] = value
        elif name == "arch_arg":
            given["arch_args"] = dict(_key_value(item) for item in value)
        elif name in ("constraint", "weight"):
            given[name] = dict(_key_value(item, f"--{name}") for item in value)
        else:
            given[name] = value
    return given


def _key_value(item: str, flag: str = "--arch-arg") -> tuple[str, object]:
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise typer.BadParameter(f"expected KEY=VALUE, got {item!r}", param_hint=flag)
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        return key, value
    return key, parsed if isinstance(parsed, (bool, int, float)) else value
