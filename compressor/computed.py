"""Weights and biases that a program computes from parameters alone, as the numbers they are."""

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, fx, nn


def compute_weights(root: fx.GraphModule, layers: Container[Any]) -> None:
    """Replaces weights and biases computed from parameters alone by their values, in place.

    Args:
        root: A program; changed.
        layers: Operations whose second argument is a weight, and whose third a bias.
    """
    constant: set[fx.Node] = set()
    for node in list(root.graph.nodes):
        inputs = node.all_input_nodes
        is_function = node.op == "call_function" and bool(inputs)
        if (node.op == "get_attr" or is_function) and all(each in constant for each in inputs):
            constant.add(node)
            continue
        for place, name in ((1, "weight"), (2, "bias")) if node.target in layers else ():
            value = node.args[place] if place < len(node.args) else None
            if isinstance(value, fx.Node) and value in constant and value.op != "get_attr":
                _store(root, node, value, name, constant)
    for node in reversed(root.graph.nodes):
        if node in constant and not node.users:
            root.graph.erase_node(node)


def _store(
    root: fx.GraphModule, layer: fx.Node, made: fx.Node, kind: str, constant: set[fx.Node]
) -> None:
    """Puts the value of `made`, the weight or bias of `layer`, into the graph as a parameter.

    A bias lies beside the weight; a weight beside the parameters it is computed from.
    """
    sources: list[str] = []
    values: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node not in values:
            if node.op == "get_attr":
                sources.append(str(node.target))
                values[node] = tensor_of(root, str(node.target))
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
                assert callable(node.target)
                values[node] = node.target(*args, **kwargs)
        return values[node]

    with torch.no_grad():
        computed = value(made).detach().clone()
    weight = layer.args[1]
    if kind == "bias" and isinstance(weight, fx.Node) and weight.op == "get_attr":
        sources.insert(0, str(weight.target))
    owner = sources[0].rpartition(".")[0].partition(".parametrizations")[0]
    name = f"{owner}.{kind}"
    for node in root.graph.nodes:
        if node.op == "get_attr" and node.target == name and not constant.issuperset(node.users):
            return  # the parameter of that name is also used as it is
    module = root.get_submodule(owner)
    if kind in module._parameters or kind in module._buffers:
        delattr(module, kind)
    module.register_parameter(kind, nn.Parameter(computed))
    with root.graph.inserting_before(made):
        stored = root.graph.get_attr(name)
    stored.meta = dict(made.meta)
    made.replace_all_uses_with(stored)


def tensor_of(root: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name in the state_dict."""
    path, _, tensor = name.rpartition(".")
    value = getattr(root.get_submodule(path), tensor)
    assert isinstance(value, Tensor)
    return value
