"""torch's ONNX exporter, and what it needs around it.

It is the TorchScript-based one: of the two it is the one that can write opset 13, the newest that
TensorRT 8.2 (Jetson Nano) reads. The other silently writes 18.
"""

import contextlib
import inspect
import io
import os
import string
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.onnx import symbolic_opset14, utils

from compressor.containers import answers_in
from compressor.errors import ExportError
from compressor.running import cloned
from compressor.values import FORWARD_FAILURES, Example, call

INPUT, OUTPUT = "input", "output"
ATTENTION_OPSET = 14


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Where the exporter fails it prints the whole graph from C++ to file descriptor 1."""
    if sys.stdout is None:  # closed by the caller
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    """The attribute of a node that has it."""
    found: onnx.AttributeProto = next(a for a in node.attribute if a.name == name)
    return found


def exported(model: nn.Module, example_input: Example, opset: int, *, fold: bool) -> bytes:
    """The ONNX file of `model`, as torch's exporter writes it for `example_input`.

    Args:
        model: In eval mode; it is not changed.
        example_input: As the model takes it.
        opset: Operator set.
        fold: Whether constants are computed and batch-norms folded; the names of the initialisers
            are those of the state_dict otherwise.

    Raises:
        ExportError: The network has an operation that ONNX lacks.
    """
    name = type(model.inner if isinstance(model, _Flat) else model).__name__
    buffer: Any = io.BytesIO()  # works, though torch's annotation names paths only
    with torch.no_grad():
        is_plain = _is_plain(call(model, cloned(example_input)))
    if not is_plain:
        flat = _Flat(model, example_input)
        return _without_prefix(exported(flat, flat.given, opset, fold=fold), "inner.")
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    args, kwargs = ((), example_input) if isinstance(example_input, dict) else (args, None)
    if args and isinstance(args[-1], dict):
        args = (*args, {})  # or the exporter took it for keyword arguments
    if opset < ATTENTION_OPSET:  # torch writes it with operations that older opsets have too
        utils.register_custom_op_symbolic(
            "aten::scaled_dot_product_attention",
            symbolic_opset14.scaled_dot_product_attention,
            opset,
        )
    mode = torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE
    try:
        with warnings.catch_warnings(), _silent_stdout():
            warnings.simplefilter("ignore")  # it announces its own age at every call
            torch.onnx.export(
                model, cloned(args), buffer, kwargs=kwargs, dynamo=False, opset_version=opset,
                input_names=[INPUT], output_names=[OUTPUT], training=mode,
                do_constant_folding=fold,
            )  # fmt: skip
    except (torch.onnx.errors.OnnxExporterError, *FORWARD_FAILURES) as err:
        raise ExportError(
            f"{name} cannot be exported to ONNX opset {opset}: "
            f"{str(err).splitlines()[0].partition('[Caused by')[0].strip()}"
        ) from err
    content: bytes = buffer.getvalue()
    return _small_letters(content) if b"Einsum" in content else content


def _is_plain(output: Any) -> bool:
    """Whether the exporter knows every container in what a network returned."""
    if isinstance(output, dict):
        return all(isinstance(key, str) and _is_plain(each) for key, each in output.items())
    if type(output) in (list, tuple):
        return all(map(_is_plain, output))
    return isinstance(output, Tensor)


class _Flat(nn.Module):
    """A network whose answers are a plain tuple of tensors.

    Attributes:
        given: The example as this takes it, by position.
    """

    def __init__(self, inner: nn.Module, example: Example) -> None:
        super().__init__()
        self.inner = inner
        self.names = list(in_order(inner, example)) if isinstance(example, dict) else []
        by_name = example if isinstance(example, dict) else {}
        self.given: Example = tuple(by_name[name] for name in self.names) if by_name else example
        self.training = inner.training

    def forward(self, *given: Any) -> tuple[Tensor, ...]:
        by_name = dict(zip(self.names, given, strict=False))
        return tuple(answers_in(self.inner(**by_name) if by_name else self.inner(*given)))


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


def in_order(model: nn.Module, example: dict[str, Any]) -> dict[str, Any]:
    """The inputs in the order of the forward pass's parameters, as the exporter writes them."""
    bound = inspect.signature(model.forward).bind(**example)
    return {name: example[name] for name in (*bound.arguments, *bound.kwargs) if name in example}


def inputs_in(model: nn.Module, example: Example) -> list[Tensor]:
    """The tensors of an example in the order of the file's inputs; Python's numbers are inputs."""
    ordered = in_order(model, example) if isinstance(example, dict) else example
    leaves, _ = torch.utils._pytree.tree_flatten(ordered)
    return [
        leaf.detach() if isinstance(leaf, Tensor) else torch.tensor(leaf)
        for leaf in leaves
        if isinstance(leaf, (Tensor, bool, int, float))
    ]
