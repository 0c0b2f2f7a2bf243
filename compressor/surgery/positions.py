"""Where the removed channels of a plan lie."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from compressor.values import ChannelGroup, IndexArray, Plan

Mask = npt.NDArray[np.bool_]


def removed_channels(group: ChannelGroup, plan: Plan) -> IndexArray:
    """Channels of `group` that `plan` leaves out, ascending."""
    kept = plan.kept.get(group.name, range(group.n_channels))
    return np.setdiff1d(np.arange(group.n_channels), np.fromiter(kept, dtype=np.int64))


def kept_positions(
    model: nn.Module, groups: Sequence[ChannelGroup], plan: Plan
) -> dict[tuple[str, int], Mask]:
    """(tensor, dim) -> which positions stay; several groups may share one tensor."""
    keep: dict[tuple[str, int], Mask] = {}
    for group in groups:
        removed = removed_channels(group, plan)
        if not len(removed):
            continue
        for where in group.slices:
            place = (where.key, where.dim)
            if place not in keep:
                tensor = tensor_of(model, where.key)
                size = tensor.shape[where.dim] if isinstance(tensor, Tensor) else tensor
                keep[place] = np.ones(size, dtype=np.bool_)
            keep[place][where.index[removed].ravel()] = False
    return keep


def tensor_of(model: nn.Module, key: str) -> Tensor | int:
    """A parameter or buffer, or a width that a module keeps as a plain number."""
    module, _, name = key.rpartition(".")
    value = getattr(model.get_submodule(module), name)
    assert isinstance(value, (Tensor, int))
    return value
