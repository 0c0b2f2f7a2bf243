"""Does NVIDIA's own parser read what we export, architecture by architecture?

Every network of `zoo.py` is built without trained weights, and pruned by its random half plan.
Both are exported for a Jetson Nano (opset 13), or, where one of them cannot be, for a Jetson Orin
Nano (opset 17). Each file must have the opset and the IR version of the profile and be all there
is. Then it is parsed with TensorRT's ONNX parser, into a new network each; nothing is built, so
no GPU is needed. TensorRT-RTX's parser is TensorRT's, but newer than a Jetson's: what it reads is
well-formed and has operations that TensorRT knows, which an 8.2 may still lack.

Every network runs in a process of its own, under a time limit.

    python -m benchmarks.zoo_tensorrt torchvision timm --out benchmarks/results/zoo-tensorrt.md
    python -m benchmarks.zoo_tensorrt torchvision:resnet18 timm:lcnet_050
"""

import argparse
import contextlib
import io
import multiprocessing
import multiprocessing.connection
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import onnx
from torch import nn

import benchmarks.zoo as zoo
from compressor.errors import CompressorError, ExportError
from compressor.export import export_onnx
from compressor.latency.runner import RunnerError
from compressor.latency.targets import load_target
from compressor.latency.tensorrt_runner import TensorRT
from compressor.prunable import make_prunable
from compressor.surgery import remove_channels
from compressor.values import Example

TARGETS = ("jetson-nano", "jetson-orin-nano")  # the first whose opset has all operations
ORIGINAL, PRUNED = "original", "pruned"
ACCEPTED, REFUSED = "accepted", "refused"
PACKAGES = ("tensorrt_rtx_cu13_bindings", "torch", "torchvision", "timm", "onnx")
SOURCES = {name: zoo.SETS[name] for name in ("torchvision", "timm")}


@dataclass(frozen=True)
class Row:
    """What became of one network.

    Attributes:
        name: "timm:lcnet_050".
        n_pixels: Height and width of the input.
        opset: What both forms were exported with; None where they could not be.
        ir: The newer of both files' IR versions.
        n_nodes: ONNX nodes of the original.
        refused: Form -> the parser's words, of those it refused.
        faults: What else is wrong, in words; empty where nothing is.
        not_exported: Opset -> the exporter's words, where it failed.
    """

    name: str
    n_pixels: int = 0
    opset: int | None = None
    ir: int = 0
    n_nodes: int = 0
    refused: Mapping[str, str] = field(default_factory=dict)
    faults: Sequence[str] = ()
    not_exported: Mapping[int, str] = field(default_factory=dict)


def check(name: str, backend: TensorRT, n_pixels: int | None = None) -> Row:
    """Exports, looks at and parses one network, whole and pruned.

    Args:
        name: "torchvision:resnet18" or "timm:lcnet_050".
        backend: Whose parser is asked.
        n_pixels: Height and width of the input; None takes the zoo's own.
    """
    model, example, n_pixels = zoo.build(name, n_pixels)
    prunable = make_prunable(model, example)
    plan = zoo.random_plan(prunable.groups, zoo.HALF)
    pruned = remove_channels(prunable.module, prunable.groups, plan)
    forms = {ORIGINAL: model, PRUNED: pruned}
    not_exported: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in map(load_target, TARGETS):
            try:
                paths = _export(forms, example, Path(folder), target.opset, target.max_ir)
            except ExportError as err:
                not_exported[target.opset] = str(err)
                continue
            written = [onnx.load(path, load_external_data=False) for path in paths.values()]
            words = {form: refusal(backend, path) for form, path in paths.items()}
            faults = [
                f"{path.name}: {fault}"
                for path, file in zip(paths.values(), written, strict=True)
                for fault in file_faults(file, target.opset, target.max_ir)
            ]
            if len(list(Path(folder).iterdir())) != len(paths):
                faults.append("the exporter left other files beside the ONNX file")
            return Row(
                name, n_pixels, target.opset, max(file.ir_version for file in written),
                len(written[0].graph.node), {f: said for f, said in words.items() if said},
                faults, not_exported,
            )  # fmt: skip
    return Row(name, n_pixels, not_exported=not_exported)


def _export(
    forms: Mapping[str, nn.Module],
    example: Example,
    folder: Path,
    opset: int,
    max_ir: int | None,
) -> dict[str, Path]:
    paths = {form: folder / f"{form}.onnx" for form in forms}
    for form, module in forms.items():
        try:
            export_onnx(module, example, paths[form], opset=opset, max_ir=max_ir)
        except ExportError as err:
            raise ExportError(f"{form}: {err}") from err
    return paths


def file_faults(file: onnx.ModelProto, opset: int, max_ir: int | None) -> list[str]:
    """How `file` is not what was asked, seen without the exporter's own checks."""
    faults = []
    opsets = {entry.domain: entry.version for entry in file.opset_import}
    if opsets != {"": opset}:
        faults.append(f"opsets are {opsets}; expected only {opset}")
    if max_ir is not None and file.ir_version > max_ir:
        faults.append(f"IR version is {file.ir_version}; expected at most {max_ir}")
    constants = [a.t for node in file.graph.node for a in node.attribute if a.HasField("t")]
    for tensor in (*file.graph.initializer, *constants):
        if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
            faults.append(f"{tensor.name} lies in another file")
    return faults


def refusal(backend: TensorRT, path: Path) -> str:
    """Why the parser refuses the file; empty where it reads it."""
    backend.log.clear()
    builder = backend.trt.Builder(backend.log)
    try:
        backend._parsed(builder, path.read_bytes(), str(path))  # as the runner does
    except RunnerError as err:
        words = str(err).partition(f"{path}: ")[2] or str(err)
        return first_of(words.partition(" Change or replace ")[0])
    return ""


def first_of(words: str) -> str:
    """The first node's refusal, and how many follow."""
    first, *others = re.split(r"; (?=node \d)", words)
    return f"{first} (and {len(others)} nodes more)" if others else first


def _child(name: str, answer: multiprocessing.connection.Connection) -> None:
    warnings.simplefilter("ignore")
    with contextlib.redirect_stderr(io.StringIO()):  # TensorRT's warnings
        try:
            row = check(name, TensorRT())
        except (CompressorError, RuntimeError, ValueError, TypeError, IndexError) as err:
            said = str(err).splitlines() or [""]
            row = Row(name, faults=[f"{type(err).__name__}: {said[0]}"])
    answer.send(row)


def in_own_process(name: str, limit_s: float) -> Row:
    """`check(name)`; a row that says so where it dies or takes too long."""
    context = multiprocessing.get_context("forkserver")  # imports torch and timm only once
    context.set_forkserver_preload(["benchmarks.zoo", "timm"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit_s):
            return Row(name, faults=[f"not done within {limit_s:.0f} s"])
        row: Row = ours.recv()
        return row
    except EOFError:
        process.join()
        return Row(name, faults=[f"exit {process.exitcode}"])
    finally:
        process.kill()
        process.join()
        ours.close()


def report(rows: Sequence[Row]) -> str:
    """Markdown: the table, a summary, and below it every reason."""
    lines = [
        "| network | input | opset | IR | nodes | original | pruned | words |",
        "|---|--:|--:|--:|--:|---|---|---|",
        *map(_line, rows),
        "",
        summary(rows),
    ]
    for row in rows:
        if row.refused or row.faults or row.not_exported:
            lines += ["", f"**{row.name}**", ""]
            lines += [f"- FAULT {fault}" for fault in row.faults]
            lines += [f"- {form} REFUSED: {words}" for form, words in row.refused.items()]
            lines += [f"- opset {n}: {words}" for n, words in row.not_exported.items()]
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """How many of `rows` were accepted, refused, not exportable, and not done."""
    exported = [row for row in rows if row.opset is not None]
    well = [row for row in exported if not row.refused and not row.faults]
    by_opset = ", ".join(
        f"{sum(row.opset == opset for row in well)} at opset {opset}"
        for opset in sorted({row.opset for row in well if row.opset is not None})
    )
    n_without = sum(row.opset is None and bool(row.not_exported) for row in rows)
    return (
        f"{len(rows)} networks: {len(well)} accepted whole and pruned ({by_opset or 'none'}); "
        f"{sum(bool(row.refused) for row in exported)} refused; {n_without} not exportable; "
        f"{sum(bool(row.faults) for row in rows)} with another fault."
    )


def _line(row: Row) -> str:
    if row.opset is None:
        told = [*row.faults, *list(row.not_exported.values())[-1:]]
        return f"| {row.name} | {row.n_pixels} | - | - | - | - | - | {_cell(told)} |"
    form = [REFUSED if form in row.refused else ACCEPTED for form in (ORIGINAL, PRUNED)]
    told = [*row.faults, *row.refused.values()]
    return (
        f"| {row.name} | {row.n_pixels} | {row.opset} | {row.ir} | {row.n_nodes} "
        f"| {form[0]} | {form[1]} | {_cell(told)} |"
    )


def _cell(told: Sequence[str]) -> str:
    text = "; ".join(dict.fromkeys(told)).replace("|", "/").replace("\n", " ")
    return text if len(text) <= 160 else f"{text[:157]}..."


def _header(names: Sequence[str], out: Path) -> str:
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return (
        "# What NVIDIA's parser says of what we export\n\n"
        f"`python -m benchmarks.zoo_tensorrt {' '.join(names)} --out {out}`\n\n"
        f"{time.strftime('%Y-%m-%d')}; {platform.machine()}, Python "
        f"{platform.python_version()}, {versions}. Parsed only, no engine is built. The parser is "
        "TensorRT-RTX's, newer than a\nJetson's; operations that TensorRT 8.2 lacks would not "
        "show.\n\n"
    )


def main() -> None:
    """Prints the table, and writes it after every network where --out is given."""
    parser = argparse.ArgumentParser(description="Does NVIDIA's parser read what we export?")
    parser.add_argument("names", nargs="+", help="torchvision, timm, or SOURCE:ARCHITECTURE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit-s", type=float, default=120)
    given = parser.parse_args()
    names = [name for each in given.names for name in SOURCES.get(each, [each])]
    rows: list[Row] = []
    for name in names:
        started = time.perf_counter()
        rows.append(in_own_process(name, given.limit_s))
        seconds = time.perf_counter() - started
        print(f"{len(rows)}/{len(names)} {seconds:.0f} s {_line(rows[-1])}", file=sys.stderr)
        if given.out:
            given.out.write_text(_header(given.names, given.out) + report(rows))
    print(report(rows))


if __name__ == "__main__":
    main()
