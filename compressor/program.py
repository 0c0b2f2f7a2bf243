"""A network as a torch.export program whose layers are nn layers again.

A program is an fx graph of ATen operations with every size written out, so surgery can rewrite
the sizes that user code has hard-coded (`x.view(-1, 256)`, `torch.split(x, [16, 48], 1)`). The
convolutions, norms and dropouts in it become `nn` modules again under their old names: batch-norm
can then be recalibrated and trained, and the state_dict keeps its keys. A weight that the code
computes from others (weight norm, standardised convolutions) becomes the numbers it is.
"""

import copy
import logging
import math
import operator
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._export.verifier import SpecViolationError

from compressor.computed import compute_weights, tensor_of
from compressor.errors import GraphError, ModelError
from compressor.running import buffers_kept, cloned
from compressor.values import FORWARD_FAILURES, Example, call

logger = logging.getLogger(__name__)

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
_OTHER_LAYERS = (aten.linear.default, aten.convolution.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)

# Free sizes may take as many times as long as fixed ones, and some seconds in any case:
# torch.export's arithmetic on symbols takes twice as long for most networks, 25 times for some.
FREE_SIZES_TIME, FREE_SIZES_AT_LEAST_S = 2.5, 5.0


def export_program(model: nn.Module, example: Example) -> fx.GraphModule:
    """`model` as a program, in eval mode; the model is not changed.

    It takes any batch size, and images or signals of any size where the model itself does and
    torch.export can say so.

    Raises:
        GraphError: torch.export cannot follow its code; the message has its reason.
    """
    began = time.thread_time()
    larger, fixed = _larger(example), _exported(model, example, None)
    limit_s = max(FREE_SIZES_AT_LEAST_S, FREE_SIZES_TIME * (time.thread_time() - began))
    if _same_answer(fixed, model, larger) or not _takes(model, larger):
        return fixed
    try:
        return _exported(model, example, larger, limit_s)
    except GraphError as err:
        logger.info("%s keeps its input size: %s", type(model).__name__, err)
        return fixed


def _with_limit(model: nn.Module, limit_s: float) -> None:
    """Lets `model` raise, once this thread has computed for longer than `limit_s` seconds."""
    end = time.thread_time() + limit_s

    def look(*_: object) -> None:
        if time.thread_time() > end:
            raise GraphError(f"torch.export takes more than {limit_s:.1f} s for free sizes.")

    for module in model.modules():
        module.register_forward_pre_hook(look)


def _takes(model: nn.Module, example: Example) -> bool:
    try:
        with torch.no_grad(), buffers_kept(model):
            call(model, cloned(example))
    except FORWARD_FAILURES:
        return False
    return True


def _exported(
    model: nn.Module, example: Example, larger: Example | None, limit_s: float = math.inf
) -> fx.GraphModule:
    """The program; for any size of input where `larger` is another that it must answer."""
    copied = copy.deepcopy(model)
    if larger is not None:
        _with_limit(copied, limit_s)
    pair = _doubled(example)
    args, kwargs = (pair, {}) if isinstance(pair, tuple) else ((pair,), {})
    if isinstance(pair, dict):
        args, kwargs = (), pair
    free = torch.export.Dim.AUTO
    sizes = torch.utils._pytree.tree_map(
        lambda value: (
            {dim: free for dim in (0, *(range(2, value.ndim) if larger is not None else ()))}
            if isinstance(value, Tensor)
            else None
        ),
        kwargs or tuple(args),
    )
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # it tells of its own internals
            program = torch.export.export(copied, args, kwargs, dynamic_shapes=sizes, strict=False)
    except (SpecViolationError, *FORWARD_FAILURES) as err:
        reason = str(err).strip().splitlines()
        raise GraphError(
            f"{type(model).__name__} cannot be exported by torch.export: "
            f"{reason[0] if reason else type(err).__name__}"
        ) from err
    layered = with_layers(program.module(check_guards=False))
    for candidate in (layered, _without_batch(layered, len(_leaves(pair)[0]))):
        asked = [example, pair, *([] if larger is None else [larger])]
        if all(_same_answer(candidate, model, each) for each in asked):
            return candidate
    raise GraphError(f"The torch.export program of {type(model).__name__} answers differently.")


def with_layers(program: nn.Module) -> fx.GraphModule:
    """A copy of an exported program in which layers are nn modules with their old names.

    Raises:
        ModelError: The program was exported in training mode.
    """
    assert isinstance(program, fx.GraphModule)
    root = copy.deepcopy(program)
    compute_weights(root, (*_CONVOLUTIONS, *_OTHER_LAYERS))
    used = {str(node.target) for node in root.graph.nodes if node.op == "get_attr"}
    for node in list(root.graph.nodes):
        if node.op != "call_function":
            continue
        made = _layer(root, node)
        if made is not None:
            path, layer, source = made
            if not _is_free(root, path, layer, used):
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
    for node in root.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default and "scale" not in node.kwargs:
            width = node.args[0].meta["val"].shape[-1]
            node.kwargs = {**node.kwargs, "scale": float(width) ** -0.5}  # whatever is pruned
        elif node.target is aten.lift_fresh_copy.default:  # which ONNX has not
            node.target = aten.clone.default
    for node in list(root.graph.nodes):
        is_unused = node.op == "get_attr" and not node.users
        if is_unused or node.target is aten._assert_tensor_metadata.default:  # of `.float()`
            root.graph.erase_node(node)
    return fx.GraphModule(root, root.graph).eval()


def free_batch(program: fx.GraphModule, example: Example) -> fx.GraphModule:
    """A copy that takes any batch size, where sizes were written out for one.

    Raises:
        ModelError: It takes only the batch size that it was exported with, or not its example.
    """
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    n_static = int(inputs[0].meta["val"].shape[0])
    freed = _without_batch(program, n_static)
    try:
        with torch.no_grad():
            once, twice = call(freed, example), call(freed, _doubled(example))
        fits = _alike([torch.cat([leaf, leaf]) for leaf in _leaves(once)], _leaves(twice))
    except TypeError as err:  # its signature is not that of its graph
        raise ModelError(f"The program does not take its own example of an input: {err}.") from err
    except RuntimeError:
        fits = False
    if not fits:
        raise ModelError(
            f"The program takes batches of {n_static} only. Export it for any batch: "
            f"torch.export.export(model, (example,), dynamic_shapes=({{0: Dim('batch')}},))."
        )
    return freed


def _without_batch(program: fx.GraphModule, n_static: int) -> fx.GraphModule:
    """A copy in which no reshape begins with the batch size `n_static`."""
    freed = copy.deepcopy(program)
    for node in freed.graph.nodes:
        if node.target in _RESHAPES and next(iter(node.args[1]), None) == n_static:
            node.update_arg(1, [-1, *node.meta["val"].shape[1:]])
    freed.recompile()
    return freed


def _same_answer(program: nn.Module, model: nn.Module, example: Example) -> bool:
    """Whether both give the same tensors, to rounding."""
    try:
        with torch.no_grad(), buffers_kept(program), buffers_kept(model):
            return _alike(_leaves(call(program, example)), _leaves(call(model, example)))
    except FORWARD_FAILURES:
        return False


def _alike(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(some, others, strict=True)
    )


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
    tensors = {key: tensor_of(root, name) for key, name in owned.items()}
    layer = _with_options(node, given, tensors)
    if layer is None:
        return None
    (path,) = paths
    tracked = f"{path}.num_batches_tracked"
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and _has(root, tracked):
        tensors["num_batches_tracked"] = tensor_of(root, tracked)
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
            "The program was exported in training mode: call model.eval() before torch.export. "
            "Where that was done, the code itself asks for it (dropout with training=True)."
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


def _is_free(root: fx.GraphModule, path: str, layer: nn.Module, used: set[str]) -> bool:
    """Whether `layer` can be put at `path`: nothing else there is used, or it is one like it."""
    found = dict(root.named_modules()).get(path)
    if found is not None and type(found) is type(layer):
        return repr(found) == repr(layer)
    own = {f"{path}.{name}" for name in layer.state_dict()}
    return {name for name in used if name.startswith(f"{path}.")} <= own


def _per_dim(value: Any, n_dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * n_dims if len(values) == 1 else values


def _has(root: nn.Module, name: str) -> bool:
    path, _, tensor = name.rpartition(".")
    return hasattr(root.get_submodule(path), tensor)


def _doubled(example: Example) -> Example:
    """The example twice along the batch; one example would be taken for a fixed size."""
    doubled: Example = torch.utils._pytree.tree_map(
        lambda value: torch.cat([value, value]) if isinstance(value, Tensor) else value, example
    )
    return doubled


def _larger(example: Example) -> Example:
    """The example with images twice as high and wide, and signals twice as long."""
    larger: Example = torch.utils._pytree.tree_map(
        lambda value: (
            value.repeat(1, 1, *[2] * (value.ndim - 2))
            if isinstance(value, Tensor) and value.ndim > 2
            else value
        ),
        example,
    )
    return larger


def _leaves(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
