"""(network, branches) -> a new network in which only the shortcuts are left."""

import copy
from collections.abc import Sequence
from dataclasses import replace

from torch import fx, nn

from compressor.errors import PlanError, unknown_name
from compressor.values import Branch, ChannelGroup, Plan


def remove_branches(network: nn.Module, branches: Sequence[Branch]) -> nn.Module:
    """A copy of `network` without `branches`; the same network where there are none.

    Args:
        network: An fx graph, not changed; pruned or not.
        branches: Of the fx graph before it was pruned.
    """
    if not branches:
        return network
    assert isinstance(network, fx.GraphModule)
    left = copy.deepcopy(network)
    nodes = {node.name: node for node in left.graph.nodes}
    for branch in branches:
        node = nodes.pop(branch.node, None)
        if node is None:
            continue  # it went with the branch that it lies in
        node.replace_all_uses_with(node.args[1 - branch.argument])
        left.graph.erase_node(node)
        for name in reversed(branch.own_nodes):
            if name in nodes:
                left.graph.erase_node(nodes.pop(name))
    left.delete_all_unused_submodules()
    left.recompile()
    return left


def check_dropped(branches: Sequence[Branch], plan: Plan) -> tuple[Branch, ...]:
    """The branches that `plan` leaves out.

    Raises:
        PlanError: It names others.
    """
    by_name = {branch.name: branch for branch in branches}
    for name in plan.dropped:
        if name not in by_name:
            raise PlanError(unknown_name("residual branch", name, by_name))
    return tuple(branch for branch in branches if branch.name in plan.dropped)


def groups_left(
    groups: Sequence[ChannelGroup], branches: Sequence[Branch], network: nn.Module
) -> tuple[ChannelGroup, ...]:
    """`groups` as they are in `network`, which `remove_branches` has left of the whole one.

    Their tensors are right; where operations read them, and their nodes, are those of the whole.
    """
    gone = {name for branch in branches for name in branch.groups}
    modules = {name for name, _ in network.named_modules()}
    return tuple(
        replace(group, slices=tuple(s for s in group.slices if s.module in modules))
        for group in groups
        if group.name not in gone
    )
