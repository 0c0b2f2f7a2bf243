"""Does pruning stay exact on the architectures that people use?

Every network is built without trained weights and made random where a fresh one is not: no two
channels are alike, no branch is scaled by 0. Half the channels of every free group go, drawn at
random; in a second plan, a fifth. Then three things are asked, each with an oracle of its own:

1. float64: do both pruned networks answer like the masked ones ("error", of the largest output)?
   Where a masked one answers like the whole network the question says nothing: "blind".
2. float32: does ONNX Runtime answer like torch ("ONNX error")?
3. Where candidates are filled into a template: is the second plan's file, byte for byte, what a
   template made from that candidate gives?
4. float32: does NNI's engine answer like our own surgery? If not, why not?

Every network runs in a process of its own, under a limit of CPU time. With --rows, what was found
is kept and not asked again, so that a sweep may be stopped and go on.

    python -m benchmarks.zoo torchvision --out benchmarks/results/zoo-torchvision.md
    python -m benchmarks.zoo video --out benchmarks/results/zoo-video.md
    python -m benchmarks.zoo timm --out benchmarks/results/zoo-timm.md
    python -m benchmarks.zoo families --out benchmarks/results/zoo-families.md
    python -m benchmarks.zoo own --out benchmarks/results/own-networks.md
    python -m benchmarks.zoo torchvision:resnet18 timm:res2net50_26w_4s own:crnn
"""

import argparse
import copy
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from benchmarks import own_networks
from benchmarks.zoo_names import (
    CLASSIFICATION,
    DETECTION,
    FAMILIES,
    N_PIXELS,
    OPTIONS,
    SEGMENTATION,
    TIMM,
    VIDEO,
    VIDEO_FRAMES,
    small_mvit,
)
from compressor.containers import map_tensors, tensors_in
from compressor.errors import EngineError, ExportError
from compressor.export import candidate_writer, export_onnx
from compressor.exporter import DEFAULT_OPSET, Way, inputs_in
from compressor.graph import channel_groups, outputs
from compressor.latency.onnxruntime import answers_of
from compressor.prunable import PROGRAM, Prunable, in_form, make_prunable
from compressor.surgery import masked, prune_with_nni, remove_channels
from compressor.surgery.nni_engine import layers_for_nni, losses
from compressor.template import OnnxTemplate, make_template
from compressor.values import ChannelGroup, Example, Plan

EXACT = 1e-9  # of the largest output, float64: rounding is at 1e-13, a wrong channel at 1e-2
ONNX_TOLERANCE = 1e-3  # of the largest output, float32
NEWER_OPSET = 18  # for networks with operations that the default one lacks
BLIND = 1e-6  # a masked network that differs by less is no oracle
HALF, MOST = 0.5, 0.8  # keep ratios of the two plans
NNI_LIMIT_S = 60  # of CPU time, for one network
PRELOADED = ["benchmarks.own_networks", "compressor", "nni.compression", "timm", "torch._dynamo"]
WAIT = 20  # times the limit of CPU time, by the clock: other work takes turns with this
AGREES = "agrees"
LITTLE_PRUNED = 0.7  # with half of every free group gone, this share of parameters says why


@dataclass(frozen=True)
class Row:
    """What was found for one network.

    Attributes:
        name: "timm:lcnet_050".
        n_pixels: Height and width of the input; 0 where it is no image.
        n_groups: Channel groups, free ones among them.
        n_free: Groups that may be pruned.
        form: "module" or "program", and how many groups the proof has locked.
        params_kept_ratio: Parameters left, of the whole network's.
        error: Pruned against masked, float64, the larger of both plans; NaN where the outputs
            have other shapes.
        groups_s: `channel_groups`, seconds.
        surgery_s: `remove_channels`, seconds.
        onnx_error: ONNX Runtime against torch, float32; None where not asked.
        template: Whether candidates are filled into a template; None where not asked.
        nni: Whether NNI agrees with own surgery, or why not; None where not asked.
        nni_layers: Layers that NNI replaced, of those that lose channels; "" where not asked.
        faults: What is wrong, in words; empty where nothing is.
        notes: What is worth knowing, in words.
        locked: Why groups are locked, without places -> number of groups.
    """

    name: str
    n_pixels: int
    n_groups: int = 0
    n_free: int = 0
    form: str = ""
    params_kept_ratio: float = 1.0
    error: float | None = None
    groups_s: float = 0.0
    surgery_s: float = 0.0
    onnx_error: float | None = None
    template: bool | None = None
    nni: str | None = None
    nni_layers: str = ""
    faults: Sequence[str] = ()
    notes: Sequence[str] = ()
    locked: dict[str, int] = field(default_factory=dict)


def check(name: str, n_pixels: int | None = None) -> Row:
    """Everything that the module's header asks, for one network.

    Args:
        name: "torchvision:resnet18" or "timm:lcnet_050".
        n_pixels: Height and width of the input; None takes the sweep's own.
    """
    *_, row = stages(name, n_pixels)
    return row


def stages(name: str, n_pixels: int | None = None) -> Iterator[Row]:
    """What is known after each of the three questions; the last row has everything."""
    with _listening() as heard:
        model, example, n_pixels = build(name, n_pixels)
        proven, row = _pruned_against_masked(Row(name, n_pixels), copy.deepcopy(model), example)
        row = replace(row, notes=_unique(heard))
        yield row
        single = _in_float32(proven, model, example)
        if _what_is_free(single) != _what_is_free(proven):
            row = replace(row, faults=[*row.faults, f"in float32: {_n_free(single)} free"])
        yield replace(row, notes=_unique(heard))
        row = _with_onnx(row, single, example)
        yield replace(row, notes=_unique([*row.notes, *heard]))
        yield _with_nni(row, single, example)


def _with_nni(row: Row, prunable: Prunable, example: Example) -> Row:
    model, groups = prunable.module, prunable.groups
    plan = random_plan(groups, HALF)
    lost = losses(model, groups, plan)
    row = replace(row, nni_layers=f"{len(layers_for_nni(model, example, lost))} of {len(lost)}")
    before = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, NNI_LIMIT_S)
    try:
        by_nni = prune_with_nni(model, example, groups, plan)
    except (EngineError, TooSlowError) as err:
        return replace(row, nni=str(err))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    own = outputs(remove_channels(model, groups, plan), example)
    error, shape_fault = relative_error(own, outputs(by_nni, example))
    is_alike = error <= ONNX_TOLERANCE
    return replace(row, nni=shape_fault or (AGREES if is_alike else f"differs by {error:.1e}"))


class TooSlowError(Exception):
    """NNI took longer than its limit; no error that NNI or its caller would take for another."""


def _stop(*_: object) -> None:
    raise TooSlowError(f"too slow: not done within {NNI_LIMIT_S} s of CPU time")


def _in_float32(proven: Prunable, model: nn.Module, example: Example) -> Prunable:
    """What is proven of a network in float64, of `model` in float32; no second proof."""
    module = in_form(model, PROGRAM, example) if proven.form == PROGRAM else model
    reasons = {group.name: group.locked_because for group in proven.groups}
    groups = tuple(
        replace(group, locked_because=group.locked_because or reasons.get(group.name))
        for group in channel_groups(module, example)
    )
    return replace(proven, module=module, groups=groups)


def _what_is_free(prunable: Prunable) -> list[tuple[str, int, bool]]:
    return [(g.name, g.n_channels, g.locked_because is None) for g in prunable.groups]


def _pruned_against_masked(row: Row, model: nn.Module, example: Example) -> tuple[Prunable, Row]:
    example = map_tensors(lambda t: t.double() if t.is_floating_point() else t, example)
    prunable = make_prunable(model.double(), example)
    started = time.perf_counter()
    channel_groups(prunable.module, example)
    analysed = time.perf_counter()
    half = random_plan(prunable.groups, HALF)
    pruned = remove_channels(prunable.module, prunable.groups, half)
    cut = time.perf_counter()
    faults, errors = [], []
    whole = outputs(prunable.module, example)
    for plan in (half, random_plan(prunable.groups, MOST)):
        compact = remove_channels(prunable.module, prunable.groups, plan)
        expected = outputs(masked(prunable.module, prunable.groups, plan), example)
        error, shape_fault = relative_error(expected, outputs(compact, example))
        effect, _ = relative_error(whole, expected)
        errors.append(error)
        if shape_fault:
            faults.append(shape_fault)
        elif error > EXACT:
            faults.append(f"wrong: pruned and masked differ by {error:.1e}")
        if plan.kept and effect <= BLIND:
            faults.append(f"blind: masked and whole differ by {effect:.1e}")
    return prunable, replace(
        row, n_groups=len(prunable.groups), n_free=_n_free(prunable), form=_form(prunable),
        params_kept_ratio=n_parameters(pruned) / n_parameters(model), error=float(np.max(errors)),
        groups_s=analysed - started, surgery_s=cut - analysed, faults=faults,
        locked=dict(Counter(kind(g.locked_because) for g in prunable.groups if g.locked_because)),
    )  # fmt: skip


def _with_onnx(row: Row, prunable: Prunable, example: Example) -> Row:
    """`row` with what ONNX Runtime says, in float32, and whether a template serves."""
    model, groups = prunable.module, prunable.groups
    pruned = remove_channels(model, groups, random_plan(groups, HALF))
    opset, notes, faults = DEFAULT_OPSET, [*row.notes], [*row.faults]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.onnx"
        try:
            export_onnx(pruned, example, path, opset=opset)
        except ExportError as err:
            opset = NEWER_OPSET
            notes.append(str(err))
            try:
                export_onnx(pruned, example, path, opset=opset)
            except ExportError as again:
                return replace(row, notes=[*notes, str(again)])
            notes.append(f"exported with opset {opset}")
        wanted = outputs(pruned, example)
        ways = answers_of(path, inputs_in(pruned, example))
        found = [relative_error(wanted, way) for way in ways]
    error, shape_fault = min(found, key=lambda way: (way[1] is not None, way[0]))
    if shape_fault:
        faults.append(f"ONNX: {shape_fault}")
    elif error > ONNX_TOLERANCE:
        faults.append(f"ONNX Runtime and torch differ by {error:.1e}")
    writer = candidate_writer(model, example, pruned, opset=opset)
    has_template = isinstance(getattr(writer, "__self__", None), OnnxTemplate)
    if has_template:
        other = remove_channels(model, groups, random_plan(groups, MOST))
        if writer(other) != make_template(other, example, way=Way(opset)).fill(other):
            faults.append("the filled template is not what another candidate's own export is")
    return replace(row, onnx_error=error, template=has_template, faults=faults, notes=notes)


def build(name: str, n_pixels: int | None = None) -> tuple[nn.Module, Example, int]:
    """(network in eval mode and float32, input, height and width of it), all random.

    Args:
        name: "torchvision:resnet18", "timm:lcnet_050", or "own:crnn" of `own_networks`.
        n_pixels: Height and width of the input; None takes the sweep's own.
    """
    source, _, architecture = name.partition(":")
    model: Any
    torch.manual_seed(0)
    if source == "own":
        model, given = own_networks.NETWORKS[architecture]()
        randomise(model.eval(), given)
        return model, given, given.shape[-1] if is_image(given) else 0
    if source == "timm":
        import timm

        model = timm.create_model(architecture, **OPTIONS.get(architecture, {}))
        usual = model.default_cfg["input_size"][1]
        is_fixed = model.default_cfg.get("fixed_input_size", False)
        own = N_PIXELS.get(architecture, usual if is_fixed else 128)
    else:
        options = {"weights": None, **OPTIONS.get(architecture, {})}
        if architecture in (*DETECTION, *SEGMENTATION):
            options["weights_backbone"] = None
        get = torchvision.models.get_model
        model = small_mvit() if architecture == "mvit" else get(architecture, **options)
        own = N_PIXELS.get(architecture, 128)
    model.eval()
    n_pixels = n_pixels or own
    image = torch.rand(1, 3, n_pixels, n_pixels)
    example: Example = ([image[0]],) if architecture in DETECTION else image
    if architecture in VIDEO:
        example = torch.rand(1, 3, VIDEO_FRAMES[architecture], n_pixels, n_pixels)
    randomise(model, example)
    if architecture in DETECTION and "ssd" not in architecture:
        freeze_norms(model.backbone)
    return model, example, n_pixels


def randomise(model: nn.Module, example: Example) -> None:
    """Draws, in place, all vectors and constants of `model`, and its batch-norms' statistics.

    The statistics lie about those of what each norm reads, so that signals neither die nor
    explode on their way through a deep network.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor, low: float) -> Tensor:
        return (torch.rand(tensor.shape, generator=generator) + low).to(tensor)

    def settle(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mean, spread = inputs[0].mean(), inputs[0].var().clamp_min(1e-12)
        assert isinstance(norm.running_mean, Tensor)
        assert isinstance(norm.running_var, Tensor)
        norm.running_mean.copy_(mean + spread.sqrt() * draw(norm.running_mean, -0.5))
        norm.running_var.copy_(spread * draw(norm.running_var, 0.5))

    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.numel() == max(tensor.shape, default=1) or tensor.min() == tensor.max():
                is_shift = name.rpartition(".")[2].startswith("bias") or tensor.ndim > 1
                tensor.copy_(draw(tensor, -0.5 if is_shift else 0.5))
    hooks = [
        module.register_forward_pre_hook(settle)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    outputs(model, example)
    for hook in hooks:
        hook.remove()


def is_image(example: Example) -> TypeGuard[Tensor]:
    """Whether it is `(1, c, h, w)` with as many rows as columns."""
    return (
        isinstance(example, Tensor) and example.ndim == 4 and example.shape[2] == example.shape[3]
    )


def freeze_norms(backbone: nn.Module) -> None:
    """Makes every batch-norm the frozen one of torchvision's trained detection networks."""
    for path, module in list(backbone.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(module.num_features, module.eps)
            frozen.load_state_dict(module.state_dict())
            backbone.set_submodule(path, frozen.eval())


def random_plan(groups: Sequence[ChannelGroup], keep_ratio: float) -> Plan:
    """Some channels of every free group, at least one of each."""
    rng = np.random.default_rng(round(100 * keep_ratio))
    return Plan({
        g.name: tuple(sorted(
            rng.permutation(g.n_channels)[: max(1, int(g.n_channels * keep_ratio))].tolist()
        ))
        for g in groups
        if g.locked_because is None
    })  # fmt: skip


def relative_error(expected: object, got: object) -> tuple[float, str | None]:
    """(largest difference, of the largest value of its output; what makes it meaningless)."""
    ours, theirs = [[t.double() for t in tensors_in(value)] for value in (expected, got)]
    shapes = [tuple(t.shape) for t in ours], [tuple(t.shape) for t in theirs]
    if shapes[0] != shapes[1]:
        return float("nan"), f"outputs are {shapes[1]}, not {shapes[0]}"
    if not any(float(t.abs().max()) > 0 for t in ours if t.numel()):
        return float("nan"), "outputs are empty or zero"
    if not all(t.isfinite().all() for t in (*ours, *theirs)):
        return float("nan"), "outputs are not finite"
    errors = [
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        for a, b in zip(ours, theirs, strict=True)
        if a.numel()
    ]
    return max(errors), None


def n_parameters(model: nn.Module) -> int:
    """Numbers in its parameters."""
    return sum(p.numel() for p in model.parameters())


def kind(because: str) -> str:
    """A reason without module names, files, lines and numbers."""
    return re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "N", re.sub(r" \([^()]*\)", "", because))


def _n_free(prunable: Prunable) -> int:
    return sum(group.locked_because is None for group in prunable.groups)


def _form(prunable: Prunable, model: nn.Module | None = None) -> str:
    """Module or program, and the groups that were locked because the network contradicted them."""
    is_program = isinstance(prunable.module, torch.fx.GraphModule)
    reasons = [group.locked_because or "" for group in prunable.groups]
    n_locked = sum(because.startswith("the forward code does not follow") for because in reasons)
    form = "program" if is_program and prunable.module is not model else "module"
    return f"{form}, {n_locked} locked" if n_locked else form


def _unique(notes: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(notes))


@contextmanager
def _listening() -> Iterator[list[str]]:
    """What `compressor` logs meanwhile, as it grows."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, ear = logging.getLogger("compressor"), Ear()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(ear)
    try:
        yield said
    finally:
        logger.removeHandler(ear)
        logger.setLevel(level)


def in_own_process(name: str, limit_s: float) -> Row:
    """`check(name)`; a row that says so where it dies or takes too long.

    Args:
        name: As for `check`.
        limit_s: Of CPU time, which other work on the machine does not change; `WAIT` times as
            long by the clock.
    """
    context = multiprocessing.get_context("forkserver")  # imports torch only once
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    row, ends = Row(name, 0), time.monotonic() + WAIT * limit_s
    with tempfile.NamedTemporaryFile("r", errors="replace") as said:
        process = context.Process(target=_child, args=(name, limit_s, theirs, said.name))
        process.start()
        theirs.close()
        with suppress(EOFError):
            while ours.poll(max(0.0, ends - time.monotonic())):
                row = Row(**ours.recv())
            process.kill()
        process.join()
        ours.close()
        complaints = said.read()
    if process.exitcode == 0:
        return row
    fault = f"not done within {limit_s:.0f} s of CPU time"
    if process.exitcode == -signal.SIGKILL:
        fault = f"killed, or not done within {WAIT * limit_s:.0f} s"
    elif process.exitcode != -signal.SIGXCPU:
        last = (complaints.strip().splitlines() or ["no message"])[-1]
        places = re.findall(r'File ".*?(compressor/\S+)", line (\d+)', complaints)
        where = f" ({places[-1][0]}, line {places[-1][1]})" if places else ""
        fault = f"exit {process.exitcode}: {last}{where}"
    return replace(row, faults=[*row.faults, fault])


def _child(name: str, limit_s: float, rows: Connection, said: str) -> None:
    """Sends each row of `stages`; what is printed meanwhile goes to the file `said`."""
    warnings.simplefilter("ignore")
    with Path(said).open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    seconds = math.ceil(limit_s)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))
    for row in stages(name):
        rows.send(asdict(row))


def report(rows: Sequence[Row]) -> str:
    """Markdown: the table, and below it what to know of each network that stands out."""
    lines = [
        "| network | input | groups | free | form | params kept | error | groups s | surgery s "
        "| ONNX error | template | NNI |",
        "|---|--:|--:|--:|---|--:|--:|--:|--:|--:|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.n_pixels} | {row.n_groups} | {row.n_free} | {row.form} "
            f"| {row.params_kept_ratio:.2f} | {_short(row.error)} | {row.groups_s:.1f} "
            f"| {row.surgery_s:.2f} | {_short(row.onnx_error)} "
            f"| {'' if row.template is None else 'yes' if row.template else 'no'} "
            f"| {_told_of_nni(row)} |"
        )
    well = [row for row in rows if not row.faults]
    n_wrong = sum(any(re.match("wrong|ONNX", fault) for fault in row.faults) for row in rows)
    n_pruned = sum(row.params_kept_ratio < LITTLE_PRUNED for row in well)
    lines += [
        "",
        f"{len(rows)} networks, {n_wrong} wrong; {len(well)} without fault, {n_pruned} of them "
        f"with less than {LITTLE_PRUNED} of their parameters left; "
        f"{sum(row.form.startswith('program') for row in rows)} as programs; "
        f"{sum(row.template is True for row in rows)} of "
        f"{sum(row.template is not None for row in rows)} by template; NNI agrees on "
        f"{_n_agreeing(rows)} of {sum(row.nni is not None for row in rows)}.",
    ]
    for row in rows:
        if row.faults or row.notes or row.params_kept_ratio >= LITTLE_PRUNED:
            lines += ["", f"**{row.name}**", ""]
            lines += [f"- FAULT {fault}" for fault in row.faults]
            lines += [f"- {note}" for note in row.notes]
            common = Counter(row.locked).most_common(6)
            lines += [f"- {count} locked: {because}" for because, count in common]
    return "\n".join(lines) + "\n"


def _n_agreeing(rows: Sequence[Row]) -> int:
    return sum(row.nni == AGREES for row in rows)


def _told_of_nni(row: Row) -> str:
    """In words, with how many of the layers that lose channels NNI itself replaced."""
    return row.nni or "" if row.nni != AGREES else f"{AGREES}, {row.nni_layers}"


def _short(error: float | None) -> str:
    return "" if error is None else f"{error:.0e}"


def main() -> None:
    """Prints the table, and writes it after every network where --out is given."""
    parser = argparse.ArgumentParser(description="Does pruning stay exact?")
    parser.add_argument("names", nargs="+", help=f"{', '.join(SETS)}, or SOURCE:ARCHITECTURE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=Path, help="lines of JSON, read and added to")
    parser.add_argument("--limit-s", type=float, default=300, help="of CPU time, for each network")
    given = parser.parse_args()
    names = [name for each in given.names for name in SETS.get(each, [each])]
    known: dict[str, Row] = {}
    if given.rows and given.rows.is_file():
        lines = given.rows.read_text().splitlines()
        known = {row.name: row for row in (Row(**json.loads(line)) for line in lines)}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for i, name in enumerate(names):
        if name in known:
            continue
        started = time.perf_counter()
        row = known[name] = in_own_process(name, given.limit_s)
        seconds = time.perf_counter() - started
        told = "; ".join(row.faults) or f"{row.params_kept_ratio:.2f} of parameters"
        print(f"{i + 1}/{len(names)} {name} {seconds:.0f} s: {told}", file=sys.stderr)
        if given.rows:
            with given.rows.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        if given.out:
            given.out.write_text(_page(given.names, names, known))
    text = _page(given.names, names, known)
    if given.out:
        given.out.write_text(text)
    print(text)


def _page(asked: Sequence[str], names: Sequence[str], known: Mapping[str, Row]) -> str:
    """The command, the report, and which networks have not been asked yet."""
    missing = [name for name in names if name not in known]
    text = f"`python -m benchmarks.zoo {' '.join(asked)}`\n\n"
    if missing:
        text += f"Stopped; {len(missing)} not asked yet: {', '.join(missing)}.\n\n"
    return text + report([known[name] for name in names if name in known])


SETS = {
    "torchvision": [f"torchvision:{n}" for n in (*CLASSIFICATION, *SEGMENTATION, *DETECTION)],
    "video": [f"torchvision:{n}" for n in VIDEO],
    "timm": [f"timm:{n}" for n in TIMM],
    "families": [f"timm:{n}" for n in FAMILIES],
    "own": [f"own:{n}" for n in own_networks.NETWORKS],
}

if __name__ == "__main__":
    main()
