"""torch's second ONNX exporter: its file, and what it is known to lack before it is asked.

It follows torch.export: the network is captured, decomposed and translated, a CPU second or more a
hundred layers, before it says that it has no word for an operation.
"""

from functools import cache
from typing import Any

import onnx.inliner
import torch
from torch import nn

OUTPUT = "output"  # what the file calls it, of one


def lacks(operation: str) -> bool:
    """Whether it surely cannot write an operation, as `aten::histc`.

    It has no function for it, torch no decomposition, and it is not made of other operations.
    What is not known to torch by that name may be written under another one.
    """
    namespace, _, name = operation.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.rstrip("_"), None) if name else None
    known = _known()
    if packet is None or not known:
        return False
    kinds = [getattr(packet, overload) for overload in packet.overloads()]
    return not any(kind.name() in known or kind._can_decompose() for kind in kinds)


@cache
def _known() -> frozenset[str]:
    """Operations that it has a function for, or that are decomposed first; empty if not told."""
    try:  # not public; and it takes a second to import
        from torch.onnx._internal.exporter import _decomp, _registration
    except ImportError:
        return frozenset()
    registry = _registration.ONNXRegistry.from_torchlib()
    decomposed = _decomp.create_onnx_friendly_decomposition_table(set())
    return frozenset(
        each if isinstance(each, str) else each.name()
        for each in (*registry.functions, *decomposed)
        if isinstance(each, (str, torch._ops.OpOverload))
    )


def by_second(
    model: nn.Module, args: Any, kwargs: Any, names: list[str], opset: int, fold: bool
) -> bytes:
    """The file; see `compressor.exporter.written`."""
    program = torch.onnx.export(
        model, args, kwargs=kwargs, dynamo=True, opset_version=opset, input_names=names,
        output_names=[OUTPUT], optimize=fold, verbose=False,
    )  # fmt: skip
    assert program is not None
    file = onnx.inliner.inline_local_functions(program.model_proto)
    used = {node.domain for node in file.graph.node}
    imports = [each for each in file.opset_import if not each.domain or each.domain in used]
    del file.opset_import[:]
    file.opset_import.extend(imports)
    if [each.version for each in imports if not each.domain] != [opset]:
        written_as = [(each.domain, each.version) for each in imports]
        raise RuntimeError(f"torch's second exporter wrote opsets {written_as} instead")
    for part in (file, file.graph, *file.graph.node, *file.graph.value_info):
        del part.metadata_props[:]  # of code and paths on this machine; newer than the IR needed
    for part in (*file.graph.input, *file.graph.output, *file.graph.initializer):
        del part.metadata_props[:]
    file.ir_version = onnx.helper.find_min_ir_version_for(imports)
    content: bytes = file.SerializeToString()
    return content
