"""Flags and `compress.toml` -> one validated Config.

`compress.toml` beside the model, or else in the current folder, holds any flag under the flag's
own name; a flag on the command line wins. Paths in the file are relative to the file.
"""

import inspect
import os
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from compressor.errors import ConfigError, unknown_name
from compressor.files import read_toml
from compressor.goals import (
    MACS,
    MAX_DROP,
    MAX_LATENCY,
    MAX_SPEEDUP,
    PARAMS,
    SPEEDUP,
    Constraint,
)
from compressor.plugins import IMPORTANCES, LOOKING_AT_CLASSES, STRATEGIES
from compressor.printable import checked_text
from compressor.ranges import InputShape, Mean, Milliseconds, OneOf, Seconds, Std, Whole

AUTO: Literal["auto"] = "auto"
NO_LABELS: Literal["none"] = "none"
OF_LABELS = ("classes", "label_smoothing")  # settings that mean nothing without labels
CONFIG_FILE = "compress.toml"
PATH_KEYS = ("data", "classes", "out")
MODEL, TRUST = "model", "trust"
TABLES = ("arch_args", "constraint", "weight")
EXAMPLES: dict[str, object] = {  # of settings that have no default
    "target": "host-cpu", "device": "ssh://user@host", "precision": "fp16", "data": "images",
    "classes": "classes.txt",
    "task": "my_module:MyTask", "arch": "torchvision:resnet18",
    "arch_args": {"num_classes": 10}, "weights_key": "ema",
    "input_shape": [3, 224, 224], "image_size": 224, "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225], "speedup": 2.0, "max_latency": "12ms", "max_drop": 1.0,
    "constraint": {"macs": 0.5}, "weight": {"accuracy": 1.0, "time": 0.5}, "time_budget": "30m",
    "out": "runs/mine",
}  # fmt: skip
GOALS = ("speedup", "max_latency", "max_drop", "constraint", "weight", "pareto")


class Config(BaseModel):
    """Everything a run was asked for. Field names are the flags, with `_` for `-`.

    Attributes:
        model: The trained network.
        target: Name of a device profile, or the path of one.
        device: `ssh://user@host[:port]`, or a name from the user's devices.toml; None for the
            machine that compress runs on.
        estimate: Take the profile's figures where the device cannot be measured.
        precision: "fp32" or "fp16", in place of the profile's own.
        data: Images to fit, search and test with.
        classes: File with the names of the class folders, one a line, in the order of the
            network's outputs; None for the order of names.
        labels: "auto" for those that the data has; "none" uses none: accuracy is then agreement
            with the original's answers, and all that is learned is these.
        task: "package.module:object", what a network is for that is no classifier; it brings its
            own data. See `compressor.tasks.Task`.
        arch: What builds the network of a state_dict: `torchvision:NAME`, `timm:NAME`, or
            "package.module:factory".
        arch_args: Keyword arguments of the factory.
        trust: Read pickles in the model file although that runs code from it. Whoever runs
            compress says so, each time; no file may.
        weights_key: Which weights are shipped, of a checkpoint with several, such as "ema".
        input_shape: `(c, h, w)`; only needed where there is no data to take it from.
        image_size: Side in pixels that image files are resized and cropped to.
        mean: Per channel, subtracted after scaling uint8 to [0, 1].
        std: Per channel, divided by after that.
        speedup: The compressed model must be this many times faster.
        max_latency: Or it must not take longer than this, in milliseconds.
        max_drop: Points of accuracy that may be lost; then the fastest network is looked for.
        constraint: "macs" or "params" -> largest share of the original's.
        weight: "accuracy", "time", "macs" or "params" -> weight; then the largest weighted sum of
            accuracy (as a share of the original's) and savings is looked for.
        pareto: Several models are wanted, the most accurate one for every band of speed.
        trials: Plans to measure.
        time_budget: Seconds that the whole run may take: what is measured before the first trial,
            trials, training and the last measurement.
        search: Strategy; installed packages may bring more.
        clusters: Clusters that channel groups start in.
        clustering: What makes groups alike: the distance of their importances' densities
            ("eu", "js"), or their structure ("st").
        rollback: How clusters give way to single groups.
        bounds: What the best plans bound after a rollback: all groups alike, or each.
        fit_to_limit: How plans are brought to a limit on MACs or parameters.
        depth: Whether residual branches may be left out whole.
        least_squares: Whether layers that read fewer channels are refitted.
        recalibration_images: Whose batch-norm statistics every trial takes; 0 for none.
        importance: How channels are ranked; installed packages may bring more.
        min_keep_ratio: No group goes below this share of its channels.
        fine_tune_epochs: Passes over the fit split at the end.
        learning_rate: Peak rate of fine-tuning, after a tenth of the steps.
        schedule: How the rate goes down from there: to 0 along a cosine or a line, or not at all.
        weight_decay: Of fine-tuning, on weights; not on norms and biases.
        batch_size: Images per step of fine-tuning.
        finalists: Plans that are trained a little, for a fifth of all steps, before one of them
            gets the rest; fewer where that would be too little, 1 for the search's best alone.
        distillation: Weight of the original's answers beside the labels, from 0 to 1; without
            labels it is 1.
        hints: Weight of what the original's layers read, beside what the pruned ones do.
        temperature: Of both answers in distillation.
        label_smoothing: Share of every label that goes to the other classes.
        ema: Decay of the average of weights that is kept in place of the last; 0 for none.
        augment: What becomes of training images: "flip", "crop", "jitter" (contrast and
            brightness), "erase" (a blank rectangle); "auto" takes of the first two what the
            original bears.
        compile: Whether training uses torch.compile.
        seed: Decides splits, proposals and training order.
        out: Folder that the run leaves its files in; made if missing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: Path
    target: str
    device: str | None = None
    estimate: bool = False
    precision: str | None = None
    data: Path | None = None
    classes: Path | None = None
    labels: Literal["auto", "none"] = AUTO
    task: str | None = None
    arch: str | None = None
    arch_args: dict[str, Whole | float | bool | str] = Field(default_factory=dict)
    trust: bool = False
    weights_key: str | None = Field(default=None, min_length=1)
    input_shape: InputShape | None = None
    image_size: int | None = Field(default=None, ge=1, le=8192)
    mean: tuple[Mean, ...] = ()
    std: tuple[Std, ...] = ()
    speedup: float | None = Field(default=None, gt=1, le=MAX_SPEEDUP)
    max_latency: Milliseconds | None = None
    max_drop: float | None = Field(default=None, ge=0, le=100)
    constraint: dict[Literal["macs", "params"], Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=dict
    )
    weight: dict[
        Literal["accuracy", "time", "macs", "params"], Annotated[float, Field(ge=0, le=1e6)]
    ] = Field(default_factory=dict)
    pareto: bool = False
    trials: int = Field(default=60, ge=1, le=100_000)
    time_budget: Seconds | None = None
    search: Annotated[str, AfterValidator(OneOf(STRATEGIES))] = "bocr"
    clusters: int = Field(default=3, ge=1, le=100_000)
    clustering: Literal["eu", "js", "st"] = "eu"
    rollback: Literal["none", "direct", "gradual"] = "direct"
    bounds: Literal["global", "per-dimension"] = "global"
    fit_to_limit: Literal["scale", "wall"] = "scale"
    depth: bool = True
    least_squares: bool = True
    recalibration_images: int = Field(default=256, ge=0, le=10_000_000)
    importance: Annotated[str, AfterValidator(OneOf(IMPORTANCES))] = "l1"
    min_keep_ratio: float = Field(default=0.1, ge=1e-6, le=1)
    fine_tune_epochs: int = Field(default=10, ge=0, le=100_000)
    learning_rate: float = Field(default=0.02, gt=0, le=1e30)  # if too high, training stops
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(default=5e-4, ge=0, le=1)
    batch_size: int = Field(default=64, ge=2, le=65_536)
    finalists: int = Field(default=4, ge=1, le=16)
    distillation: float = Field(default=0.7, ge=0, le=1)
    hints: float = Field(default=10.0, ge=0, le=1000)
    temperature: float = Field(default=4.0, ge=0.01, le=100)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    ema: float = Field(default=0.0, ge=0, lt=1)
    augment: Literal["auto"] | tuple[Literal["flip", "crop", "jitter", "erase"], ...] = AUTO
    compile: bool = False
    seed: int = Field(default=0, ge=0, lt=2**31)
    out: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, settings: object) -> object:
        """Names and paths are written to config.toml; -0.0 is 0."""
        if not isinstance(settings, Mapping):
            return settings
        for key, value in settings.items():
            try:
                checked_text(value)
            except ValueError as err:
                raise ValueError(f"{key.replace('_', '-')}: {err}") from err
        return {k: v + 0.0 if isinstance(v, float) else v for k, v in settings.items()}

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.speedup is not None and self.max_latency is not None:
            raise ValueError("give either speedup or max-latency, not both")
        if self.weight and (self.constraints or not any(self.weight.values())):
            raise ValueError("give weights, not all 0, or limits, not both")
        if self.pareto and (self.constraints or self.weight):
            raise ValueError("give either pareto (models of every speed) or a limit, not both")
        if self.task is not None:
            self._check_task()
        of_labels = [k.replace("_", "-") for k in OF_LABELS if getattr(self, k)]
        if self.labels == NO_LABELS and of_labels:
            raise ValueError(f"without labels, leave {' and '.join(of_labels)} away")
        if self.estimate and self.device is not None:
            raise ValueError("give either device (to measure) or estimate, not both")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}")
        return self

    def _check_task(self) -> None:
        """Raises `ValueError` where a setting is for classes or images of ours."""
        ours = ("data", "image_size", "mean", "std", "label_smoothing")
        given = [name.replace("_", "-") for name in ours if getattr(self, name)]
        given += [k for k in ("augment", "labels") if getattr(self, k) not in (AUTO, ())]
        if given:
            raise ValueError(f"a task brings its own data; leave {', '.join(given)} away")
        if self.search in LOOKING_AT_CLASSES:
            raise ValueError(f"--search {self.search} looks at classes; a task has none")

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Every limit that was given."""
        given = (
            (SPEEDUP, self.speedup), (MAX_LATENCY, self.max_latency), (MAX_DROP, self.max_drop),
            (MACS, self.constraint.get("macs")), (PARAMS, self.constraint.get("params")),
        )  # fmt: skip
        return tuple(Constraint(kind, value) for kind, value in given if value is not None)

    def check_goal(self) -> None:
        """Whether it says all that a run needs to know.

        Raises:
            ConfigError: Nothing says what is wanted, or what plans are ranked by.
        """
        if not self.constraints and not self.weight and not self.pareto:
            raise ConfigError(
                "How fast must it be? Give --speedup 2 or --max-latency 12ms; or --max-drop 1.0 "
                "for the fastest network that loses no more, --constraint macs=0.5, or --pareto."
            )
        if self.data is None and self.task is None:
            raise ConfigError(
                "No images to rank plans by; give --data FILE.npz, --data FOLDER, or --task."
            )

    def as_toml(self) -> dict[str, object]:
        """Every setting but trust that is not None, under its flag's name, for `config.toml`."""
        settings = self.model_dump(mode="json", exclude_none=True, exclude={TRUST})
        for key in ("model", *PATH_KEYS):  # the run may go on from another folder
            if key in settings:
                settings[key] = str(Path(settings[key]).resolve())
        return {key.replace("_", "-"): value for key, value in settings.items()}


def load_config(model: Path, flags: Mapping[str, object]) -> Config:
    """`compress.toml` where there is one, overridden by `flags`.

    Args:
        model: The model file; `compress.toml` is looked for beside it first.
        flags: Field name -> value, only of the flags that were given.

    Raises:
        ConfigError: An unknown key, a value out of range, or contradicting constraints.
    """
    settings: dict[str, object] = {}
    found = [
        p for p in (model.parent / CONFIG_FILE, Path(CONFIG_FILE)) if os.path.lexists(p)
    ]  # (which is False too for names that no file can have)
    if found:
        settings = _read(found[0])
    if set(GOALS) & flags.keys():  # a goal on the command line replaces the file's
        for goal in GOALS:
            settings.pop(goal, None)
    settings |= dict(flags)
    settings["model"] = model
    return make_config(settings, found[0] if found else None)


def make_config(settings: Mapping[str, object], read_from: Path | None = None) -> Config:
    """The settings, checked.

    Args:
        settings: Field name -> value.
        read_from: The file that some of them come from, for messages.

    Raises:
        ConfigError: An unknown key, a value out of range, or contradicting constraints.
    """
    known = sorted(Config.model_fields)
    for key in settings:
        if key not in known:
            names = [name.replace("_", "-") for name in known]
            where = f"key in {read_from}" if read_from else "setting"
            raise ConfigError(unknown_name(where, key.replace("_", "-"), names))
    if "target" not in settings:
        raise ConfigError("For which device? Give --target host-cpu; `compress targets` has all.")
    try:
        return Config.model_validate(settings)
    except ValidationError as err:
        faults = "; ".join(_fault(dict(fault)) for fault in err.errors())
        where = f" (flags and {read_from})" if read_from else ""
        raise ConfigError(f"{faults}{where}.") from err


def commented_toml() -> str:
    """A `compress.toml` in which every setting stands with its meaning and default, commented out.

    What has no default shows an example of what it takes. Meanings are those of the docstring,
    which `python -OO` leaves out.
    """
    meanings = _meanings(inspect.getdoc(Config) or "")
    lines = ["# Any flag of `compress` may stand here under its own name; a flag on the command",
             "# line wins. Paths are relative to this file."]  # fmt: skip
    for name, field in Config.model_fields.items():
        if name not in (MODEL, TRUST, *TABLES):
            choices = _choices(field)
            one_of = f" One of {', '.join(choices)}." if choices else ""
            lines += _commented(
                name, EXAMPLES.get(name, field.default), f"{meanings.get(name, '')}{one_of}"
            )
    for name in TABLES:  # a table ends the settings above it
        lines += _commented(name, EXAMPLES[name], meanings.get(name, ""))
    return "\n".join([*lines, ""])


def _choices(field: FieldInfo) -> tuple[str, ...]:
    """The names that a setting takes; none where it takes others."""
    validators = (m.func for m in field.metadata if isinstance(m, AfterValidator))
    for one_of in validators:
        if isinstance(one_of, OneOf):
            return tuple(one_of.registry)
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def _commented(name: str, value: object, meaning: str) -> list[str]:
    written = tomli_w.dumps({name.replace("_", "-"): value}).strip()
    text = re.sub(r"\[\n\s+(.*?),\n\]", r"[\1]", written.replace(",\n    ", ", "))  # one line
    wrapped = textwrap.wrap(f"{meaning[:1].upper()}{meaning[1:]}", 86)
    return ["", *(f"# {line}" for line in [*wrapped, *text.splitlines()])]


def _meanings(docstring: str) -> dict[str, str]:
    """Attribute -> what the docstring says of it."""
    _, _, attributes = docstring.partition("Attributes:\n")
    found = re.findall(r"^    (\w+): ((?:.+\n?)(?:^        .+\n?)*)", attributes, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _read(path: Path) -> dict[str, object]:
    try:
        content = read_toml(path)
    except (ValueError, OSError) as err:
        raise ConfigError(f"{path} cannot be read: {err}.") from err
    settings: dict[str, object] = {key.replace("-", "_"): v for key, v in content.items()}
    if TRUST in settings:
        raise ConfigError(f"{path}: a file cannot ask to be trusted; give --trust by hand.")
    for key in PATH_KEYS:
        value = settings.get(key)
        if isinstance(value, str):
            settings[key] = path.parent / value
    target = settings.get("target")
    if isinstance(target, str) and target.endswith(".toml"):
        settings["target"] = str(path.parent / target)
    return settings


def _fault(fault: dict[str, object]) -> str:
    location = fault["loc"]
    assert isinstance(location, tuple)
    message = str(fault["msg"]).removeprefix("Value error, ")
    if not location:
        return message
    flag = str(location[0]).replace("_", "-")
    if fault["type"] in ("literal_error", "not_known"):
        ctx = fault["ctx"]
        assert isinstance(ctx, dict)
        names = ctx.get("known") or re.findall(r"'([^']+)'", str(ctx["expected"]))
        return unknown_name(f"--{flag}", str(fault["input"]), names).removesuffix(".")
    return f"--{flag}: {message} (got {_shown(fault['input'])})"


def _shown(value: object) -> str:
    try:
        return f"{value!r:.120}"
    except ValueError:  # Python writes no number of so many digits
        return "a number of thousands of digits"
