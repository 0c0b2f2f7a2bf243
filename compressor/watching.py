"""What the layers of a network read and answer while it runs."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

See = Callable[[str, Tensor, Tensor], None]  # layer's name, what it reads, what it answers


def watch(network: nn.Module, names: Collection[str], see: See) -> list[RemovableHandle]:
    """From now on `see` is told whenever a layer called one of `names` has run.

    Args:
        network: Whose layers they are: such as read one tensor and answer one.
        names: As `network.named_modules` gives them.
        see: Called in the order the layers run in.
    """

    def tell(
        name: str, _layer: nn.Module, read: tuple[Any, ...], named: Mapping[str, Any], answer: Any
    ) -> None:
        see(name, read[0] if read else named["input"], answer)

    return [
        layer.register_forward_hook(partial(tell, name), with_kwargs=True)
        for name, layer in network.named_modules()
        if name in names
    ]


@contextmanager
def watched(network: nn.Module, names: Collection[str], see: See) -> Iterator[None]:
    """The same, as long as the context lasts."""
    hooks = watch(network, names, see)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
