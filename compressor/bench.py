"""Where plans are tried out: accuracy after repair, and latency beside the original.

The measuring half of the pipeline: surgery, recovery, export, evaluation and latency meet here.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from compressor.containers import answers_in, map_tensors
from compressor.errors import MeasurementError
from compressor.evaluate import (
    Predict,
    accuracy,
    check_agree,
    check_alike,
    judgements,
    memory_format,
    posed,
)
from compressor.export import candidate_writer
from compressor.graph import outputs
from compressor.graph.costs import ran
from compressor.latency.device import Device, patiently
from compressor.latency.layers import layer_rows, profiled
from compressor.latency.machine import Model
from compressor.latency.onnxruntime import predictor
from compressor.latency.timing import FINAL, FINALIST, TRIAL, Effort
from compressor.least_squares import LeastSquares, gather
from compressor.prunable import Prunable
from compressor.recovery import Recovery, recalibrate_batch_norm
from compressor.rows import BATCH_SIZE, arranged, images_at_once, repeated
from compressor.running import is_norm
from compressor.search.objective import TimedPlan
from compressor.search.space import SearchSpace, Widths, design
from compressor.tasks import CLASSIFICATION, Criterion
from compressor.threads import settling
from compressor.values import (
    GATHERING,
    MEASURING_ORIGINAL,
    TIMING_LAYERS,
    Accuracy,
    Data,
    Example,
    LayerRow,
    Original,
    PairedLatency,
    Plan,
    Progress,
    ProgressCallback,
    Target,
    call,
    draw,
)

N_COMPARED = 8  # real images, for which the original and its file answer alike
N_PROOF_IMAGES = 32  # real images that engines must agree on
N_REPAIR_IMAGES, LEAST_REPAIR_IMAGES = 1000, 100  # whose patches least squares looks at
N_HARM_IMAGES = 128  # of the search split
DESIGN = Effort(
    min_pairs=3, max_pairs=8, budget_s=0.5, limit_s=1.8, fair_half_width=0.04, pair_s=0.1
)
N_ORIGINAL_PARTS = 4

CHECKING = "checking"  # files of the original
SURGERY, REPAIR, RECALIBRATION = "surgery", "least squares", "recalibration"
EXPORT, LATENCY, ACCURACY = "export", "latency", "accuracy"

_T = TypeVar("_T")

logger = logging.getLogger(__name__)

Once = Callable[[str, Callable[[], PairedLatency]], PairedLatency]


class Bench:
    """Measures plans.

    Attributes:
        described: What the device says of itself.
        search: What accuracy is taken on.
        noise_floor: The original against itself; what differs from 1 in it is noise.
        like: What the original returns for one image.
        batch_size: Images that are answered at once.
        seconds: Part of a trial -> what it took of the original.
        memory_format: In which torch answers images soonest.
        n_repair_images: At most so many does least squares look at.
        settle_threads: Lets torch work with as many as are soonest done beside other work now.
    """

    _fitted: LeastSquares | None = None
    _whole: Any = None  # the original's answers

    def __init__(
        self,
        prunable: Prunable,
        space: SearchSpace,
        data: Data,
        target: Target,
        device: Device,
        *,
        recovery: Recovery,
        on_progress: ProgressCallback,
        criterion: Criterion = CLASSIFICATION,
        measured: Original | None = None,
    ) -> None:
        """Exports the original and measures it.

        Args:
            prunable: What is pruned.
            space: What may be left out of it.
            data: Images.
            target: What it is for.
            device: Where it is timed.
            recovery: What is done to pruned networks.
            on_progress: Told how far it has come, and when the device is waited for.
            criterion: What answers are judged by.
            measured: What was measured of the original on this very machine before.
        """
        self.prunable, self.space, self.data = prunable, space, data
        self.recovery, self.criterion, self._on_progress = recovery, criterion, on_progress
        self._device, self.described = device, device.describe()
        example = data.fit.model_input(slice(0, 1))
        floors = tuple(choice[0] for choice in space.choices[: len(space.groups)])
        pruned = prunable.without(space.plan((*floors, *(1 for _ in space.branches))))
        self.batch_size = images_at_once(data.fit)
        batch = repeated(example, self.batch_size)
        self.like = outputs(prunable.module, example)
        self.seconds: dict[str, float] = {}
        with timed(self.seconds, CHECKING):
            self._tell_original(0, "exporting")
            write = partial(
                candidate_writer, prunable.module, target=target, branches=prunable.branches
            )
            self._single = write(example, pruned)
            self._batched = write(batch, pruned)
            with timed(self.seconds, EXPORT):
                self._original_onnx = self._single(prunable.module)
            self._tell_original(1, "checking the export")
            self._check_files(space.plan(space.narrowest), batch)
        self.memory_format = memory_format(prunable.module, batch)
        self.settle_threads = settling(prunable.module, batch)
        self.n_repair_images = min(N_REPAIR_IMAGES, len(data.fit))
        whole = partial(self.predictor_of, prunable.module)
        self.search = posed(whole, data.search, batch_size=self.batch_size, criterion=criterion)
        self._tell_original(2, "timing it against itself")
        if measured is not None:
            self.noise_floor, self.original_accuracy = measured.noise_floor, measured.accuracy
            self.seconds |= measured.seconds
            return
        with timed(self.seconds, LATENCY):
            self.noise_floor = self.compare(self._original_onnx, self._original_onnx, TRIAL)
        self._tell_original(3, "its accuracy")

    def _tell_original(self, n_done: int, note: str) -> None:
        self._on_progress(Progress(MEASURING_ORIGINAL, n_done, N_ORIGINAL_PARTS, note))

    @property
    def original(self) -> Original:
        """What was measured of it."""
        return Original(self.noise_floor, self.original_accuracy, self.seconds)

    def _check_files(self, plan: Plan, batch: Example) -> None:
        """The original's file must answer like torch, and that of a plan without branches, too."""
        file = predictor(self._original_onnx, like=self.like)
        images = self.data.search.model_input(slice(0, N_COMPARED))
        check_agree("The original in torch and its ONNX file", self.prunable.module, file, images)
        if plan.dropped:  # its graph is an edited one
            compact = self.prunable.without(plan)
            both = compact, self.predictor_of(compact)
            with torch.inference_mode():
                want, have = (answers_in(call(each, batch)) for each in both)
            check_alike("torch and ONNX Runtime disagree", want, have, self.batch_size)

    @cached_property
    def original_accuracy(self) -> Accuracy:
        """Of the original on the search split."""
        with timed(self.seconds, ACCURACY):
            return self._accuracy(self.prunable.module, None)

    def repaired(self, plan: Plan, seconds: dict[str, float]) -> nn.Module:
        """The network without what `plan` leaves out, after recovery."""
        return self._recalibrated(self.refitted(plan, seconds), seconds)

    def refitted(self, plan: Plan, seconds: dict[str, float]) -> nn.Module:
        """The same without recalibration."""
        with timed(seconds, SURGERY):
            pruned = self.prunable.without(plan)
        self._refit(pruned, plan, seconds)
        return pruned

    def recover(self, pruned: nn.Module, plan: Plan) -> nn.Module:
        """What another engine pruned by `plan`, refitted and recalibrated; it may be changed."""
        self._refit(pruned, plan, {})
        return self._recalibrated(pruned, {})

    def _refit(self, pruned: nn.Module, plan: Plan, seconds: dict[str, float]) -> None:
        if self.recovery.least_squares and plan.kept:
            if self._fitted is None:
                self.gather(lambda: True)
            assert self._fitted is not None
            with timed(seconds, REPAIR):
                kept = self.prunable.kept_positions(plan)
                self._fitted.repair(pruned, kept)

    def _recalibrated(self, pruned: nn.Module, seconds: dict[str, float]) -> nn.Module:
        n_images = self.recovery.n_recalibration_images
        if not n_images:
            return pruned
        with timed(seconds, RECALIBRATION):
            return recalibrate_batch_norm(
                pruned, self.data.fit, n_images=n_images, memory_format=self.memory_format,
                batch_size=max(2, min(64, self.batch_size)),
            )  # fmt: skip

    def gather(self, has_time: Callable[[], bool]) -> int:
        """Gathers what layers read, for least squares; at how many images it looked.

        Args:
            has_time: Asked before every batch; it looks at `LEAST_REPAIR_IMAGES` in any case.
        """
        if self.recovery.least_squares:
            batches = self._repair_batches(has_time)
            self._fitted = gather(self.prunable.module, self.prunable.groups, batches)
        return self.n_repair_images

    def _repair_batches(self, has_time: Callable[[], bool]) -> Iterator[Example]:
        drawn, n = draw(self.data.fit, N_REPAIR_IMAGES)[: self.n_repair_images], 0
        for rows in drawn.split(self.batch_size):
            if n >= LEAST_REPAIR_IMAGES and not has_time():
                break
            self._on_progress(Progress(GATHERING, n, len(drawn)))
            yield self.data.fit.model_input(rows)
            n += len(rows)
        self.n_repair_images = n
        self._on_progress(Progress(GATHERING, n, n))

    def measure(
        self, plan: Plan, seconds: dict[str, float], seed: int
    ) -> tuple[Accuracy, PairedLatency]:
        """One trial; adds to `seconds` what each part took."""
        pruned = self.repaired(plan, seconds)
        with timed(seconds, EXPORT):
            candidate = self._single(pruned)
        with timed(seconds, LATENCY):  # first, because what crashes a runtime crashes it here
            latency = self.compare(self._original_onnx, candidate, TRIAL, seed)
        with timed(seconds, ACCURACY):
            measured = self.accuracy(pruned)
        return measured, latency

    def remeasure(self, plan: Plan, effort: Effort = FINALIST) -> PairedLatency:
        """The latency of a finalist."""
        candidate = self._single(self.prunable.without(plan))
        return self.compare(self._original_onnx, candidate, effort)

    def compare(
        self, original: Model, candidate: Model, effort: Effort = FINAL, seed: int = 0
    ) -> PairedLatency:
        """Both models on the device; waits for one that went away."""
        return self._patiently(
            lambda: self._device.compare(original, candidate, effort=effort, seed=seed)
        )

    def _patiently(self, work: Callable[[], _T]) -> _T:
        """What `work` returns; waits for a device that went away."""
        return patiently(
            self._device,
            work,
            on_wait=lambda why: self._on_progress(Progress("Waiting for the device", 0, 1, why)),
        )

    def layers(self, original: Path, candidate: Path, compact: nn.Module) -> tuple[LayerRow, ...]:
        """What every layer takes on the device; empty where it does not tell."""
        example = self.data.fit.model_input(slice(0, 1))
        networks = (original, self.prunable.module), (candidate, compact)
        try:
            before, after = (
                self._patiently(partial(profiled, self._device, file, ran(network, example)))
                for file, network in networks
            )
            return layer_rows(before, after)
        except MeasurementError as err:
            logger.warning("the layers could not be timed one by one: %s", err)
            return ()

    def timed_plans(
        self,
        seed: int,
        *,
        at_most: int,
        once: Once = lambda _what, measure: measure(),
        has_time: Callable[[], bool] = lambda: True,
    ) -> list[TimedPlan]:
        """Plans timed before the search: the fastest one, and some that differ in everything.

        What they cost tells what each layer costs; see `search.costs.LatencyTable`.

        Args:
            seed: Decides which.
            at_most: So many beside the fastest one.
            once: Measures what was not measured before; see `Study.once`.
            has_time: Asked before every plan but the first.
        """
        plans = design(self.space, seed)[: at_most + 1]
        found = []
        for i, widths in enumerate(plans):
            if i and not has_time():
                break
            self._on_progress(Progress(TIMING_LAYERS, i, len(plans)))
            try:
                pair = once(f"timed before, {i}", partial(self._timed_plan, widths, seed + i))
            except MeasurementError as err:
                logger.warning("a plan of the latency table could not be timed: %s", err)
                continue
            found.append(TimedPlan(self.space.by_name(widths), pair.ratio, pair.ranking_ci95))
        self._on_progress(Progress(TIMING_LAYERS, len(plans), len(plans)))
        return found

    def _timed_plan(self, widths: Widths, seed: int) -> PairedLatency:
        candidate = self._single(self.prunable.without(self.space.plan(widths)))
        return self.compare(self._original_onnx, candidate, DESIGN, seed)

    def harm(self, widths: Widths) -> float:
        """How far the answers of a plan go from the original's, on few images.

        The criterion's distance (of classes the Kullback-Leibler divergence in nats), one pass:
        batch-norm takes the statistics of the batch.
        """
        if self._whole is None:
            self._whole = self._answers(self.prunable.without(Plan({})))
        answers = self._answers(self.refitted(self.space.plan(widths), {}))
        return float(self.criterion.distance(answers, self._whole))

    def _answers(self, model: nn.Module) -> Any:
        """To some images of the search split; batch-norms of `model` are changed."""
        for module in model.modules():
            if is_norm(module):
                module.training = True
        split = self.data.search
        rows = draw(split, N_HARM_IMAGES * self.batch_size // BATCH_SIZE)
        with torch.inference_mode():
            images = arranged(split.model_input(rows), self.memory_format)
            answers = call(nn.Module.to(model, memory_format=self.memory_format), images)
        return map_tensors(lambda t: t.double() if t.is_floating_point() else t, answers)

    def accuracy(self, model: nn.Module) -> Accuracy:
        """On the search split, by ONNX Runtime."""
        return self._accuracy(model, self.original_accuracy.metric)

    def _accuracy(self, model: nn.Module, original: float | None) -> Accuracy:
        return accuracy(
            self.predictor_of(model), self.search,
            batch_size=self.batch_size, criterion=self.criterion, original=original,
        )  # fmt: skip

    def judgements(self, model: nn.Module) -> list[Any]:
        """What the criterion says of every image of the search split."""
        return judgements(
            self.predictor_of(model), self.search,
            batch_size=self.batch_size, criterion=self.criterion,
        )  # fmt: skip

    def predictor_of(self, model: nn.Module) -> Predict:
        """The answers of a pruned version of the original, `batch_size` images at once."""
        return predictor(self._batched(model), like=self.like)


def check_surgery(prunable: Prunable, plan: Plan, data: Data) -> tuple[nn.Module, float]:
    """The network without what `plan` leaves out, and its error against the oracle.

    Raises:
        EquivalenceError: It does not answer like the original whose wires were cut.
    """
    images = data.search.model_input(slice(0, N_PROOF_IMAGES))
    compact = prunable.without(plan)
    oracle = prunable.masked(plan)
    return compact, check_agree("Own surgery and the masked original", compact, oracle, images)


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Adds what the block takes to `seconds[part]`."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - began
