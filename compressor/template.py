"""Candidate ONNX from a template: the original's graph, with a candidate's tensors.

Exporting takes 0.1-0.7 s a model, and seconds by torch's second exporter; filling a template a few
milliseconds. A template is the original network exported once with batch-norm left in place, so
that its initialisers carry the names of the state_dict; a candidate is the same graph with the
candidate's tensors. ONNX Runtime folds batch-norm when it loads a file, so template and export run
the same kernels.
"""

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch
from onnx import numpy_helper
from torch import fx, nn

from compressor.errors import ExportError
from compressor.exporter import Way, attribute, written
from compressor.running import cloned
from compressor.values import Branch, Example, call

MARK = "branch_mark_"


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


def make_template(
    model: nn.Module,
    example_input: Example,
    *,
    way: Way = Way(),  # noqa: B008  it is frozen
    branches: Sequence[Branch] = (),
) -> OnnxTemplate:
    """The graph that every pruned version of `model` shares, for the example's batch size.

    Args:
        model: In eval mode.
        example_input: As the model takes it.
        way: How it is exported.
        branches: Residual branches that versions may lack.

    Raises:
        ExportError: The exporter renamed a tensor, so that it could not be filled in, or a
            branch could not be found in what it wrote.
    """
    unique = _with_marks(model, branches).eval()
    with torch.no_grad():  # equal tensors would be written once, under one of their names
        answer = call(model, cloned(example_input))
        for tensor in unique.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    file = onnx.load_from_string(written(unique, example_input, answer, way, fold=False))
    sums = _take_marks_out(file.graph, branches)
    used = {name for node in file.graph.node for name in node.input}
    names = tuple(t.name for t in file.graph.initializer if t.name in used)
    renamed = sorted(set(names) - set(model.state_dict()))
    if renamed:
        raise ExportError(
            f"{type(model).__name__} has tensors that are computed in its forward pass "
            f"({', '.join(renamed[:5])}), so candidates cannot be filled into one ONNX graph."
        )
    layers = {f"{name}.weight": layer for name, layer in model.named_modules()}
    grouped = frozenset(
        node.input[1]
        for node in file.graph.node
        if node.op_type in ("Conv", "ConvTranspose")
        and isinstance(layers.get(node.input[1]), nn.modules.conv._ConvNd)
        and attribute(node, "group").i > 1
    )
    del file.graph.initializer[:]
    del file.graph.value_info[:]
    return OnnxTemplate(file, names, grouped, sums)


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
