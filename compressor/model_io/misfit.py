"""What is wrong with weights that do not fit, in words."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compressor.inputs import LIBRARIES

# What torch puts into the names of tensors in wrapped parts: DataParallel, torch.compile, FSDP,
# checkpointing of activations.
WRAPPED = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"}
)
COUNTERS = "num_batches_tracked"  # of batch-norms; old code has none, and torch does not mind


def without_prefix(tensors: Mapping[str, Any], prefix: str) -> "OrderedDict[str, Any]":
    """What stands under `prefix`, with what torch keeps of versions."""
    own = OrderedDict(
        (name.removeprefix(prefix), value)
        for name, value in tensors.items()
        if name.startswith(prefix)
    )
    versions = getattr(tensors, "_metadata", None)
    if isinstance(versions, Mapping):
        kept = {
            str(name)[len(prefix) :]: version
            for name, version in versions.items()
            if f"{name}.".startswith(prefix)
        }
        own._metadata = OrderedDict(kept)  # type: ignore[attr-defined]
    return own


def without_wrappers(
    tensors: Mapping[str, Any], expected: Mapping[str, Any]
) -> "OrderedDict[str, Any]":
    """`tensors` without what torch adds to the names of parts that were wrapped one by one.

    `layers._orig_mod.0.weight` of a compiled part is `layers.0.weight`, if the network that has
    the names `expected` uses no such part in a name of its own. Empty where two names become one.
    """
    own = {part for name in expected for part in name.split(".")}
    foreign = WRAPPED - own

    def bare(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in foreign)

    renamed = OrderedDict((bare(name), value) for name, value in tensors.items())
    versions = getattr(tensors, "_metadata", None)
    if isinstance(versions, Mapping):
        kept = {bare(str(name)): version for name, version in versions.items()}
        renamed._metadata = OrderedDict(kept)  # type: ignore[attr-defined]
    return renamed if len(renamed) == len(tensors) else OrderedDict()


def strange(own: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Tensors of another kind of numbers, which torch would convert without a word."""
    return [
        f"{name} is {value.dtype}"
        for name, value in own.items()
        if isinstance(value, Tensor)
        and isinstance(expected.get(name), Tensor)
        and not name.endswith(COUNTERS)
        and (value.is_floating_point(), value.is_complex())
        != (expected[name].is_floating_point(), expected[name].is_complex())
    ]


def misfit(
    path: Path,
    module: nn.Module,
    sets: Sequence[tuple[tuple[str, ...], Mapping[str, Any]]],
    arch: str,
) -> str:
    """What is wrong with the set that comes nearest."""
    expected = module.state_dict()

    def n_known(own: Mapping[str, Any]) -> int:
        return sum(name in expected for name in own)

    tried = []
    for way, tensors in sets:
        prefixes = {""} | {
            name.removesuffix(known)
            for known in list(expected)[:1]
            for name in tensors
            if name.endswith(f".{known}")
        }
        key = ".".join(way)
        tried += [(key, without_prefix(tensors, prefix)) for prefix in sorted(prefixes)]
    key, own = max(tried, key=lambda each: n_known(each[1]))
    missing = [n for n in expected if n not in own and not n.endswith(COUNTERS)]
    unexpected = [name for name in own if name not in expected]
    reshaped = [
        f"{name} is {_said(own[name])}, {arch} has {_said(expected[name])}"
        for name in expected
        if _differ(own.get(name), expected[name])
    ]
    faults = [
        f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in (
            ("missing in the file", missing),
            ("not in the network", unexpected),
            ("of another shape", reshaped),
            ("not of real numbers", strange(own, expected)),
        )
        if names
    ]
    where = f" (under {key})" if key else ""
    said = "; ".join(faults) or "torch's load_state_dict does not take it"
    return f"{path}{where} does not fit {arch}. {said}.{_class_count_hint(arch, own, expected)}"


def _shape(tensor: Tensor) -> tuple[int, ...] | None:
    """None of a nested tensor, whose parts may have several."""
    return None if tensor.is_nested else tuple(tensor.shape)


def _said(tensor: Tensor) -> str:
    shape = _shape(tensor)
    return "nested" if shape is None else str(shape)


def _differ(one: object, other: object) -> bool:
    """Whether both are tensors, of other shapes."""
    return isinstance(one, Tensor) and isinstance(other, Tensor) and _shape(one) != _shape(other)


def _class_count_hint(arch: str, own: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """What to do where nothing but the number of classes differs."""
    other = [name for name in expected if _differ(own.get(name), expected[name])]
    shapes = [_shape(own[name]) or () for name in other]
    counts = {shape[:1] for shape in shapes}
    tails = all(s[1:] == expected[n].shape[1:] for n, s in zip(other, shapes, strict=True))
    if arch.partition(":")[0] not in LIBRARIES or len(counts) != 1 or counts == {()} or not tails:
        return ""
    (count,) = counts
    return f" It seems to have {count[0]} classes: give --arch-arg num_classes={count[0]}."
