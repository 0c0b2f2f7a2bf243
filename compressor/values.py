"""The values that travel between the steps. All frozen; none of them does any work.

Legend: `n` images, `c` channels, `h`, `w` pixels. Times are in milliseconds, ratios are
original / candidate for speed (larger is faster) and kept / original for widths.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NotRequired, Protocol, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import TypedDict

from compressor.containers import map_tensors, tensors_in
from compressor.goals import Constraint

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)  # of any dimension, synchronised, lazy
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)

NO_LABEL = -1  # of an image whose class nobody has told

IndexArray = npt.NDArray[np.int64]
# (tensor, dimension) -> which positions of the original's tensor are left, of all that lose some.
Kept = Mapping[tuple[str, int], npt.NDArray[np.bool_]]

# What code that is not ours may raise while it runs.
FORWARD_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError,
    NotImplementedError, OSError, RuntimeError, StopIteration, TypeError, ValueError,
)  # fmt: skip

# One input, or the positional arguments, or the keyword arguments of a model's forward.
Example = Tensor | tuple[Any, ...] | dict[str, Any]


def call(model: Callable[..., Any], example: Example) -> Any:
    """What `model` returns for `example`."""
    if isinstance(model, fx.GraphModule):  # whose own call prints a traceback of what fails
        model = partial(nn.Module.__call__, model)
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


class Basis(StrEnum):
    """Where a latency comes from; the two are never mixed in one ranking."""

    MEASURED = "measured"
    ESTIMATE = "estimate"


class Verdict(StrEnum):
    """How a run ended."""

    MET = "met"
    INFEASIBLE = "infeasible"
    NOT_FASTER = "not-faster"


class Role(StrEnum):
    """What a tensor does with the channels of a group."""

    PRODUCER = "producer"  # a filter a channel: dimension 0 of a convolution or linear weight
    PER_CHANNEL = "per-channel"  # one value a channel: a bias, a norm, a depthwise filter
    CONSUMER = "consumer"  # reads the channels: dimension 1 of a convolution or linear weight


def example_shapes(example: Example) -> str:
    """The shapes and kinds of every tensor in `example`, for messages."""
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in tensors_in(example))


@dataclass(frozen=True, eq=False)
class ChannelSlice:
    """Where the channels of one group lie in one tensor of the model.

    Attributes:
        module: Dotted name of the module that owns the tensor.
        tensor: Name of the parameter or buffer in that module.
        dim: Dimension of the tensor that runs over channels.
        role: What the tensor does with the channels.
        index: `(n_channels, n_inner)`; row `i` lists the positions along `dim` that belong to
            channel `i` (more than one behind a flatten, or where channels go in units).
        params: Numbers of the tensor that belong to one channel; 0 for buffers.
        macs: Multiply-accumulates of one example that these numbers take part in.
    """

    module: str
    tensor: str
    dim: int
    role: Role
    index: IndexArray
    params: int = 0
    macs: int = 0

    @property
    def key(self) -> str:
        """The tensor's name in the state_dict."""
        return f"{self.module}.{self.tensor}" if self.module else self.tensor


@dataclass(frozen=True, eq=False)
class Reading:
    """Where one operation of a forward pass reads the channels of a group.

    Attributes:
        operation: "aten::convolution" and the like.
        call: Its number among the operations of that name in the pass, from 0.
        argument: Position of the tensor among the operation's arguments.
        dim: Dimension of that tensor that runs over channels.
        index: `(n_channels, n_inner)`, positions along `dim`; -1 where a channel has fewer.
    """

    operation: str
    call: int
    argument: int
    dim: int
    index: IndexArray


@dataclass(frozen=True, eq=False)
class NodeSlice:
    """Where the channels of a group lie in the output of a node of an fx graph.

    Attributes:
        node: The node's name.
        dim: Dimension of its output that runs over channels.
        size: Of that dimension.
        index: `(n_channels, n_inner)`, positions along `dim`; -1 where a channel has fewer.
    """

    node: str
    dim: int
    size: int
    index: IndexArray


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of several tensors that can only be removed together.

    Attributes:
        name: The first module that produces the channels; a part of its channels that goes
            elsewhere than the first part is `NAME#2`, and so on. Whole heads of attention are
            `NAME#heads`; they cross the channels that go from every head.
        n_channels: Channels before pruning. Where several positions of the producer can only go
            together (grouped convolutions, shuffles, group norms), such a unit is one channel.
        slices: Every place in the model's tensors where these channels lie.
        locked_because: In words, why no channel may be removed; None where any may.
        readings: Every operation that reads the channels and writes others.
        nodes: Where the channels lie in an fx graph; empty for other modules.
    """

    name: str
    n_channels: int
    slices: tuple[ChannelSlice, ...]
    locked_because: str | None = None
    readings: tuple[Reading, ...] = ()
    nodes: tuple[NodeSlice, ...] = ()

    def modules(self, role: Role) -> tuple[str, ...]:
        """Names of the modules that play `role`, each once, in graph order."""
        return tuple(dict.fromkeys(s.module for s in self.slices if s.role is role))

    @property
    def unit(self) -> int:
        """Positions of the producer that one channel stands for; 1 in most networks."""
        widths = (s.index.shape[1] for s in self.slices if s.role is Role.PRODUCER)
        return int(next(widths, 1))

    @property
    def cost(self) -> "Cost":
        """Multiply-accumulates and parameters that go if the whole group went."""
        return Cost(
            macs=self.n_channels * sum(s.macs for s in self.slices),
            params=self.n_channels * sum(s.params for s in self.slices),
        )


@dataclass(frozen=True)
class Branch:
    """One term of a residual sum, which can be left out whole: what is left is the shortcut.

    Attributes:
        name: The module that holds all of it, as far as one does.
        node: The sum, a node of the network's fx graph.
        argument: Which argument of the sum the branch is, 0 or 1.
        own_nodes: Nodes that only the branch needs, in graph order.
        modules: Modules that only the branch needs.
        groups: Names of the channel groups that go with it.
        macs: Multiply-accumulates of one example that go with it.
        operation: The sum as ATen knows it, "aten::add" and the like.
        call: Its number among the operations of that name in a pass, from 0.
    """

    name: str
    node: str
    argument: int
    own_nodes: tuple[str, ...] = field(repr=False)
    modules: tuple[str, ...] = field(repr=False)
    groups: tuple[str, ...]
    macs: int
    operation: str = field(repr=False)
    call: int = field(repr=False)


@dataclass(frozen=True)
class Plan:
    """Which channels and which residual branches stay.

    Attributes:
        kept: Group name -> indices of the kept channels, ascending; a group that is not named
            keeps all its channels.
        dropped: Names of the branches that are left out.
    """

    kept: Mapping[str, tuple[int, ...]]
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", MappingProxyType(dict(self.kept)))

    def width(self, group: ChannelGroup) -> int:
        """Number of channels that `group` keeps."""
        kept = self.kept.get(group.name)
        return group.n_channels if kept is None else len(kept)


@dataclass(frozen=True)
class Cost:
    """What a model costs on paper, for one example.

    Attributes:
        macs: Multiply-accumulates of convolutions and linear layers.
        params: Numbers in its parameters.
    """

    macs: int
    params: int


@dataclass(frozen=True, eq=False)
class GroupFeatures:
    """What the channels of a group answer to real images.

    Attributes:
        maps: `(n_channels, h, w)` mean over images of what the producer writes, before any norm.
        fisher: `(n_channels,)` variance of the pooled maps between classes / within them.
        n_distinct: For growing strengths, how many channels are left where alike maps count once.
    """

    maps: npt.NDArray[np.float64]
    fisher: npt.NDArray[np.float64]
    n_distinct: tuple[int, ...]


@dataclass(frozen=True)
class LayerCost:
    """One parameter tensor, and how its cost follows the widths of groups.

    Attributes:
        name: In the state_dict.
        macs: Multiply-accumulates of one example that it takes part in; 0 for biases and norms.
        params: Its numbers.
        shape: Of the tensor.
        shares: For each of its dimensions that channels run along: group name -> share of that
            dimension. What is missing to 1 stays whatever is pruned. Groups that cross (heads,
            and channels of all heads) stand in two mappings, whose shares multiply.
        dims: The dimension of each of `shares`; empty where they are in order, one each.
    """

    name: str
    macs: int
    params: int
    shape: tuple[int, ...]
    shares: tuple[Mapping[str, float], ...]
    dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers in [0, 1], with the standard error of `n` yes-no answers.

    Without labels, those are right that the original gives.
    Of a task that is no classification: the share of the original's metric that is kept, which
    is 1 for the original and may exceed 1.

    Attributes:
        value: The share.
        n: Images.
        loss: Mean cross-entropy on the same images in nats, where it is known; of two networks
            it tells the better one from fewer images than `value` does.
        metric: The task's own figure; None for classification, where it is `value`.
        spread: Standard error of `value` where it is not that of yes-no answers.
        name: What `value` is called: "accuracy", "agreement", or "mAP kept" of a task's metric.
    """

    value: float
    n: int
    loss: float | None = None
    metric: float | None = None
    spread: float | None = None
    name: str = "accuracy"

    @property
    def standard_error(self) -> float:
        """Binomial; never 0, because `n` right answers of `n` do not prove the next one."""
        if self.spread is not None:
            return self.spread
        p = (self.value * self.n + 1) / (self.n + 2)  # Laplace's rule of succession
        return float(np.sqrt(p * (1 - p) / self.n))


@dataclass(frozen=True)
class Latency:
    """One model's time for one inference."""

    median_ms: float
    p90_ms: float
    n: int


MAX_UNSURE = 0.03  # of a ratio, that its interval may reach to either side; beyond is doubtful


class Clock(StrEnum):
    """What times are taken by."""

    WALL = "wall"  # of a GPU, its own
    THREAD_CPU = "thread-cpu"  # the time that the one thread at work had a core


@dataclass(frozen=True)
class SessionPair:
    """Raw times of one pair of sessions.

    Attributes:
        original_ms: Milliseconds, in the order taken.
        candidate_ms: Milliseconds, in the order taken.
        interleaved: Run `i` of both was taken in the same round, so that their ratio counts;
            False where each session ran by itself, as trtexec's do.
        original_cpu_ms: CPU time of the thread in every run; empty where there is no such clock.
        candidate_cpu_ms: CPU time of the thread in every run, of the candidate.
        original_interruptions: How often other work took the core in every run; empty where
            nobody counts.
        candidate_interruptions: How often that was in every run of the candidate.
    """

    original_ms: tuple[float, ...]
    candidate_ms: tuple[float, ...]
    interleaved: bool = True
    original_cpu_ms: tuple[float, ...] = ()
    candidate_cpu_ms: tuple[float, ...] = ()
    original_interruptions: tuple[int, ...] = ()
    candidate_interruptions: tuple[int, ...] = ()

    def by(self, clock: Clock) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(original, candidate) in milliseconds by that clock."""
        if clock is Clock.THREAD_CPU:
            return self.original_cpu_ms, self.candidate_cpu_ms
        return self.original_ms, self.candidate_ms


@dataclass(frozen=True)
class PairedLatency:
    """Original and candidate measured in the same rounds.

    Attributes:
        ratio: original / candidate; above 1 the candidate is faster.
        ci95: Interval of `ratio` that holds it with 95 % confidence; of an estimate, the ratio
            divided and multiplied by the estimate's error factor.
        original: The original's times in these rounds.
        candidate: The candidate's times in these rounds.
        session_pairs: Every time taken, so that any statistic can be recomputed.
        conditions: What makes the figures doubtful, each in words with a remedy; empty where
            nothing does.
        basis: Whether anything was measured.
        clock: That ratio and times were taken by.
        interrupted: Share of the runs, in [0, 1], in which other work took the core; None where
            nobody counts.
    """

    ratio: float
    ci95: tuple[float, float]
    original: Latency
    candidate: Latency
    session_pairs: tuple[SessionPair, ...] = field(repr=False)
    conditions: tuple[str, ...] = ()
    basis: Basis = Basis.MEASURED
    clock: Clock = Clock.WALL
    interrupted: float | None = None

    @property
    def ranking_ci95(self) -> tuple[float, float]:
        """The interval among plans of one search: an estimate's error is the same for all."""
        return self.ci95 if self.basis is Basis.MEASURED else (self.ratio, self.ratio)

    @property
    def half_width(self) -> float:
        """How far the interval reaches from the ratio, as a share of it; 0 of an estimate."""
        low, high = self.ranking_ci95
        return max(high / self.ratio, self.ratio / low) - 1

    @property
    def reached(self) -> float:
        """The ratio that noise alone does not reach: where that is unsure, the interval's end."""
        return self.ratio if self.half_width <= MAX_UNSURE else self.ranking_ci95[0]

    @property
    def is_valid(self) -> bool:
        """Whether no condition of a sound measurement failed."""
        return not self.conditions


@dataclass(frozen=True)
class Original:
    """What was measured of the original before anything was searched.

    Attributes:
        noise_floor: The original against itself; what differs from 1 in it is noise.
        accuracy: On the search split.
        seconds: Part of a trial -> what it took of the original.
    """

    noise_floor: PairedLatency
    accuracy: "Accuracy"
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Figure:
    """One number about a device, and why anyone should believe it.

    Attributes:
        value: In the unit that the place it stands in names.
        basis: "datasheet", "computed" (units x clock), "measured", or "unverified".
        source: Where it was found, or what it was computed from.
    """

    value: float
    basis: str
    source: str


@dataclass(frozen=True)
class Roofline:
    """What a device can do at most; latency is estimated from it where nothing can be measured.

    Attributes:
        ops_per_s: Of the target's precision; a multiply-accumulate is two operations.
        bytes_per_s: Of its main memory.
        bytes_per_number: Of one weight or activation.
    """

    ops_per_s: Figure
    bytes_per_s: Figure
    bytes_per_number: int


@dataclass(frozen=True)
class Target:
    """A device profile, its runtime, a way to reach the device, and what is known of it.

    Attributes:
        name: Name of the profile.
        description: One line for people.
        runtime: What measures and serves: "onnxruntime", "tensorrt" (its Python API) or
            "trtexec".
        provider: Execution provider of ONNX Runtime; "" for other runtimes.
        n_threads: Threads of one inference on a CPU.
        precision: "fp32" or "fp16".
        step: Channel granularity that runs fast on the device.
        step_source: Why it is that step, in words.
        opset: ONNX opset that is exported where it has all operations.
        max_opset: Newest ONNX opset that the device's runtime reads.
        max_ir: Newest ONNX IR version that the device's runtime reads.
        device: "ssh://user@host:port"; None for the machine that runs compress.
        basis: `ESTIMATE` where the user asked for an estimate in place of the device.
        machines: `uname -m` of the device; empty where any will do.
        models: One of these is part of what the device calls itself; empty where any will do.
        instruction_sets: Widest vector instructions of its CPU; empty where any will do.
        trtexec: Where the program may lie on the device.
        workspace_mib: What TensorRT may use while it builds.
        memory_mib: What a runtime may use at most; None for all there is.
        build_limit_s: Longest build of one engine.
        run_limit_s: Longest measuring of one pair of sessions.
        roofline: None where the profile has no figures.
        power_advice: What to run on the device before measuring.
        sources: Where the profile's figures come from.
    """

    name: str
    description: str
    runtime: str
    provider: str
    n_threads: int
    precision: str
    step: int
    step_source: str
    opset: int
    max_opset: int
    max_ir: int
    device: str | None = None
    basis: Basis = Basis.MEASURED
    machines: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    instruction_sets: tuple[str, ...] = ()
    trtexec: tuple[str, ...] = ()
    workspace_mib: int = 512
    memory_mib: int | None = None
    build_limit_s: float = 900.0
    run_limit_s: float = 120.0
    roofline: Roofline | None = None
    power_advice: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Staircase:
    """What widths cost on a device.

    Attributes:
        step: Widths that are no multiple of it gain nothing over the next one that is.
        kinds: Kind of layer -> its own step.
        costs: Kind of layer -> width -> time, as a share of that of the widest.
    """

    step: int
    kinds: Mapping[str, int]
    costs: Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Explained:
    """Where a network's time goes on a target, and how far it could fall.

    Attributes:
        target: The target.
        layers: Beside them the narrowest network that a search could try.
        freedom: Layer -> the channel group that it writes, or why that is locked.
        at_most: The narrowest network against the original; its accuracy is beside the point.
        n_free: Groups that can be pruned, of all.
        n_groups: All groups.
        n_branches: Residual branches that can be left out.
    """

    target: Target
    layers: Sequence["LayerRow"]
    freedom: Mapping[str, str]
    at_most: "PairedLatency"
    n_free: int
    n_groups: int
    n_branches: int


@dataclass(frozen=True)
class Trial:
    """One plan and what was measured of it; a failed trial is a trial too.

    Attributes:
        number: Position in the study, from 0.
        widths: Group name -> channels kept, for every group that is not locked.
        phase: The part of the search that proposed it.
        accuracy: On the search split; None where the trial failed.
        speedup: original / candidate; None where the trial failed.
        speedup_ci95: Its interval; None where the trial failed.
        latency_ms: The candidate's median; None where the trial failed.
        seconds: Part of the trial -> seconds it took.
        failed_because: None, or why there is no measurement.
    """

    number: int
    widths: Mapping[str, int]
    phase: str
    accuracy: Accuracy | None = None
    speedup: float | None = None
    speedup_ci95: tuple[float, float] | None = None
    latency_ms: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    failed_because: str | None = None


@dataclass(frozen=True)
class Progress:
    """How far a long piece of work has come.

    Attributes:
        phase: What is being done, in words; a new phase starts a new bar.
        n_done: Units finished.
        n_total: Units in all.
        note: The latest figure worth showing.
        best: Of a search, the best trial so far.
        expected: Phase to come -> seconds it may take; told once, before anything long is begun.
    """

    phase: str
    n_done: int
    n_total: int
    note: str = ""
    best: Trial | None = None
    expected: Mapping[str, float] = field(default_factory=dict)


# Phases of a run that take long enough to be forecast, in the order they come in.
READING = "Reading model and data"
MEASURING_ORIGINAL = "Measuring the original"
TIMING_LAYERS = "Timing the layers"
TRYING_EACH = "Trying every group and branch"
FIRST_PLAN = "Finding a first plan"
GATHERING = "Gathering what layers read"  # for least squares, before the first repair
SEARCHING = "Searching"
MEASURING_FINALISTS = "Measuring finalists"
TRAINING_FINALISTS = "Training finalists"
TRAINING_FRONT = "Training along the front"
PRUNING = "Pruning with NNI and checking"
FINE_TUNING = "Fine-tuning"
MEASURING_FILES = "Measuring the exported files"


class ProgressCallback(Protocol):
    """Called as work goes on; must return quickly."""

    def __call__(self, progress: Progress, /) -> None:
        """Draw or log `progress`."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A trained network, ready to be read.

    Attributes:
        module: In eval mode, on the CPU.
        example_input: `(1, c, h, w)`, what the module is traced with; a tuple or a dict where
            a program takes several inputs.
        provenance: How the module came to be: arch, arch_args, file, sha256.
    """

    module: nn.Module
    example_input: Example
    provenance: Mapping[str, object]


SPLITS = ("fit", "search", "test")


class Images(Protocol):
    """Images in memory (a tensor is this), or on disk."""

    @property
    def shape(self) -> torch.Size:
        """`(n, c, h, w)`."""

    @property
    def dtype(self) -> torch.dtype:
        """uint8 as stored, or another as the model takes them."""

    def __getitem__(self, rows: Tensor | slice, /) -> Tensor:
        """`(n_rows, c, h, w)`."""


class Split(Protocol):
    """Inputs of one purpose, images for the most part, and what is to be answered to them.

    An input is whatever a network takes: one tensor of any shape, or several.
    """

    def __len__(self) -> int:
        """Inputs."""

    def batch(self, rows: Tensor | slice, /) -> tuple[Example, Any]:
        """Inputs as the model takes them, tensors of `(n_rows, ...)`, and their targets."""

    def model_input(self, rows: Tensor | slice, /) -> Example:
        """The inputs alone."""


def draw(split: Split, n: int) -> Tensor:
    """At most `n` rows at random, always the same: splits are often sorted by class."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    return order[:n]


@dataclass(frozen=True, eq=False)
class Part:
    """Some inputs of a split.

    Attributes:
        whole: The split.
        rows: `(n,)` int64, which of them.
    """

    whole: Split
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Tensor | slice) -> tuple[Example, Any]:
        """Inputs as the model takes them, and their targets."""
        return self.whole.batch(self.rows[rows])

    def model_input(self, rows: Tensor | slice) -> Example:
        """The inputs alone."""
        return self.whole.model_input(self.rows[rows])


def few(split: Split, n: int) -> Split:
    """At most `n` inputs of the split at random, always the same ones."""
    return Part(split, draw(split, n))


def batches(split: Split, batch_size: int) -> Iterator[tuple[Example, Any]]:
    """Inputs as the model takes them and their targets, in stored order."""
    for start in range(0, len(split), batch_size):
        yield split.batch(slice(start, min(start + batch_size, len(split))))


def full_batches(split: Split, batch_size: int) -> Iterator[tuple[Example, Any, int]]:
    """Inputs as the model takes them, their targets, and how many of them count.

    Every batch has `batch_size` of them, which files with a static shape need: the last one is
    filled up with others.
    """
    for start in range(0, len(split), batch_size):
        n_new = min(batch_size, len(split) - start)
        rows = torch.arange(start, start + batch_size) % len(split)
        yield *split.batch(rows if n_new < batch_size else slice(start, start + n_new)), n_new


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """A split whose targets are classes, or nothing.

    Attributes:
        images: `(n, c, h, w)`, or of other dimensions; uint8 as stored, or of another kind as the
            model takes them.
        labels: `(n,)` int64; all of them `NO_LABEL` where there are none.
        mean: Per channel, subtracted after scaling uint8 to [0, 1].
        std: Per channel, divided by after that.
    """

    images: Images
    labels: Tensor
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images as the model takes them, and their labels."""
        return self.model_input(rows), self.labels[rows]

    def model_input(self, rows: Tensor | slice) -> Tensor:
        """`(n_rows, c, h, w)` as the model takes them; what was uint8 is float32."""
        images = _taken(self.images, rows)
        if self.mean:
            shape = (1, -1, *[1] * (images.ndim - 2))
            images = (images - torch.tensor(self.mean).view(shape)) / torch.tensor(self.std).view(
                shape
            )
        return images


@dataclass(frozen=True, eq=False)
class LabelledInputs:
    """A split whose targets are classes, of a network that takes several inputs.

    Attributes:
        images: `(n, ...)` each, by position or by the names of the forward pass's arguments.
        labels: `(n,)` int64.
    """

    images: tuple[Tensor, ...] | dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor | slice) -> tuple[Example, Tensor]:
        """Inputs as the model takes them, and their labels."""
        return self.model_input(rows), self.labels[rows]

    def model_input(self, rows: Tensor | slice) -> Example:
        """`(n_rows, ...)` each, as the model takes them; what was uint8 is float32."""
        given: Example = map_tensors(lambda each: _taken(each, rows), self.images)
        return given


def _taken(stored: Images, rows: Tensor | slice) -> Tensor:
    """Rows of what is stored, scaled to [0, 1] where that is bytes."""
    images = stored[rows]
    if isinstance(rows, slice):
        images = images.clone()  # a network may write into what it is given
    return images.float() / 255 if images.dtype == torch.uint8 else images


@dataclass(frozen=True, eq=False)
class Data:
    """Three splits that share no image, but for the few duplicates of real data.

    Attributes:
        fit: What the network may learn from.
        search: What plans are ranked by.
        test: Looked at once, at the end, with the exported files.
        class_names: Name of each label; empty where there are none, as in a task's data.
        fingerprint: SHA-256 of all images and labels; of a task's, of some samples.
        is_trainable: False where no fit split was given. Then `fit` is the search split: its
            images repair a pruned network, but nothing is learned from their targets.
    """

    fit: Split
    search: Split
    test: Split
    class_names: tuple[str, ...]
    fingerprint: str
    is_trainable: bool = True


@dataclass(frozen=True)
class Side:
    """One of the two models of a result.

    Attributes:
        accuracy: On the test split; see `Accuracy`.
        latency_ms: On the target.
        macs: Multiply-accumulates of one inference.
        params: Parameters.
        file_bytes: Of the ONNX file.
        metric: The task's own figure on the test split; None for classification.
    """

    accuracy: float
    latency_ms: Latency
    macs: int
    params: int
    file_bytes: int
    metric: float | None = None


@dataclass(frozen=True)
class Replayed:
    """A search that was made again from the measurements that were kept.

    Attributes:
        n_trials: That were kept.
        differs_at: Number of the first trial that another plan was proposed for; None where all
            are the same.
        shipped: Number of the trial whose plan was shipped; None where the run has no result.
    """

    n_trials: int
    differs_at: int | None
    shipped: int | None


@dataclass(frozen=True)
class KernelTime:
    """What one node of a graph takes, as a runtime runs it.

    Attributes:
        name: Of the tensor or node that it makes.
        kind: The runtime's name of the operation.
        ms: Median.
    """

    name: str
    kind: str
    ms: float


class LayerRow(TypedDict):
    """A layer before and after; what is gone has no time after it.

    MACs are those of the ONNX graph: what lies between two layers has none.
    """

    name: str
    kind: str
    original_ms: float
    compressed_ms: float | None
    original_macs: int
    compressed_macs: int


class Equivalence(TypedDict):
    """Which engines answered alike: name -> largest error, or why it could not be asked."""

    engines: dict[str, float | str]
    n_inputs: int
    max_abs_error: float


class Interval(TypedDict):
    """A speed-up and its 95 % interval."""

    ratio: float
    ci95: tuple[float, float]


class Tree(TypedDict):
    """Which groups are alike, as `scipy.cluster.hierarchy.linkage` writes it."""

    names: list[str]
    linkage: list[tuple[float, float, float, float]]


class SearchCost(TypedDict):
    """How a plan was found, and what a trial cost."""

    strategy: str
    n_trials: int
    n_failed: int
    seconds: float
    seed: int
    overhead_seconds_per_trial: float
    task: NotRequired[str]
    limits: NotRequired[dict[str, float]]
    front: NotRequired[bool]
    n_timed_before: NotRequired[int]
    noise_floor: NotRequired[Interval]
    seconds_per_trial: NotRequired[dict[str, float]]
    tree: NotRequired[Tree]
    n_corrections: NotRequired[int]
    cut_short: NotRequired[list[str]]


class GroupRow(TypedDict):
    """What became of a channel group; one that went with its branch keeps 0."""

    name: str
    channels: int
    kept: int
    locked_because: str | None
    unit: NotRequired[int]


class BranchRow(TypedDict):
    """What became of a residual branch."""

    name: str
    kept: bool
    macs: int


@final
class Trained(TypedDict):
    """Steps, what was learned from, and how the finalists did."""

    steps: int
    batch_size: int
    finalists: list[list[float]]
    distillation: float
    hints: NotRequired[float]
    augmentations: list[str]
    search_accuracy: float
    search_accuracy_before: float
    stopped_because: str | None


@final
class Untrained(TypedDict):
    """Why nothing was trained although it was to be."""

    skipped_because: str


@dataclass(frozen=True)
class Result:
    """What a run found, and how sure it is; `result.json` is this, written down.

    Attributes:
        constraint: What was asked for first; None where a weighted sum was.
        compressed: None where nothing was measured to be faster, so nothing is handed back.
        accuracy_drop_points: Percentage points on the test split; None with `compressed`.
        equivalence: Which engines were compared.
        search: How the plan was found.
        groups: Every channel group.
        environment: Versions, machine, and hashes of model and data.
        out: The run folder.
        constraints: All that was asked for.
        branches: Every residual branch that could be left out.
        training: None where none was asked for.
        layers: What each layer took; empty where the runtime does not tell.
    """

    verdict: Verdict
    target: str
    runtime: str
    basis: Basis
    constraint: Constraint | None
    original: Side
    compressed: Side | None
    speedup: PairedLatency
    accuracy_drop_points: float | None
    equivalence: Equivalence
    search: SearchCost
    groups: Sequence[GroupRow]
    environment: Mapping[str, object]
    out: Path
    constraints: Sequence[Constraint] = ()
    branches: Sequence[BranchRow] = ()
    training: Trained | Untrained | None = None
    layers: Sequence[LayerRow] = field(default_factory=list)
