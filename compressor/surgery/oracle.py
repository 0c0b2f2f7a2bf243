"""What a pruned network is compared with: the original whose readers see zeros."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.running import buffers_kept, in_small_steps
from compressor.surgery.positions import removed_channels
from compressor.values import Branch, ChannelGroup, Plan

# (operation, its number) -> (argument, dimension, positions) that it is to see zeros at; without
# a dimension, everywhere
Cuts = dict[tuple[str, int], list[tuple[int, int | None, Tensor]]]


def masked(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: Plan,
    branches: Sequence[Branch] = (),
) -> nn.Module:
    """`model` whose readers of removed channels, and sums of removed branches, see zeros.

    Returns:
        A module around the very `model`; it answers without gradients, and changes no tensor.
    """
    cuts: Cuts = defaultdict(list)
    for group in groups:
        removed = removed_channels(group, plan)
        for reading in group.readings:
            rows = reading.index[removed].ravel()
            cut = (reading.argument, reading.dim, torch.from_numpy(rows[rows >= 0]))
            cuts[reading.operation, reading.call].append(cut)
    for branch in branches:
        if branch.name in plan.dropped:
            cuts[branch.operation, branch.call].append((branch.argument, None, torch.empty(0)))
    return _Masked(model, cuts)


class _Masked(nn.Module):
    """See `masked`."""

    def __init__(self, model: nn.Module, cuts: Cuts) -> None:
        super().__init__()
        self.model = model
        self.cuts = cuts
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Operations are numbered as they were recorded: without gradients or inference mode.
        plain = torch.inference_mode(False)
        kept, zeros = buffers_kept(self.model), _ZeroInputs(self.cuts)
        with in_small_steps(self.model), plain, torch.no_grad(), kept, zeros:
            return self.model(*args, **kwargs)


class _ZeroInputs(TorchDispatchMode):
    """Clears some channels of what some operations read."""

    def __init__(self, cuts: Cuts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cuts = cuts
        self.n_calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        cleared = list(args)
        for argument, dim, columns in self.cuts.get((name, self.n_calls[name]), ()):
            seen = cleared[argument]
            if dim is None and func._schema.is_mutable and argument == 0:
                seen.zero_()  # the sum is written over the branch, which nothing else reads
            elif dim is None:
                cleared[argument] = torch.zeros_like(seen)
            else:
                cleared[argument] = seen.index_fill(dim, columns.to(seen.device), 0)
        self.n_calls[name] += 1
        return func(*cleared, **(kwargs or {}))
