"""Operations that torch's first exporter lacks, written with those that every opset has.

Shapes are static, so each is a fixed choice or a fixed weighting of positions along every axis of
an image: a `Gather` with constant indices, or a `MatMul` with a constant matrix. Which indices and
which matrix, torch itself says: its operation is run on numbered positions, or on the identity.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.onnx import symbolic_helper, symbolic_opset9, symbolic_opset14, utils

CEIL_MODE_OPSET, AXES_AS_INPUT_OPSET = 10, 18
Symbolic = Callable[..., Any]
aten = torch.ops.aten
MAX_POOLS: dict[int, Symbolic] = {
    1: symbolic_opset9.max_pool1d_with_indices,
    2: symbolic_opset9.max_pool2d_with_indices,
    3: symbolic_opset9.max_pool3d_with_indices,
}


def register(opset: int) -> None:
    """Makes torch's first exporter write what this file has into files of `opset`."""
    for name, symbolic in SYMBOLICS.items():
        utils.register_custom_op_symbolic(f"aten::{name}", symbolic, opset)


def _adaptive_avg_pool(n_dims: int, g: Any, images: Any, _output_size: Any) -> Any:
    """Means over windows: a matrix an axis where windows are of several sizes."""
    before, after = _sizes(_seen(g, images), n_dims), _sizes(g.original_node.output(), n_dims)
    if set(after) == {1}:
        return g.op("GlobalAveragePool", images)
    if _is_even(before, after):
        windows = [n // m for n, m in zip(before, after, strict=True)]
        return g.op("AveragePool", images, kernel_shape_i=windows, strides_i=windows)
    matrices = [
        aten.adaptive_avg_pool1d(torch.eye(n)[None], [m])[0]
        for n, m in zip(before, after, strict=True)
    ]
    return _weighted(g, images, matrices)


def _adaptive_max_pool(n_dims: int, g: Any, images: Any, _output_size: Any) -> Any:
    """Largest of windows: where they are of several sizes, the small ones read a pixel twice."""
    found, indices = g.original_node.outputs()
    before, after = _sizes(_seen(g, images), n_dims), _sizes(found, n_dims)
    windows = [-(-n // m) for n, m in zip(before, after, strict=True)]
    if _is_even(before, after):
        nothing, each = (0,) * n_dims, (1,) * n_dims
        return MAX_POOLS[n_dims](g, images, windows, windows, nothing, each, False)
    if indices.uses():
        return symbolic_helper._unimplemented(f"adaptive_max_pool{n_dims}d", "its indices", images)
    is_single = symbolic_helper._get_tensor_rank(images) == n_dims + 1
    for axis, (n, m) in enumerate(zip(before, after, strict=True)):
        bounds = [(j * n // m, -(-(j + 1) * n // m)) for j in range(m)]
        windows[axis] = max(end - start for start, end in bounds)
        reads = [min(s + k, end - 1) for s, end in bounds for k in range(windows[axis])]
        images = _picked(g, images, reads, axis - n_dims)
    if is_single:
        images = symbolic_helper._unsqueeze_helper(g, images, [0])
    largest = g.op("MaxPool", images, kernel_shape_i=windows, strides_i=windows)
    return symbolic_helper._squeeze_helper(g, largest, [0]) if is_single else largest, None


def _nearest_exact(n_dims: int, g: Any, images: Any, _output_size: Any, *scales: Any) -> Any:
    """The pixel in which the middle of the new one lies."""
    before, after = _sizes(_seen(g, images), n_dims), _sizes(g.original_node.output(), n_dims)
    for axis, scale in enumerate(_per_axis(scales, n_dims)):
        n, m = before[axis], after[axis]
        numbered = torch.arange(n, dtype=torch.float32)[None, None]
        found = aten._upsample_nearest_exact1d(numbered, [m], scale).flatten().int().tolist()
        images = _picked(g, images, found, axis - n_dims)
    return images


def _antialiased(
    resize: Symbolic, g: Any, images: Any, _output_size: Any, align: Any, *scales: Any
) -> Any:
    """Weighted sums of pixels, along one axis after the other."""
    before, after = _sizes(_seen(g, images), 2), _sizes(g.original_node.output(), 2)
    (is_aligned,) = _numbers(align)
    matrices = [
        resize(torch.eye(n)[None, None], [n, m], bool(is_aligned), None, scale)[0, 0]
        for n, m, scale in zip(before, after, _per_axis(scales, 2), strict=True)
    ]
    return _weighted(g, images, matrices)


def _attention(g: Any, *given: Any) -> Any:
    """As torch writes it, in any opset from 13 on; a causal mask is a constant.

    Keys and values that several queries share are repeated.
    """
    query, key, value, mask, dropout, is_causal, scale, shares = given
    for each, seen in zip((query, key, value), g.original_node.inputs(), strict=False):
        each.setType(seen.type())
    (n_queries, n_rows, _), (n_keys, n_columns, _) = _sizes(query, 3), _sizes(key, 3)
    if any(_numbers(shares)):
        heads = [head for head in range(n_keys) for _ in range(n_queries // n_keys)]
        key, value = (_picked(g, each, heads, -3) for each in (key, value))
    if any(_numbers(is_causal)):
        hidden = torch.full((n_rows, n_columns), -torch.inf, dtype=query.type().dtype())
        mask = _constant(g, hidden.triu(1))
    write = symbolic_opset14.scaled_dot_product_attention
    return write(g, query, key, value, mask, dropout, False, scale, False)


def _avg_pool(n_dims: int, g: Any, images: Any, *given: Any) -> Any:
    """Means of windows; sums by a divisor of the code are means with padding, multiplied."""
    window, strides, padding = ([int(n) for n in _numbers(each)] for each in given[:3])
    ceil_mode, counts_padding, divisor = (_numbers(each) for each in given[3:])
    window, padding = ([*n, *n * (n_dims - len(n))] for n in (window, padding))
    kwargs = {"ceil_mode_i": int(ceil_mode[0])} if g.opset >= CEIL_MODE_OPSET else {}
    means = g.op(
        "AveragePool",
        images,
        kernel_shape_i=window,
        pads_i=padding * 2,
        strides_i=[*strides, *strides * (n_dims - len(strides))] or window,
        count_include_pad_i=int(bool(divisor) or counts_padding[0]),
        **kwargs,
    )
    if not divisor:
        return means
    factor = torch.tensor(math.prod(window) / divisor[0], dtype=images.type().dtype())
    return g.op("Mul", means, _constant(g, factor))


def _rms_norm(g: Any, rows: Any, over: Any, weight: Any, eps: Any) -> Any:
    """`x / sqrt(mean(x * x) + eps) * weight`, over the last dimensions."""
    axes = list(range(-len(_numbers(over)), 0))
    given = _numbers(eps) or [torch.finfo(rows.type().dtype()).eps]
    squares = g.op("Mul", rows, rows)
    if g.opset < AXES_AS_INPUT_OPSET:
        mean = g.op("ReduceMean", squares, axes_i=axes, keepdims_i=1)
    else:
        mean = g.op("ReduceMean", squares, _constant(g, axes), keepdims_i=1)
    epsilon = _constant(g, torch.tensor(given[0], dtype=rows.type().dtype()))
    scaled = g.op("Div", rows, g.op("Sqrt", g.op("Add", mean, epsilon)))
    return scaled if symbolic_helper._is_none(weight) else g.op("Mul", scaled, weight)


def _squeeze(g: Any, value: Any, *dims: Any) -> Any:
    """Dimensions that torch saw to be of size 1; its own symbolic may write an `If`."""
    before = next(g.original_node.inputs()).type().sizes()
    named = [int(dim) % max(len(before), 1) for each in dims for dim in _numbers(each)]
    gone = [d for d in (named if dims else range(len(before))) if before[d] == 1]
    return symbolic_helper._squeeze_helper(g, value, gone) if gone else value


def _seen(g: Any, images: Any) -> Any:
    """`images`, with the sizes that torch saw: what was written before may not tell them."""
    images.setType(next(g.original_node.inputs()).type())
    return images


def _weighted(g: Any, images: Any, matrices: Sequence[Tensor]) -> Any:
    """`images`, whose last axes are multiplied by a matrix each, `(before, after)`."""
    *deep, columns = matrices
    sizes: list[int] = symbolic_helper._get_tensor_sizes(images)
    images = g.op("MatMul", images, _constant(g, columns))
    if deep:
        rows = deep[-1]
        images = g.op("MatMul", _constant(g, rows.T), images)
    if deep[:-1]:
        depth, height, width = deep[0], rows.shape[1], columns.shape[1]
        others = [*sizes[:-4], -1]  # channels, of which a pruned network has fewer
        flat = g.op("Reshape", images, _constant(g, [*others, len(depth), height * width]))
        summed = g.op("MatMul", _constant(g, depth.T), flat)
        shape = _constant(g, [*others, depth.shape[1], height, width])
        images = g.op("Reshape", summed, shape)
    return images


def _picked(g: Any, images: Any, positions: list[int], axis: int) -> Any:
    rank = symbolic_helper._get_tensor_rank(images)
    assert rank is not None
    picked = g.op("Gather", images, _constant(g, positions), axis_i=rank + axis)
    sizes = symbolic_helper._get_tensor_sizes(images)
    sizes[axis] = len(positions)
    picked.setType(images.type().with_sizes(sizes))
    return picked


def _constant(g: Any, value: Any) -> Any:
    return g.op("Constant", value_t=torch.as_tensor(value).contiguous())


def _sizes(value: Any, n_dims: int) -> list[int]:
    sizes: list[int] = symbolic_helper._get_tensor_sizes(value)
    return sizes[-n_dims:]


def _is_even(before: Sequence[int], after: Sequence[int]) -> bool:
    return all(n % m == 0 for n, m in zip(before, after, strict=True))


def _per_axis(scales: Sequence[Any], n_dims: int) -> list[float | None]:
    """A factor an axis, however torch's two signatures give them; None where sizes were given.

    The exporter keeps them as float32: what was written in the code is the shortest such number.
    """
    numbers = [float(str(np.float32(n))) for scale in scales for n in _numbers(scale)]
    return [*numbers] if len(numbers) == n_dims else [None] * n_dims


def _numbers(value: Any) -> list[float]:
    if symbolic_helper._is_none(value):
        return []
    if value.node().kind() == "prim::ListConstruct":
        return [n for each in symbolic_helper._unpack_list(value) for n in _numbers(each)]
    constant = torch.as_tensor(symbolic_helper._node_get(value.node(), "value"))
    numbers: list[float] = constant.flatten().tolist()
    return numbers


SYMBOLICS: dict[str, Symbolic] = {
    **{f"adaptive_avg_pool{n}d": partial(_adaptive_avg_pool, n) for n in (1, 2, 3)},
    **{f"_adaptive_avg_pool{n}d": partial(_adaptive_avg_pool, n) for n in (2, 3)},
    **{f"adaptive_max_pool{n}d": partial(_adaptive_max_pool, n) for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": partial(_nearest_exact, n) for n in (1, 2, 3)},
    **{f"avg_pool{n}d": partial(_avg_pool, n) for n in (2, 3)},
    "rms_norm": _rms_norm,
    "scaled_dot_product_attention": _attention,
    "squeeze": _squeeze,
    "_upsample_bilinear2d_aa": partial(_antialiased, aten._upsample_bilinear2d_aa),
    "_upsample_bicubic2d_aa": partial(_antialiased, aten._upsample_bicubic2d_aa),
}
