"""Options of `compress`, in the groups that its help shows them in.

What an option takes is checked in `compressor.config`; the names that are listed here are what
help and TAB know of it before anything heavy is imported.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from compressor.plugins import IMPORTANCES, STRATEGIES

WANTED, DEVICE, MODEL = "What is wanted", "The device", "Model and images"
SEARCH, TRAINING, OUTPUT = "Search", "Training at the end", "What comes out"

CLUSTERINGS = ("eu", "js", "st")
LABELS = ("auto", "none")
ROLLBACKS = ("none", "direct", "gradual")
BOUNDS = ("global", "per-dimension")
FITS = ("scale", "wall")
PRECISIONS = ("fp32", "fp16")
AUGMENTATIONS = ("auto", "none", "flip", "crop", "jitter", "erase", "flip,crop")
SCHEDULES = ("cosine", "linear", "constant")


def targets() -> list[str]:
    """Names of device profiles, for TAB."""
    import compressor

    return list(compressor.target_names())


def _option(panel: str, text: str, *, one_of: Iterable[str] = (), **more: Any) -> Any:
    """An option in its group of the help; `one_of` are its names, for help and TAB."""
    if names := list(one_of):
        more["autocompletion"] = lambda: names
    return typer.Option(help=text, rich_help_panel=panel, **more)


def _flag(panel: str, name: str, text: str) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel)


Model = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="Trained network: state_dict, checkpoint or .pt2."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]

# What is wanted.
Speedup = Annotated[
    float | None, _option(WANTED, "Must be this many times faster than the original.")
]
MaxLatency = Annotated[
    str | None, _option(WANTED, "Or: must not take longer than this.", metavar="12ms")
]
MaxDrop = Annotated[
    float | None, _option(WANTED, "Or: the fastest network that loses at most so many points.")
]
Constraints = Annotated[
    list[str] | None,
    _option(WANTED, "Largest share of macs or params; may be repeated.", metavar="K=V"),
]
Weights = Annotated[
    list[str] | None,
    _option(
        WANTED, "Or: the largest weighted sum of accuracy and savings in time, macs, params.",
        metavar="K=V",
    ),
]  # fmt: skip
Pareto = Annotated[
    bool | None,
    _flag(WANTED, "--pareto", "Or: a model for every speed, each in its own folder."),
]

# The device.
Target = Annotated[
    str | None,
    _option(
        DEVICE, "Device profile: a name from `compress targets`, or a path.",
        autocompletion=targets,
    ),
]  # fmt: skip
GivenTarget = Annotated[str, _option(DEVICE, "Device profile.", autocompletion=targets)]
Device = Annotated[
    str | None,
    _option(
        DEVICE,
        "Where the device is: a URL, or a name from ~/.config/compressor/devices.toml. "
        "Without it: this machine.",
        metavar="ssh://USER@HOST",
    ),
]
Estimate = Annotated[
    bool | None,
    _flag(
        DEVICE, "--estimate",
        "Estimate latency from the profile's figures; nothing is measured.",
    ),
]  # fmt: skip
Precision = Annotated[
    str | None,
    _option(DEVICE, "fp32 or fp16, in place of the profile's own.", one_of=PRECISIONS),
]

# Model and images.
Arch = Annotated[
    str | None,
    _option(
        MODEL,
        "What builds a state_dict's network: torchvision:resnet18, timm:NAME, or your own "
        "package.module:function.",
        metavar="LIB:NAME",
    ),
]
ArchArgs = Annotated[
    list[str] | None,
    _option(MODEL, "Keyword argument of that function; may be repeated.", metavar="K=V"),
]
Data = Annotated[
    Path | None,
    _option(MODEL, "Images: an .npz, or a folder of class folders, or of images without labels."),
]
Classes = Annotated[
    Path | None,
    _option(MODEL, "Order of the class folders: a file with a name a line.", metavar="FILE"),
]
Labels = Annotated[
    str | None,
    _option(
        MODEL,
        "none: accuracy is agreement with the original's answers, whatever labels there are. "
        "Default auto: where there are none.",
        metavar="none", one_of=LABELS,
    ),
]  # fmt: skip
Task = Annotated[
    str | None,
    _option(
        MODEL, "What a network is for that is no classifier: its data, loss and metric.",
        metavar="PKG.MOD:OBJECT",
    ),
]  # fmt: skip
ImageSize = Annotated[int | None, _option(MODEL, "Resize and crop image files to this side.")]
Mean = Annotated[str | None, _option(MODEL, "Subtracted after scaling to 0..1.", metavar="R,G,B")]
Std = Annotated[str | None, _option(MODEL, "Divided by after that.", metavar="R,G,B")]
InputShape = Annotated[
    str | None, _option(MODEL, "Shape of one input, where there is no data.", metavar="C,H,W")
]
WeightsKey = Annotated[
    str | None,
    _option(MODEL, "Which weights of a checkpoint with several are shipped.", metavar="KEY"),
]
Trust = Annotated[
    bool | None, _flag(MODEL, "--trust", "Read pickles in MODEL; runs code from it.")
]

# Search.
Trials = Annotated[int | None, _option(SEARCH, "Plans to measure. Default 60.")]
TimeBudget = Annotated[
    str | None,
    _option(
        SEARCH, "The whole run takes no longer: search, training and measuring.", metavar="30m"
    ),
]  # fmt: skip
Search = Annotated[
    str | None,
    _option(SEARCH, f"{', '.join(STRATEGIES)}. Default bocr.", one_of=STRATEGIES),
]
Clusters = Annotated[int | None, _option(SEARCH, "Clusters channel groups start in. Default 3.")]
Clustering = Annotated[
    str | None,
    _option(
        SEARCH, "What makes groups alike: eu or js (importances), st (structure). Default eu.",
        one_of=CLUSTERINGS,
    ),
]  # fmt: skip
Rollback = Annotated[
    str | None,
    _option(
        SEARCH, "From clusters to single groups: direct, gradual or none. Default direct.",
        one_of=ROLLBACKS,
    ),
]  # fmt: skip
Bounds = Annotated[
    str | None,
    _option(
        SEARCH, "What the best plans bound after it: global or per-dimension. Default global.",
        one_of=BOUNDS,
    ),
]  # fmt: skip
FitToLimit = Annotated[
    str | None,
    _option(
        SEARCH, "How plans are brought to a limit on MACs: scale or wall. Default scale.",
        one_of=FITS,
    ),
]  # fmt: skip
Depth = Annotated[
    bool | None,
    _flag(SEARCH, "--depth/--no-depth", "Whether residual branches may go whole. Default yes."),
]
LeastSquares = Annotated[
    bool | None,
    _flag(
        SEARCH, "--least-squares/--no-least-squares",
        "Whether trials refit cut layers. Default yes.",
    ),
]  # fmt: skip
RecalibrationImages = Annotated[
    int | None,
    _option(SEARCH, "For the batch-norms of every trial; 0 for none. Default 256."),
]
Importance = Annotated[
    str | None,
    _option(
        SEARCH,
        f"How channels are ranked: {', '.join(IMPORTANCES)}. Default l1.",
        one_of=IMPORTANCES,
    ),
]
MinKeepRatio = Annotated[
    float | None, _option(SEARCH, "Floor of every group's width. Default 0.1.")
]
Seed = Annotated[int | None, _option(SEARCH, "Of every random draw. Default 0.")]

# Training at the end.
FineTuneEpochs = Annotated[
    int | None, _option(TRAINING, "Passes over the fit split at the end. Default 10.")
]
LearningRate = Annotated[
    float | None, _option(TRAINING, "Peak rate of fine-tuning. Default 0.02.")
]
Schedule = Annotated[
    str | None,
    _option(
        TRAINING, "How the rate goes down: cosine, linear, constant. Default cosine.",
        one_of=SCHEDULES,
    ),
]  # fmt: skip
WeightDecay = Annotated[
    float | None, _option(TRAINING, "On weights; not on norms and biases. Default 0.0005.")
]
BatchSize = Annotated[int | None, _option(TRAINING, "Images per step of fine-tuning. Default 64.")]
Finalists = Annotated[
    int | None,
    _option(TRAINING, "Plans that are trained a little before one gets the rest. Default 4."),
]
Distillation = Annotated[
    float | None,
    _option(TRAINING, "Weight of the original's answers beside the labels. Default 0.7."),
]
Hints = Annotated[
    float | None,
    _option(TRAINING, "Weight of what the original's layers read, for ours to read. Default 10."),
]
Temperature = Annotated[
    float | None, _option(TRAINING, "Of both answers in distillation. Default 4.")
]
LabelSmoothing = Annotated[
    float | None, _option(TRAINING, "Share of each label given to other classes. Default 0.")
]
Ema = Annotated[
    float | None,
    _option(TRAINING, "Decay of averaged weights, like 0.999. Default 0: none."),
]
Augment = Annotated[
    str | None,
    _option(
        TRAINING,
        "Of training images: flip, crop, jitter, erase, several, none; auto takes of the first "
        "two what the original bears.",
        metavar="flip,crop", one_of=AUGMENTATIONS,
    ),
]  # fmt: skip
Compile = Annotated[bool | None, _flag(TRAINING, "--compile", "Train with torch.compile.")]

# What comes out.
Out = Annotated[
    Path | None, _option(OUTPUT, "Empty folder for the run. Default runs/MODEL-TARGET.")
]
AsJson = Annotated[bool, _flag(OUTPUT, "--json", "Print JSON instead of a table.")]
JsonProgress = Annotated[
    bool,
    _flag(OUTPUT, "--json-progress", "Progress, trials and errors as lines of JSON on stderr."),
]


def given(flags: dict[str, Any]) -> dict[str, object]:
    """The settings that were given as flags, in the form that `load_config` takes."""
    given: dict[str, object] = {}
    for name, value in flags.items():
        if value in (None, []) or name in ("model", "as_json", "json_progress"):
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
