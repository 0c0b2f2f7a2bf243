"""Model -> ONNX, and candidate ONNX from a template.

Exporting takes 0.1-0.7 s a model; filling a template a few milliseconds. A template is the
original network exported once with batch-norm left in place, so that its initialisers carry the
names of the state_dict; a candidate is the same graph with the candidate's tensors. ONNX Runtime
folds batch-norm when it loads a file, so template and export run the same kernels.

The exporter is torch's TorchScript-based one: of the two it is the one that can write opset 13,
the newest that TensorRT 8.2 (Jetson Nano) reads. The other silently writes 18.
"""

import contextlib
import copy
import io
import logging
import os
import string
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import nn
from torch.onnx import symbolic_opset14, utils

from compressor.errors import ExportError
from compressor.values import Example

INPUT, OUTPUT = "input", "output"
DEFAULT_OPSET = 13
ATTENTION_OPSET = 14

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class OnnxTemplate:
    """A network's graph without its tensors.

    Attributes:
        graph: The exported model; its initialisers only lend their names.
        names: state_dict names of the initialisers.
        grouped: Positions of convolutions whose `group` is that of their module.
    """

    graph: onnx.ModelProto
    names: tuple[str, ...]
    grouped: tuple[int, ...]

    def fill(self, model: nn.Module) -> bytes:
        """ONNX file of `model`, a pruned version of the network the template was made from."""
        filled = onnx.ModelProto()
        filled.CopyFrom(self.graph)
        tensors = model.state_dict()
        for name in self.names:
            value = tensors[name].detach().cpu().numpy()
            filled.graph.initializer.append(numpy_helper.from_array(value, name))
        for position in self.grouped:
            node = filled.graph.node[position]
            owner = model.get_submodule(node.input[1].rpartition(".")[0])
            assert isinstance(owner.groups, int)
            _attribute(node, "group").i = owner.groups
        content: bytes = filled.SerializeToString()
        return content


def candidate_writer(
    model: nn.Module, example_input: Example, pruned: nn.Module, *, opset: int = DEFAULT_OPSET
) -> Callable[[nn.Module], bytes]:
    """What turns pruned versions of `model` into ONNX files: its template where that is exact.

    A template fits unless sizes that follow the widths are written into the graph. Which it is,
    is tried: filled with `pruned` it must be byte for byte what a fresh export of `pruned` is.

    Args:
        model: In eval mode.
        example_input: As the model takes it, of the batch size wanted.
        pruned: `model` with channels removed from every group.
        opset: Operator set.

    Raises:
        ExportError: `model` or `pruned` cannot be exported at all.
    """
    try:
        template = make_template(model, example_input, opset=opset)
        fresh = make_template(pruned, example_input, opset=opset)
    except ExportError as err:
        logger.info("candidates are exported one by one: %s", err)
    else:
        if template.fill(pruned) == fresh.fill(pruned):
            return template.fill
        logger.info("candidates are exported one by one: the graph has sizes written into it")
    return lambda candidate: _export(candidate, example_input, opset, fold=True)


def export_onnx(
    model: nn.Module,
    example_input: Example,
    path: Path,
    *,
    opset: int | None = None,
    max_ir: int | None = None,
) -> Path:
    """Writes `model` as one ONNX file with the example's static shape, batch-norm folded.

    Args:
        model: In eval mode; it is not changed.
        example_input: `(batch, c, h, w)`; a tuple or dict where the model takes several inputs.
        path: Written whole or not at all.
        opset: Operator set, checked in what was written; None takes `DEFAULT_OPSET`.
        max_ir: Newest IR version of the file format that its reader knows; None takes any.

    Returns:
        `path`.

    Raises:
        ExportError: The network has an operation that ONNX lacks, or what came out has another
            opset, a newer IR, or tensors in a second file.
    """
    opset = DEFAULT_OPSET if opset is None else opset
    content = _export(model, example_input, opset, fold=True)
    written = onnx.load_from_string(content)
    onnx.checker.check_model(written, full_check=True)
    opsets = {entry.domain: entry.version for entry in written.opset_import}
    if opsets.get("") != opset:
        raise ExportError(f"Asked for ONNX opset {opset}; the exporter wrote {opsets}.")
    if max_ir is not None and written.ir_version > max_ir:
        raise ExportError(f"The file has IR version {written.ir_version}; expected <= {max_ir}.")
    if any(tensor.external_data for tensor in written.graph.initializer):
        raise ExportError("The exporter put tensors into a second file; expected one file.")
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


def make_template(
    model: nn.Module, example_input: Example, *, opset: int = DEFAULT_OPSET
) -> OnnxTemplate:
    """The graph that every pruned version of `model` shares, for the example's batch size.

    Raises:
        ExportError: The exporter renamed a tensor, so that it could not be filled in.
    """
    unique = copy.deepcopy(model).eval()
    with torch.no_grad():  # equal tensors would be written once, under one of their names
        for tensor in unique.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    exported = onnx.load_from_string(_export(unique, example_input, opset, fold=False))
    names = tuple(tensor.name for tensor in exported.graph.initializer)
    renamed = sorted(set(names) - set(model.state_dict()))
    if renamed:
        raise ExportError(
            f"{type(model).__name__} has tensors that are computed in its forward pass "
            f"({', '.join(renamed[:5])}), so candidates cannot be filled into one ONNX graph."
        )
    layers = {f"{name}.weight": layer for name, layer in model.named_modules()}
    grouped = tuple(
        position
        for position, node in enumerate(exported.graph.node)
        if node.op_type in ("Conv", "ConvTranspose")
        and isinstance(layers.get(node.input[1]), nn.modules.conv._ConvNd)
        and _attribute(node, "group").i > 1
    )
    del exported.graph.initializer[:]
    del exported.graph.value_info[:]
    return OnnxTemplate(exported, names, grouped)


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


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    found: onnx.AttributeProto = next(a for a in node.attribute if a.name == name)
    return found


def _export(model: nn.Module, example_input: Example, opset: int, *, fold: bool) -> bytes:
    buffer: Any = io.BytesIO()  # works, though torch's annotation names paths only
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    args, kwargs = ((), example_input) if isinstance(example_input, dict) else (args, None)
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
                model, args, buffer, kwargs=kwargs, dynamo=False, opset_version=opset,
                input_names=[INPUT], output_names=[OUTPUT], training=mode,
                do_constant_folding=fold,
            )  # fmt: skip
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError, ValueError) as err:
        raise ExportError(
            f"{type(model).__name__} cannot be exported to ONNX opset {opset}: "
            f"{str(err).splitlines()[0].partition('[Caused by')[0].strip()}"
        ) from err
    content: bytes = buffer.getvalue()
    return _small_letters(content) if b"Einsum" in content else content


def _small_letters(content: bytes) -> bytes:
    """`content` with Einsum equations in a, b, c, ...; NVIDIA's parser takes no capitals."""
    model = onnx.load_from_string(content)
    for node in model.graph.node:
        if node.op_type == "Einsum":
            equation = _attribute(node, "equation")
            text = equation.s.decode()
            letters = dict.fromkeys(c for c in text if c.isalpha())
            small = dict(zip(letters, string.ascii_lowercase, strict=False))
            if len(small) == len(letters):
                equation.s = "".join(small.get(c, c) for c in text).encode()
    renamed: bytes = model.SerializeToString()
    return renamed
