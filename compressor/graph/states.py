"""What is known of a tensor of the network: where its channels lie, or that it has none."""

from collections.abc import Sequence
from dataclasses import dataclass

from compressor.graph.labels import HEADS, Parting
from compressor.values import IndexArray

# Why channels are locked in code that a program can say otherwise.
BY_WIDTH = "scales its answers by its width"
WITH_ZEROS = "compares channels, and one that is gone counts as zero"
COMPUTED_BIAS = "computes its bias from other tensors"  # a number there
NEEDS_PROGRAM = (BY_WIDTH, WITH_ZEROS, COMPUTED_BIAS)


@dataclass(frozen=True, eq=False)
class Channels:
    """A tensor whose positions along `dim` are channels.

    Attributes:
        dim: From 0.
        labels: `(shape[dim],)`.
    """

    dim: int
    labels: IndexArray


@dataclass(frozen=True, eq=False)
class Axis:
    """One of several dimensions along which a tensor has channels.

    Attributes:
        dim: From 0.
        labels: `(shape[dim],)`.
        side: On which side of `Labels` they are tied to those of the layer.
        parting: The view that made it.
    """

    dim: int
    labels: IndexArray
    side: int
    parting: Parting | None = None

    @property
    def is_gone(self) -> bool:
        """Whether it was taken for heads that turned out to be none."""
        return self.side == HEADS and self.parting is not None and bool(self.parting.is_tied)


@dataclass(frozen=True, eq=False)
class Grid:
    """A tensor with channels along several dimensions: heads, and the channels of each.

    Attributes:
        axes: No two along one dimension.
    """

    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Weight:
    """Parameters or buffers, seen through views and element-wise operations.

    Attributes:
        sources: Name in the state_dict, and for each dimension of this tensor the one of the
            source that runs along it; None where none does.
    """

    sources: tuple[tuple[str, tuple[int | None, ...]], ...]

    def runs_along(self, dim: int) -> bool:
        """Whether a dimension of a source runs along that of this tensor."""
        return any(own[dim] is not None for _, own in self.sources)

    def through(self, dims: Sequence[int | None]) -> "Weight":
        """The view whose dimension `i` is dimension `dims[i]` of this one."""
        return Weight(tuple(
            (name, tuple(None if d is None else own[d] for d in dims))
            for name, own in self.sources
        ))  # fmt: skip


@dataclass(frozen=True)
class Fixed:
    """A tensor in which nothing can be removed.

    Attributes:
        because: In words.
        from_input: Whether its values depend on the model's input.
    """

    because: str
    from_input: bool


State = Channels | Grid | Weight | Fixed
Outcome = State | Sequence[State | None] | None  # of the output, or of each output


def depends_on_input(state: State | None) -> bool:
    """Whether the values of a tensor differ from one input to the next."""
    is_read = isinstance(state, Fixed) and state.from_input
    return isinstance(state, (Channels, Grid)) or is_read


def places_of(state: State | None) -> list[tuple[int, IndexArray]]:
    """(dimension, labels) of each dimension that has channels."""
    if isinstance(state, Channels):
        return [(state.dim, state.labels)]
    return [(axis.dim, axis.labels) for axis in state.axes] if isinstance(state, Grid) else []


def labels_of(state: State | None) -> list[IndexArray]:
    """Those along each dimension that has channels."""
    return [labels for _, labels in places_of(state)]
