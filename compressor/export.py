"""Model -> ONNX, and candidate ONNX from a template.

Exporting takes 0.1-0.7 s a model; filling a template a few milliseconds. A template is the
original network exported once with batch-norm left in place, so that its initialisers carry the
names of the state_dict; a candidate is the same graph with the candidate's tensors. ONNX Runtime
folds batch-norm when it loads a file, so template and export run the same kernels.
"""

import copy
import logging
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn

from compressor.containers import answers_in, map_tensors
from compressor.errors import ExportError, MeasurementError
from compressor.exporter import attribute, exported, inputs_in
from compressor.files import write_whole
from compressor.latency.onnxruntime import answers_of
from compressor.running import cloned
from compressor.values import FORWARD_FAILURES, Branch, Example, call

DEFAULT_OPSET = 13
MARK = "branch_mark_"
# Of a number, and of the largest beside it: what sums in another order cost in deep networks.
TOLERANCE, OF_LARGEST = 1e-3, 2e-4
MAX_ELSEWHERE = 0.01  # of whole numbers: positions of equal values, roundings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class OnnxTemplate:
    """A network's graph without its tensors.

    Attributes:
        graph: The exported model; its initialisers only lend their names.
        names: state_dict names of the initialisers.
        grouped: Names of the weights of convolutions whose `group` is that of their module.
        sums: Node of the fx graph that adds a residual branch -> position of its ONNX node, and
            which of its inputs is the branch.
    """

    graph: onnx.ModelProto
    names: tuple[str, ...]
    grouped: frozenset[str]
    sums: Mapping[str, tuple[int, int]]

    def fill(self, model: nn.Module) -> bytes:
        """ONNX file of `model`, a pruned version of the network the template was made from."""
        filled = onnx.ModelProto()
        filled.CopyFrom(self.graph)
        if self.sums:
            assert isinstance(model, fx.GraphModule)
            left = {node.name for node in model.graph.nodes}
            _bypass(filled.graph, [at for name, at in self.sums.items() if name not in left])
        used = {name for node in filled.graph.node for name in node.input}
        tensors = model.state_dict()
        for name in self.names:
            if name in used:
                value = tensors[name].detach().cpu().numpy()
                filled.graph.initializer.append(numpy_helper.from_array(value, name))
        for node in filled.graph.node:
            if len(node.input) > 1 and node.input[1] in self.grouped:
                owner = model.get_submodule(node.input[1].rpartition(".")[0])
                assert isinstance(owner.groups, int)
                attribute(node, "group").i = owner.groups
        content: bytes = filled.SerializeToString()
        return content


def candidate_writer(
    model: nn.Module,
    example_input: Example,
    pruned: nn.Module,
    *,
    opset: int = DEFAULT_OPSET,
    branches: Sequence[Branch] = (),
) -> Callable[[nn.Module], bytes]:
    """What turns pruned versions of `model` into ONNX files: its template where that is exact.

    A template fits unless sizes that follow the widths are written into the graph. Which it is,
    is tried: filled with `pruned` it must be byte for byte what a fresh export of `pruned` is.

    Args:
        model: In eval mode.
        example_input: As the model takes it, of the batch size wanted.
        pruned: `model` with channels removed from every group.
        opset: Operator set.
        branches: Residual branches that versions may lack; `pruned` has them all.

    Raises:
        ExportError: `model` or `pruned` cannot be exported at all.
    """
    try:
        template = make_template(model, example_input, opset=opset, branches=branches)
        fresh = make_template(pruned, example_input, opset=opset, branches=branches)
    except ExportError as err:
        logger.info("candidates are exported one by one: %s", err)
    else:
        if template.fill(pruned) == fresh.fill(pruned):
            return template.fill
        logger.info("candidates are exported one by one: the graph has sizes written into it")
    return lambda candidate: exported(candidate, example_input, opset, fold=True)


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
            opset, a newer IR, or tensors in a second file, or answers unlike the network.
    """
    opset = DEFAULT_OPSET if opset is None else opset
    content = exported(model, example_input, opset, fold=True)
    written = onnx.load_from_string(content)
    try:
        onnx.checker.check_model(written, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        reason = str(err).splitlines()[0]
        raise ExportError(
            f"{type(model).__name__} gives an ONNX file that is not valid: {reason}"
        ) from err
    opsets = {entry.domain: entry.version for entry in written.opset_import}
    if opsets.get("") != opset:
        raise ExportError(f"Asked for ONNX opset {opset}; the exporter wrote {opsets}.")
    if max_ir is not None and written.ir_version > max_ir:
        raise ExportError(f"The file has IR version {written.ir_version}; expected <= {max_ir}.")
    if any(tensor.external_data for tensor in written.graph.initializer):
        raise ExportError("The exporter put tensors into a second file; expected one file.")
    _check_answers(model, example_input, content)
    return write_whole(path, content)


def _check_answers(model: nn.Module, example: Example, content: bytes) -> None:
    """Raises `ExportError` where ONNX Runtime does not answer as the network does.

    The exporter drops what it does not follow (writes into views of tensors, ways that the code
    did not take for the example) without a word. What is compared is the example, and numbers
    drawn between its least and its largest, so that an example of zeros tells something too.
    """
    name = type(model).__name__
    generator = torch.Generator().manual_seed(0)
    drawn = map_tensors(partial(_drawn_like, generator), example)
    n_compared, of_whole = 0, []  # faults of whole numbers: of equal values any may be the largest
    for given in (example, drawn):
        try:
            with torch.no_grad():
                want = answers_in(call(model, cloned(given)))
        except FORWARD_FAILURES:
            if given is example:
                raise
            logger.info("%s takes no drawn numbers; the example alone is compared", name)
            continue
        try:
            ways = list(answers_of(content, inputs_in(model, given)))
        except MeasurementError as err:
            raise ExportError(f"{name}, written to ONNX, could not be run: {err}") from err
        have = next((way for way in ways if _agree(want, way)), ways[0])
        kinds = [[(tuple(t.shape), t.dtype) for t in side] for side in (want, have)]
        if kinds[0] != kinds[1]:
            raise ExportError(
                f"{name}, written to ONNX, returns {_told(have)}; expected {_told(want)}, as in "
                f"torch."
            )
        n_compared += 1
        faults = [(t, _difference(t.detach(), o)) for t, o in zip(want, have, strict=True)]
        of_whole += [fault for t, fault in faults if fault and not t.is_floating_point()][:1]
        others = [fault for t, fault in faults if fault and t.is_floating_point()]
        if others:
            raise ExportError(_unlike(name, others[0]))
    if of_whole and len(of_whole) == n_compared:
        raise ExportError(_unlike(name, of_whole[0]))


def _agree(want: Sequence[Tensor], have: Sequence[Tensor]) -> bool:
    pairs = zip(want, have, strict=False)
    return len(want) == len(have) and all(
        one.shape == other.shape and _difference(one.detach(), other) is None
        for one, other in pairs
    )


def _difference(want: Tensor, have: Tensor) -> str | None:
    """How two answers differ by more than sums in another order do; None where they do not."""
    if not want.is_floating_point() and not want.is_complex():
        share = float((want != have).double().mean()) if want.numel() else 0.0
        off = share > MAX_ELSEWHERE  # of equal values another one may be the largest
        return f"{share:.0%} of its whole numbers are others" if off else None
    finite = want.isfinite()
    if not torch.equal(finite, have.isfinite()):
        return "other numbers are NaN or infinite"
    want, have = want[finite].double(), have[finite].double()
    if not want.numel():
        return None
    errors, sizes = (want - have).abs(), want.abs()
    allowed = TOLERANCE * sizes + OF_LARGEST * sizes.max()
    worst = int((errors - allowed).argmax())
    if errors[worst] <= allowed[worst]:
        return None
    return f"{have[worst]:.5g} where it should be {want[worst]:.5g}"


def _unlike(name: str, fault: str) -> str:
    return (
        f"{name}, written to ONNX, answers unlike it does in torch: {fault}. Its forward pass may "
        f"write into a part of a tensor, choose by values, or draw at random. No file was written."
    )


def _told(answers: Sequence[Tensor]) -> str:
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in answers) or "nothing"


def _drawn_like(generator: torch.Generator, tensor: Tensor) -> Tensor:
    if not tensor.numel() or tensor.is_complex() or tensor.dtype == torch.bool:
        return tensor
    least, most = float(tensor.min()), float(tensor.max())
    if not tensor.is_floating_point():
        if tensor.dtype == torch.uint8:
            least, most = 0.0, 255.0
        drawn = torch.randint(int(least), int(most) + 1, tensor.shape, generator=generator)
        return drawn.to(tensor.dtype)
    if not math.isfinite(least) or not math.isfinite(most):
        return tensor
    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    return (drawn * ((most - least) or 1.0) + least).to(tensor.dtype)


def make_template(
    model: nn.Module,
    example_input: Example,
    *,
    opset: int = DEFAULT_OPSET,
    branches: Sequence[Branch] = (),
) -> OnnxTemplate:
    """The graph that every pruned version of `model` shares, for the example's batch size.

    Raises:
        ExportError: The exporter renamed a tensor, so that it could not be filled in, or a
            branch could not be found in what it wrote.
    """
    unique = _with_marks(model, branches).eval()
    with torch.no_grad():  # equal tensors would be written once, under one of their names
        for tensor in unique.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    written = onnx.load_from_string(exported(unique, example_input, opset, fold=False))
    sums = _take_marks_out(written.graph, branches)
    used = {name for node in written.graph.node for name in node.input}
    names = tuple(t.name for t in written.graph.initializer if t.name in used)
    renamed = sorted(set(names) - set(model.state_dict()))
    if renamed:
        raise ExportError(
            f"{type(model).__name__} has tensors that are computed in its forward pass "
            f"({', '.join(renamed[:5])}), so candidates cannot be filled into one ONNX graph."
        )
    layers = {f"{name}.weight": layer for name, layer in model.named_modules()}
    grouped = frozenset(
        node.input[1]
        for node in written.graph.node
        if node.op_type in ("Conv", "ConvTranspose")
        and isinstance(layers.get(node.input[1]), nn.modules.conv._ConvNd)
        and attribute(node, "group").i > 1
    )
    del written.graph.initializer[:]
    del written.graph.value_info[:]
    return OnnxTemplate(written, names, grouped, sums)


def _with_marks(model: nn.Module, branches: Sequence[Branch]) -> nn.Module:
    """A copy in which every branch is multiplied by a buffer of its own, to be found in ONNX."""
    marked = copy.deepcopy(model)
    if branches:
        assert isinstance(marked, fx.GraphModule)
        nodes = {node.name: node for node in marked.graph.nodes}
        for i, branch in enumerate(branches):
            node, mark = nodes[branch.node], f"{MARK}{i}"
            marked.register_buffer(mark, torch.ones(1))
            term = node.args[branch.argument]
            with marked.graph.inserting_before(node):
                scaled = marked.graph.call_function(
                    operator.mul, (term, marked.graph.get_attr(mark))
                )
            node.update_arg(branch.argument, scaled)
        marked.recompile()
    return marked


def _take_marks_out(
    graph: onnx.GraphProto, branches: Sequence[Branch]
) -> dict[str, tuple[int, int]]:
    """Removes the marks in place; the sum's fx node -> its ONNX node, and the branch's input."""
    sums: dict[str, tuple[int, int]] = {}
    found: dict[int, tuple[onnx.NodeProto, int]] = {}
    for i, branch in enumerate(branches):
        marks = [node for node in graph.node if f"{MARK}{i}" in node.input]
        totals = [n for n in graph.node if marks and marks[0].output[0] in n.input]
        if len(marks) != 1 or len(totals) != 1 or totals[0].op_type != "Add":
            raise ExportError(f"The branch {branch.name} cannot be told apart in ONNX.")
        (mark,), (total,) = marks, totals
        at = list(total.input).index(mark.output[0])
        total.input[at] = next(name for name in mark.input if name != f"{MARK}{i}")
        graph.node.remove(mark)
        found[i] = total, at
    positions = {node.output[0]: position for position, node in enumerate(graph.node)}
    for i, (total, at) in found.items():
        sums[branches[i].node] = positions[total.output[0]], at
    return sums


def _bypass(graph: onnx.GraphProto, sums: Sequence[tuple[int, int]]) -> None:
    """Leaves branches out: what read a sum reads its other term, and unused nodes go."""
    outputs = {value.name for value in graph.output}
    instead: dict[str, str] = {}
    for position, at in sums:
        total = graph.node[position]
        if total.output[0] in outputs:
            total.op_type = "Identity"
            del total.input[at]
        else:
            instead[total.output[0]] = total.input[1 - at]
    needed = outputs
    for position in reversed(range(len(graph.node))):
        node = graph.node[position]
        for i, name in enumerate(node.input):
            while name in instead:
                name = instead[name]
            node.input[i] = name
        if needed.isdisjoint(node.output):
            del graph.node[position]
        else:
            needed.update(node.input)
