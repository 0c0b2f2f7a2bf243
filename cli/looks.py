"""Commands that look at a model, a file or a device, and leave no run."""

import json
from pathlib import Path
from typing import Annotated, TypedDict

import typer
from compressor.cli import options
from compressor.cli.outcome import EXIT_NOT_MET, exit_with, print_result, refusing, tell
from compressor.cli.progress import LOADING, ProgressDisplay

import compressor
from compressor.errors import ExportError


class Exported(TypedDict):
    """Whether a network can be written for a target: its opset, or why not."""

    target: str
    opset: int | None
    error: str | None


def inspect(
    model: options.Model,
    target: options.Target = None,
    arch: options.Arch = None,
    arch_arg: options.ArchArgs = None,
    data: options.Data = None,
    input_shape: options.InputShape = None,
    weights_key: options.WeightsKey = None,
    trust: options.Trust = None,
    export: Annotated[
        bool,
        typer.Option(
            "--export/--no-export",
            help="Try whether the network can be written for the target; seconds where torch's "
            "second exporter is needed.",
        ),
    ] = True,
    as_json: options.AsJson = False,
    json_progress: options.JsonProgress = False,
) -> None:
    """Lists channel groups, what they cost, why some are locked, and whether it can be exported.

    Without a target it is tried for ONNX Runtime on this machine.

    Example: compress inspect weights.pt --arch torchvision:resnet50 --target jetson-nano
    """
    flags = {"target": "host-cpu"} | options.given(locals())
    flags.pop("export", None)

    def work() -> int:
        from compressor import border

        with refusing():
            config = compressor.load_config(model, flags)
            border.check_model(config)
        with ProgressDisplay(as_json=json_progress) as display:
            display.begins(LOADING)
            loaded, prunable = compressor.inspect_model(config, on_progress=display.on_progress)
            network, example = loaded.module, loaded.example_input
            exported: Exported = {"target": config.target, "opset": None, "error": None}
            if export:
                wanted = compressor.load_target(config.target, precision=config.precision)
                display.on_progress(compressor.Progress("Trying the export", 0, 1))
                try:
                    exported["opset"] = compressor.check_exportable(network, example, wanted)
                except ExportError as err:
                    exported["error"] = str(err)
        if as_json:
            told = compressor.groups_json(prunable.groups, prunable.branches)
            print_result(json.dumps({**told, "export": exported if export else None}, indent=2))
            return 0
        paper = compressor.cost(network, example)
        print_result(compressor.groups_report(prunable.groups, prunable.branches, paper))
        if exported["error"]:
            print_result(f"no export for {config.target}: {exported['error']}")
        elif export:
            print_result(f"can be exported for {config.target}: ONNX opset {exported['opset']}")
        return 0

    exit_with(work, as_json=json_progress)


def explain(
    model: options.Model,
    target: options.Target = None,
    arch: options.Arch = None,
    arch_arg: options.ArchArgs = None,
    data: options.Data = None,
    input_shape: options.InputShape = None,
    device: options.Device = None,
    precision: options.Precision = None,
    weights_key: options.WeightsKey = None,
    trust: options.Trust = None,
    as_json: options.AsJson = False,
    json_progress: options.JsonProgress = False,
) -> None:
    """Says, without a search, which layers cost time on a target and how fast it can be at most.

    Example: compress explain weights.pt --arch torchvision:resnet50 --target host-cpu
    """
    flags = options.given(locals())

    def work() -> int:
        from compressor import border

        with refusing():
            config = compressor.load_config(model, flags)
            border.check_model(config)
        with ProgressDisplay(as_json=json_progress) as display:
            display.begins(LOADING)
            found = compressor.explain(config, on_progress=display.on_progress)
        print_result(
            compressor.explain_json(found) if as_json else compressor.explain_report(found)
        )
        return 0

    exit_with(work, as_json=json_progress)


def measure(
    onnx_file: Annotated[Path, typer.Argument(metavar="M.onnx", help="Model to time.")],
    target: options.GivenTarget,
    against: Annotated[
        Path | None, typer.Option(help="Original to compare with; itself where not given.")
    ] = None,
    device: options.Device = None,
    estimate: options.Estimate = None,
    precision: options.Precision = None,
    fail_below: Annotated[
        float | None,
        typer.Option(
            help="End with 3 where M.onnx is surely not so many times as fast as --against: the "
            "whole 95 % interval lies below. 1.0 stops a release that got slower."
        ),
    ] = None,
    as_json: options.AsJson = False,
    json_progress: options.JsonProgress = False,
) -> None:
    """Times one ONNX model, or two in the same rounds with the ratio's interval.

    Example: compress measure model.onnx --against original.onnx --target raspberry-pi-5
    --device ssh://pi@raspberrypi.local

    Example, in a release pipeline: compress measure new.onnx --against shipped.onnx
    --target host-cpu --fail-below 1.0
    """

    def work() -> int:
        from compressor import border

        how = {"device": device, "precision": precision, "estimate": bool(estimate)}
        with refusing():
            border.check_measured(onnx_file, against, fail_below=fail_below)
            border.check_target(target, **how)
        with ProgressDisplay(as_json=json_progress) as display:
            display.begins(LOADING)
            wanted = compressor.load_target(target, **how)
            pair = compressor.compare_latency(
                against or onnx_file, onnx_file, wanted, on_progress=display.on_progress
            )
        if as_json:
            print_result(compressor.latency_json(pair))
        else:
            print_result(compressor.latency_report(pair, is_pair=against is not None))
        is_slower = fail_below is not None and pair.ci95[1] < fail_below
        if is_slower:
            tell(
                f"{onnx_file} is {pair.ratio:.3f} times as fast as {against}, at most "
                f"{pair.ci95[1]:.3f}; {fail_below:g} was asked."
            )
        return EXIT_NOT_MET if is_slower else 0

    exit_with(work, as_json=json_progress)


def targets(
    name: Annotated[
        str | None, typer.Argument(help="Everything about this profile, with its sources.")
    ] = None,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Lists device profiles, what they run, and which of them answer.

    Example: compress targets jetson-nano --device ssh://nvidia@nano.local
    """

    def work() -> int:
        from compressor import border

        names = [name] if name else list(compressor.target_names())
        with refusing():
            for each in names:
                border.check_target(each, device=device)
        with ProgressDisplay() as display:
            display.begins(LOADING)
            found = [compressor.load_target(each, device=device) for each in names]
            answers = compressor.who_answers(found, on_progress=display.on_progress)
        if as_json:
            print_result(compressor.targets_json(found, answers))
        elif name:
            print_result(compressor.target_report(found[0], answers[found[0].name]))
        else:
            print_result(compressor.targets_report(found, answers))
        return 0

    exit_with(work)


def probe(
    target: options.GivenTarget,
    device: options.Device = None,
    precision: options.Precision = None,
    as_json: options.AsJson = False,
    json_progress: options.JsonProgress = False,
) -> None:
    """Measures what each channel width costs on a device, and keeps the step that follows.

    Runs for that target and device take their step from it from then on. With ONNX Runtime it
    takes a minute; with trtexec, which builds an engine a width, half an hour.

    Example: compress probe --target jetson-orin-nano --device ssh://nvidia@orin.local
    """

    def work() -> int:
        from compressor import border

        with refusing():
            border.check_target(target, device=device, precision=precision)
        with ProgressDisplay(as_json=json_progress) as display:
            display.begins(LOADING)
            wanted = compressor.load_target(target, device=device, precision=precision)
            staircase, kept_in = compressor.probe_target(wanted, on_progress=display.on_progress)
        if as_json:
            print_result(compressor.staircase_json(staircase))
        else:
            print_result(compressor.staircase_report(staircase, wanted, kept_in))
        return 0

    exit_with(work, as_json=json_progress)


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where it is written; beside your model.")
    ] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace one that is there.")] = False,
) -> None:
    """Writes a compress.toml that has every setting with its meaning, commented out.

    Example: compress init models/
    """

    def work() -> int:
        from compressor import border

        path = folder / "compress.toml"
        border.write_settings(path, compressor.commented_toml(), force=force)
        print_result(f"{path} written; take the # away from what you want to set.")
        return 0

    exit_with(work)
