"""torch's second ONNX exporter, which follows torch.export."""

from typing import Any

import onnx.inliner
import torch
from torch import nn

OUTPUT = "output"  # what the file calls it, of one


def by_second(
    model: nn.Module, args: Any, kwargs: Any, names: list[str], opset: int, fold: bool
) -> bytes:
    """The file; see `compressor.exporter.written`."""
    program = torch.onnx.export(
        model,
        args,
        kwargs=kwargs,
        dynamo=True,
        opset_version=opset,
        input_names=names,
        output_names=[OUTPUT],
        optimize=fold,
        verbose=False,
    )
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
