"""torch's two ONNX exporters, and what they need around them.

The first is the TorchScript-based one: of the two it is fast, and the one that can write opset 13,
the newest that TensorRT 8.2 (Jetson Nano) reads. The second follows torch.export, knows more
operations, takes seconds, and writes opset 18 and newer; an older one by conversion, which may
leave the file as it was without a word. So its opset is read again.
"""

import contextlib
import inspect
import io
import itertools
import logging
import os
import re
import string
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from compressor.containers import answers_in, leaves_in, map_tensors, tensors_in
from compressor.errors import ExportError, GraphError
from compressor.running import cloned
from compressor.second_exporter import OUTPUT, by_second, lacks
from compressor.symbolics import register
from compressor.values import FORWARD_FAILURES, Example, call

INPUT = "input"
DEFAULT_OPSET, NEWEST_OPSET = 13, 20
SECOND_WRITES, SECOND_CONVERTS = 18, 17  # opsets of the second exporter: its own, and older ones
_CHATTY = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
_OPERATION = re.compile(r"operator '?(\w+::\w+|\w+)|OpOverload\(op='([\w.]+)'")
_NEEDS = re.compile(r"added in version (\d+)")
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Way:
    """How a file is written.

    Attributes:
        opset: Operator set.
        is_second: By torch's second exporter.
    """

    opset: int = DEFAULT_OPSET
    is_second: bool = False


@dataclass(frozen=True)
class Limits:
    """What the reader of a file takes.

    Attributes:
        opset: The operator set that is written where it has all operations.
        max_opset: The newest that is written where `opset` has not.
        max_ir: Newest IR version of the file format; None takes any.
        reader: Whose limits these are, for messages; "" for nobody's in particular.
    """

    opset: int = DEFAULT_OPSET
    max_opset: int = NEWEST_OPSET
    max_ir: int | None = None
    reader: str = ""


class UnwritableError(ExportError):
    """An exporter does not write an operation.

    Attributes:
        operation: Its name as the exporter says it; "" where it says none.
        needs: Opset in which the exporter writes it; None where there is none.
        reason: First line of what the exporter said.
    """

    def __init__(self, name: str, way: Way, said: str, at_work: str = "") -> None:
        found, needs = _OPERATION.search(said), _NEEDS.search(said)
        self.operation = next(filter(None, found.groups()), "") if found else at_work
        self.needs = int(needs[1]) if needs else None
        line = next(iter(said.strip().splitlines()), "it did not say why")
        self.reason = re.split(r"\s*\[Caused by|\.? Please feel free", line)[0].strip(" .")
        super().__init__(f"{name} cannot be exported to ONNX opset {way.opset}: {self.reason}.")


def attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    """The attribute of a node that has it."""
    found: onnx.AttributeProto = next(a for a in node.attribute if a.name == name)
    return found


def ways(limits: Limits, refusals: list[ExportError]) -> Iterator[Way]:
    """Ways to write a network within `limits`, the first to be taken first.

    Args:
        limits: Of its reader.
        refusals: Where what went wrong with a way is put before the next one is asked for.
    """
    yield Way(limits.opset)
    first = refusals[0]
    needs = first.needs if isinstance(first, UnwritableError) else None
    if isinstance(first, UnwritableError) and needs is None and lacks(first.operation):
        return  # the second exporter says so too, after seconds a hundred layers
    if needs is not None and limits.opset < needs <= limits.max_opset:
        yield Way(needs)
    second = min(max(limits.opset, SECOND_WRITES), limits.max_opset)
    if second >= SECOND_CONVERTS:
        yield Way(second, is_second=True)


def written(
    model: nn.Module,
    example_input: Example,
    answer: Any,
    way: Way,
    *,
    fold: bool,
    names: Sequence[str] = (),
) -> bytes:
    """The ONNX file of `model`, as one of torch's exporters writes it for `example_input`.

    Args:
        model: In eval mode; it is not changed.
        example_input: As the model takes it.
        answer: What it returns for that.
        way: Which exporter, and which operator set.
        fold: Whether constants are computed and batch-norms folded; the names of the initialisers
            are those of the state_dict otherwise.
        names: Of the inputs, in the order in which the network takes them; see `names_in`.

    Raises:
        UnwritableError: The network has an operation that this way has not.
        ExportError: The network returns no tensor, or the file has not the opset asked for.
    """
    names = list(names or names_in(_ordered(model, example_input)))
    if not (_is_plain(answer) and _is_plain_input(model, example_input)):
        flat = _Flat(model, example_input, answer)
        leaves = zip(names, _inputs(flat.example), strict=False)
        names = [name for name, leaf in leaves if isinstance(leaf, Tensor)]
        plain = tuple(_tensors_of(answer))
        content = written(flat, flat.given, plain, way, fold=fold, names=names)
        return _without_prefix(content, "inner.")
    args, kwargs = (example_input if isinstance(example_input, tuple) else (example_input,)), None
    if isinstance(example_input, dict):
        args, kwargs = (), cloned(example_input)
    write = by_second if way.is_second else _by_first
    try:
        with warnings.catch_warnings(), _silence(), torch.no_grad():
            warnings.simplefilter("ignore")  # they announce their own age at every call
            content = write(model, cloned(args), kwargs, names, way.opset, fold)
    except (torch.onnx.errors.OnnxExporterError, *FORWARD_FAILURES) as err:
        raise UnwritableError(_name(model), way, str(err), _at_work(err)) from err
    return _small_letters(content) if b"Einsum" in content else content


def refused(
    model: nn.Module, example_input: Example, limits: Limits, refusals: list[ExportError]
) -> ExportError:
    """One error for what went wrong with every way: the operation, its place, and what helps."""
    unwritable = [err for err in refusals if isinstance(err, UnwritableError)]
    if len(unwritable) < len(refusals):  # a file was written, and answered otherwise
        return next(err for err in refusals if not isinstance(err, UnwritableError))
    least, most = limits.opset, limits.max_opset
    span = f"opset {most}" if least == most else f"opsets {least} to {most}"
    reader = f", the newest that {limits.reader} reads" if limits.reader else ""
    head = f"{_name(model)} cannot be exported to ONNX {span}{reader}"
    first = next((err for err in unwritable if err.operation), unwritable[0])
    if not first.operation:
        return ExportError(f"{head}: {first.reason}.")
    operation = first.operation.rpartition("::")[2].removeprefix("aten.")
    what = f"{operation}{_place(model, example_input, first.operation)}"
    if first.needs is not None and first.needs > most:
        return ExportError(
            f"{head}: {what} needs opset {first.needs}. Replace the operation, or choose a target "
            f"that reads that opset."
        )
    return ExportError(
        f"{head}: no exporter of torch writes {what}. Replace the operation, or export the part "
        f"of the network before it."
    )


def _by_first(
    model: nn.Module, args: Any, kwargs: Any, names: list[str], opset: int, fold: bool
) -> bytes:
    register(opset)
    if args and isinstance(args[-1], dict):
        args = (*args, {})  # or the exporter took it for keyword arguments
    buffer: Any = io.BytesIO()  # works, though torch's annotation names paths only
    mode = torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(
        model, args, buffer, kwargs=kwargs, dynamo=False, opset_version=opset,
        input_names=names, output_names=[OUTPUT], training=mode, do_constant_folding=fold,
    )  # fmt: skip
    content: bytes = buffer.getvalue()
    return content


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Where an exporter fails it prints the whole graph from C++ to file descriptor 1, or logs."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    saved = None
    if sys.stdout is not None:  # or it was closed by the caller
        sys.stdout.flush()
        saved = os.dup(1)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def _at_work(err: BaseException) -> str:
    """The operation that the first exporter was writing when it failed; "" where it was none."""
    for frame, _ in traceback.walk_tb(err.__traceback__):
        if frame.f_code.co_name == "_run_symbolic_function":
            return str(frame.f_locals["node"].kind())
    return ""


def _name(model: nn.Module) -> str:
    return type(model.inner if isinstance(model, _Flat) else model).__name__


def _place(model: nn.Module, example: Example, operation: str) -> str:
    """Where the first such operation is: " in LAYER (FILE, line N)"; "" where it is not found."""
    ordered = _ordered(model, example)
    kind = operation if "::" in operation else f"aten::{operation.removeprefix('aten.')}"
    wrapped = _Flat(model, ordered, None)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(wrapped, cloned(wrapped.given), check_trace=False)
    except FORWARD_FAILURES:
        return ""
    graph = traced.inlined_graph
    node = next(iter(graph.findAllNodes(kind)), None)
    if node is None:
        return ""
    layer = node.scopeName().rpartition("/")[2].removeprefix("__module.inner").strip(".")
    frames = re.findall(r"^(.+)\((\d+)\): ", str(node.sourceRange()), flags=re.MULTILINE)
    own = next(((f, n) for f, n in frames if not f.startswith(_TORCH) and f != __file__), None)
    where = f" ({Path(own[0]).name}, line {own[1]})" if own else ""
    return f" in {layer}{where}" if layer else where


def _is_plain(output: Any) -> bool:
    """Whether the exporter knows every container in what a network returned."""
    if isinstance(output, dict):
        return all(isinstance(key, str) and _is_plain(each) for key, each in output.items())
    if type(output) in (list, tuple):
        return all(map(_is_plain, output))
    return isinstance(output, Tensor)


def _is_plain_input(model: nn.Module, example: Any) -> bool:
    """Whether the exporter hands the example to the forward pass as it is."""
    with contextlib.suppress(ValueError):  # a traced module has no signature
        kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
        if inspect.Parameter.KEYWORD_ONLY in kinds:
            return False
    leaves, _ = torch.utils._pytree.tree_flatten(
        example, is_leaf=lambda each: type(each) not in (tuple, list, dict)
    )
    return all(each is None or isinstance(each, (Tensor, bool, int, float)) for each in leaves)


class _Flat(nn.Module):
    """A network that takes plain tensors, and whose answers are a plain tuple of tensors.

    Whatever else is in the example and in the answers is constant.

    Attributes:
        given: The tensors of the example, by position.
    """

    def __init__(self, inner: nn.Module, example: Example, answer: Any) -> None:
        super().__init__()
        self.inner, self.training = inner, inner.training
        self.example = in_order(inner, example) if isinstance(example, dict) else example
        self.given: Example = tuple(tensors_in(self.example))
        self.are_tensors = [isinstance(leaf, Tensor) for leaf in leaves_in(answer)]

    def forward(self, *given: Any) -> tuple[Any, ...]:
        tensors = iter(given)
        answer = call(self.inner, map_tensors(lambda _: next(tensors), self.example))
        if not any(self.are_tensors):
            return tuple(tensors_in(answer))
        return tuple(itertools.compress(leaves_in(answer), self.are_tensors))


def _tensors_of(answer: Any) -> list[Tensor]:
    try:
        return answers_in(answer)
    except GraphError as err:
        raise ExportError(f"{err} ONNX has tensors only.") from err


def _without_prefix(content: bytes, prefix: str) -> bytes:
    """`content`, in which no tensor's name begins with `prefix`."""
    model = onnx.load_from_string(content)
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.removeprefix(prefix)
    for node in model.graph.node:
        node.input[:] = [name.removeprefix(prefix) for name in node.input]
    renamed: bytes = model.SerializeToString()
    return renamed


def _small_letters(content: bytes) -> bytes:
    """`content` with Einsum equations in a, b, c, ...; NVIDIA's parser takes no capitals."""
    model = onnx.load_from_string(content)
    for node in model.graph.node:
        if node.op_type == "Einsum":
            equation = attribute(node, "equation")
            text = equation.s.decode()
            letters = dict.fromkeys(c for c in text if c.isalpha())
            small = dict(zip(letters, string.ascii_lowercase, strict=False))
            if len(small) == len(letters):
                equation.s = "".join(small.get(c, c) for c in text).encode()
    renamed: bytes = model.SerializeToString()
    return renamed


def names_in(example: Example) -> list[str]:
    """What the file calls inputs: `input`; or `input_0`, `input_1`, ...; or as arguments are."""
    if isinstance(example, Tensor):
        return [INPUT]
    if isinstance(example, dict):
        parts = example.items()
    else:
        parts = {f"{INPUT}_{i}": each for i, each in enumerate(example)}.items()
    found = []
    for name, part in parts:
        n_leaves = len(_inputs(part))
        found += [name] if n_leaves == 1 else [f"{name}_{i}" for i in range(n_leaves)]
    return found


def _ordered(model: nn.Module, example: Example) -> Example:
    return in_order(model, example) if isinstance(example, dict) else example


def in_order(model: nn.Module, example: dict[str, Any]) -> dict[str, Any]:
    """The inputs in the order of the forward pass's parameters, as the exporter writes them."""
    bound = inspect.signature(model.forward).bind(**example)
    return {name: example[name] for name in (*bound.arguments, *bound.kwargs) if name in example}


def inputs_in(model: nn.Module, example: Example) -> list[Tensor]:
    """The tensors of an example in the order of the file's inputs; Python's numbers are inputs."""
    return [
        leaf.detach() if isinstance(leaf, Tensor) else torch.tensor(leaf)
        for leaf in _inputs(_ordered(model, example))
    ]


def whole_inputs(model: nn.Module, example: Example) -> dict[str, Any]:
    """Name in the file -> value, of every input of whole numbers, as NumPy arrays."""
    names = names_in(_ordered(model, example))
    named = dict(zip(names, inputs_in(model, example), strict=True))
    return {name: t.numpy() for name, t in named.items() if not t.is_floating_point()}


def _inputs(example: Any) -> list[Any]:
    leaves = torch.utils._pytree.tree_leaves(example)
    return [leaf for leaf in leaves if isinstance(leaf, (Tensor, bool, int, float))]
