"""A network as a torch.export program whose layers are nn layers again.

A program is an fx graph of ATen operations with every size written out, so surgery can rewrite
the sizes that user code has hard-coded (`x.view(-1, 256)`, `torch.split(x, [16, 48], 1)`). The
convolutions, norms and dropouts in it become `nn` modules again under their old names: batch-norm
can then be recalibrated and trained, and the state_dict keeps its keys.
"""

import copy
import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from compressor.errors import GraphError, ModelError
from compressor.values import Example, call

aten = torch.ops.aten
_CONVOLUTIONS: dict[Any, type[nn.Module]] = {
    aten.conv1d.default: nn.Conv1d, aten.conv2d.default: nn.Conv2d,
    aten.conv3d.default: nn.Conv3d, aten.conv_transpose1d.default: nn.ConvTranspose1d,
    aten.conv_transpose2d.input: nn.ConvTranspose2d,
    aten.conv_transpose3d.input: nn.ConvTranspose3d,
}  # fmt: skip
_CORE_CONVOLUTIONS: dict[tuple[int, bool], type[nn.Module]] = {  # (dimensions, transposed)
    (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d,
}  # fmt: skip
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def export_program(model: nn.Module, example: Example) -> fx.GraphModule:
    """`model` as a program for any batch size, in eval mode; the model is not changed.

    Raises:
        GraphError: torch.export cannot follow its code; the message has its reason.
    """
    pair = _doubled(example)
    args, kwargs = (pair, {}) if isinstance(pair, tuple) else ((pair,), {})
    if isinstance(pair, dict):
        args, kwargs = (), pair
    sizes = torch.utils._pytree.tree_map(
        lambda value: {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) else None,
        kwargs or tuple(args),
    )
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # it tells of its own internals
            program = torch.export.export(
                copy.deepcopy(model), args, kwargs, dynamic_shapes=sizes, strict=False
            )
    except Exception as err:
        reason = str(err).strip().splitlines()
        raise GraphError(
            f"{type(model).__name__} cannot be exported by torch.export: "
            f"{reason[0] if reason else type(err).__name__}"
        ) from err
    return with_layers(program.module(check_guards=False))


def with_layers(program: nn.Module) -> fx.GraphModule:
    """A copy of an exported program in which layers are nn modules with their old names.

    Raises:
        ModelError: The program was exported in training mode.
    """
    assert isinstance(program, fx.GraphModule)
    root = copy.deepcopy(program)
    for node in list(root.graph.nodes):
        if node.op != "call_function":
            continue
        made = _layer(root, node)
        if made is not None:
            path, layer, source = made
            if path and path in dict(root.named_modules()) and not _is_bare(root, path, layer):
                continue
            root.set_submodule(path, layer)
            with root.graph.inserting_before(node):
                replacement = root.graph.call_module(path, (source,))
            replacement.meta = dict(node.meta)
            if node.target is aten._native_batch_norm_legit_no_training.default:
                for user in list(node.users):
                    assert user.target is operator.getitem
                    user.replace_all_uses_with(replacement)
                    root.graph.erase_node(user)
            node.replace_all_uses_with(replacement)
            root.graph.erase_node(node)
    for node in list(root.graph.nodes):
        if node.op == "get_attr" and not node.users:
            root.graph.erase_node(node)
    return fx.GraphModule(root, root.graph).eval()


def free_batch(program: fx.GraphModule, example: Example) -> fx.GraphModule:
    """A copy that takes any batch size, where sizes were written out for one.

    Raises:
        ModelError: It takes only the batch size that it was exported with.
    """
    freed = copy.deepcopy(program)
    n_static = next(
        int(node.meta["val"].shape[0]) for node in freed.graph.nodes if node.op == "placeholder"
    )
    for node in freed.graph.nodes:
        if node.target not in _RESHAPES:
            continue
        sizes = list(node.args[1])
        if sizes and sizes[0] == n_static and -1 not in sizes:
            node.update_arg(1, [-1, *sizes[1:]])
    freed.recompile()
    pair = _doubled(example)
    try:
        with torch.no_grad():
            once, twice = call(freed, example), call(freed, pair)
        leaves = zip(_leaves(once), _leaves(twice), strict=True)
        fits = all(torch.allclose(torch.cat([a, a]), b, rtol=1e-3, atol=1e-4) for a, b in leaves)
    except RuntimeError:
        fits = False
    if not fits:
        raise ModelError(
            f"The program takes batches of {n_static} only. Export it for any batch: "
            f"torch.export.export(model, (example,), dynamic_shapes=({{0: Dim('batch')}},))."
        )
    return freed


def _layer(root: fx.GraphModule, node: fx.Node) -> tuple[str, nn.Module, fx.Node] | None:
    """(name, nn module, input node) for a node that a layer of its own stands for."""
    source, *_ = node.args or (None,)
    if not isinstance(source, fx.Node):
        return None
    if node.target is aten.dropout.default:
        _, rate, is_training = node.args
        _refuse_training(bool(is_training))
        assert isinstance(rate, float)
        return f"{node.name}_layer", nn.Dropout(rate), source
    given = _arguments(node)
    owned = {
        key: str(value.target)
        for key, value in given.items()
        if isinstance(value, fx.Node) and value.op == "get_attr"
    }
    paths = {name.rpartition(".")[0] for name in owned.values()}
    named = all(name.rpartition(".")[2] == key for key, name in owned.items())
    if len(paths) != 1 or not named or "" in paths or "weight" not in owned:
        return None
    tensors = {key: _get(root, name) for key, name in owned.items()}
    layer = _with_options(node, given, tensors)
    if layer is None:
        return None
    (path,) = paths
    tracked = f"{path}.num_batches_tracked"
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and _has(root, tracked):
        tensors["num_batches_tracked"] = _get(root, tracked)
    for key, tensor in tensors.items():
        setattr(layer, key, tensor)
    return path, layer, source


def _with_options(
    node: fx.Node, given: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> nn.Module | None:
    """The layer with the node's options and no tensors of its own yet; None for other nodes."""
    weight, has_bias = tensors["weight"], "bias" in tensors
    kind, n_dims = _CONVOLUTIONS.get(node.target), weight.ndim - 2
    is_transposed = bool(given.get("transposed", "output_padding" in given))
    if node.target is aten.convolution.default:
        kind = _CORE_CONVOLUTIONS[n_dims, is_transposed]
    if kind is not None and isinstance(given["padding"], (list, tuple)):
        n_in, n_out = weight.shape[0], weight.shape[1] * given["groups"]
        if not is_transposed:
            n_in, n_out = weight.shape[1] * given["groups"], weight.shape[0]
        names = ("stride", "padding", "dilation", *(["output_padding"] * is_transposed))
        options = {name: _per_dim(given[name], n_dims) for name in names}
        return kind(
            n_in, n_out, tuple(weight.shape[2:]), groups=given["groups"], bias=has_bias,
            device="meta", **options,
        )  # fmt: skip
    if node.target is aten.linear.default:
        return nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias, device="meta")
    if node.target is aten.group_norm.default:
        return nn.GroupNorm(given["num_groups"], len(weight), given["eps"], device="meta")
    if node.target in (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default):
        if not {"weight", "bias", "running_mean", "running_var"} <= tensors.keys():
            return None
        _refuse_training(bool(given.get("training", False)))
        norm = _BATCH_NORMS[node.args[0].meta["val"].ndim]  # type: ignore[union-attr]
        return norm(len(weight), given["eps"], given["momentum"], device="meta")
    return None


def _refuse_training(is_training: bool) -> None:
    if is_training:
        raise ModelError(
            "The program was exported in training mode; call model.eval() before torch.export."
        )


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by the names of its schema, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    schema = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in schema}
    given.update({a.name: value for a, value in zip(schema, node.args, strict=False)})
    given.update(node.kwargs)
    return given


def _is_bare(root: fx.GraphModule, path: str, layer: nn.Module) -> bool:
    """Whether the module at `path` holds nothing but the tensors of `layer`, or is one like it."""
    found = root.get_submodule(path)
    if type(found) is type(layer):
        return repr(found) == repr(layer)
    names = {name for name, _ in (*found.named_parameters(), *found.named_buffers())}
    return not list(found.children()) and names <= set(layer.state_dict())


def _per_dim(value: Any, n_dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * n_dims if len(values) == 1 else values


def _get(root: nn.Module, name: str) -> Tensor:
    path, _, tensor = name.rpartition(".")
    value = getattr(root.get_submodule(path), tensor)
    assert isinstance(value, Tensor)
    return value


def _has(root: nn.Module, name: str) -> bool:
    path, _, tensor = name.rpartition(".")
    return hasattr(root.get_submodule(path), tensor)


def _doubled(example: Example) -> Example:
    """The example twice along the batch; one example would be taken for a fixed size."""
    doubled: Example = torch.utils._pytree.tree_map(
        lambda value: torch.cat([value, value]) if isinstance(value, Tensor) else value, example
    )
    return doubled


def _leaves(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
