"""Which weights a checkpoint holds, and those of the network among them.

A checkpoint is a tree of dicts with one state_dict in it, or several, under the names that its
author chose, and each with the prefixes of whatever wrapped the network: `module.` of
DataParallel, `_orig_mod.` of torch.compile, `model.` of Lightning, in any order. Which of it is
the network's is not known by such names but tried: what torch's own `load_state_dict(strict=True)`
takes, fits. Nothing is guessed. Where several sets fit, or averaged weights (EMA) are there that
do not, the file is refused with their names, and `weights_key` says which.
"""

import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ModelError, unknown_name
from compressor.model_io.misfit import COUNTERS, misfit, strange, without_prefix, without_wrappers
from compressor.values import FORWARD_FAILURES, WRAPPERS

OWN_OF_WRAPPERS = ("n_averaged",)  # tensors of theirs that are no network's
EXTRA = "_extra_state"  # what a module may keep beside tensors
# What averaged weights are called, in any spelling.
AVERAGED = re.compile(r"(?<![a-z])ema(?![a-z])|EMA|Ema(?![a-z])|(?i:swa|averag|avg|polyak|shadow)")
LEAST_OF_WEIGHTS = 2  # numbers in a tensor; one alone is a figure (`avg_loss`)
MANY = 0.5  # of the network's tensors, beside those that were taken

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights that fit a network.

    Attributes:
        key: Where they stand: the keys on the way, and what was taken off their names.
        tensors: By the network's names.
        others: Names beside them that are not the network's.
    """

    key: str
    tensors: "OrderedDict[str, Any]"
    others: Sequence[str]


def modules_in(content: object) -> dict[str, nn.Module]:
    """Whole networks in a checkpoint, out of their wrappers: where they stand -> each."""
    if isinstance(content, nn.Module):
        return {"": unwrapped(content)}
    found: dict[str, nn.Module] = {}
    for path, each in _below(content):
        if isinstance(each, nn.Module):
            module = unwrapped(each)
            if any(True for _ in module.parameters()) and not any(
                module is other or _are_equal(module.state_dict(), other.state_dict())
                for other in found.values()
            ):
                found[".".join(path)] = module
    return found


def unwrapped(module: nn.Module) -> nn.Module:
    """The network within DataParallel, torch.compile and the like."""
    while True:
        if isinstance(module, WRAPPERS):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def chosen(
    path: Path, what: str, found: Mapping[str, Any], weights_key: str | None, of: str
) -> Any:
    """The one of `found`, or the one that was asked for.

    Raises:
        ModelError: There are several, or none of that name.
    """
    if weights_key is not None:
        weights_key = "" if weights_key == "." else weights_key
        within = [key for key in found if f"{key}.".startswith(f"{weights_key}.")]
        if len(within) != 1 and weights_key not in found:
            raise ModelError(unknown_name(f"--weights-key of {path}", weights_key, found))
        return found[weights_key if weights_key in found else within[0]]
    if len(found) > 1:
        names = ", ".join(key or "." for key in found)
        likely = [key for key in found if AVERAGED.search(key)] or [key or "." for key in found]
        raise ModelError(
            f"{path} holds several {what}{of}: {names}. Say which is shipped: --weights-key "
            f"{likely[-1]}."
        )
    return next(iter(found.values()))


def load_weights(
    path: Path,
    module: nn.Module,
    content: object,
    arch: str,
    *,
    weights_key: str | None = None,
) -> str:
    """Copies the weights that `content` holds into `module`, in place.

    Args:
        path: Of the file, for messages.
        module: Not changed where this fails.
        content: A state_dict, or a checkpoint with one or several in it.
        arch: What `module` is, for messages.
        weights_key: Which of several; None where there is one.

    Returns:
        Where they stood; empty for a plain state_dict.

    Raises:
        ModelError: No weights fit, or several do; the message lists names and shapes.
    """
    if not isinstance(content, (Mapping, list, tuple)):
        raise ModelError(
            f"{path} holds a {type(content).__name__}; expected a state_dict (names to tensors), "
            f"or a checkpoint with one in it."
        )
    sets = list(_sets(content))
    if not sets:
        has = f"the keys {sorted(map(str, content))[:8]}" if isinstance(content, Mapping) else ""
        raise ModelError(
            f"{path} holds a {type(content).__name__} with {has or f'{len(content)} items'}; "
            f"expected a state_dict (names to tensors), or a checkpoint with one in it."
        )
    fits: dict[str, Weights] = {}
    stand: dict[tuple[str, ...], str] = {}  # paths of all that fit -> the one that is equal
    for way, tensors in sets:
        for each in _fits(module, way, tensors):
            equal = [k for k, other in fits.items() if _are_equal(each.tensors, other.tensors)]
            stand[way] = equal[0] if equal else each.key
            if not equal:
                key = each.key if each.key not in fits else f"{each.key} ({len(fits)})"
                fits[key] = each
    if not fits:
        raise ModelError(misfit(path, module, sets, arch))
    equals = {".".join(way): fits[key] for way, key in stand.items() if way and key in fits}
    known = fits if weights_key is None or weights_key not in equals else {**fits, **equals}
    found: Weights = chosen(path, "sets of weights", known, weights_key, f" that fit {arch}")
    if weights_key is None:
        _check_averaged(path, content, found, stand, len(module.state_dict()))
    if found.others:
        logger.warning(
            "%s: %d tensors beside %s are not the network's: %s",
            path,
            len(found.others),
            found.key or "the names of the network",
            ", ".join(found.others[:5]),
        )
    module.load_state_dict(found.tensors)
    return found.key


def _sets(content: object) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The state_dicts in a checkpoint, by the keys on the way to each."""
    if isinstance(content, Mapping) and _is_state_dict(content):
        yield (), content
        return
    for path, each in _below(content):
        if isinstance(each, nn.Module):
            yield path, unwrapped(each).state_dict()
        elif isinstance(each, Mapping) and _is_state_dict(each):
            yield path, each


def _below(content: object) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Everything in nested dicts, lists and tuples that are no state_dict, by the way to it."""
    around: set[int] = set()
    left: list[tuple[tuple[str, ...], Any]] = [((), content)]
    while left:
        path, value = left.pop()
        if path:
            yield path, value
        if isinstance(value, Mapping) and not _is_state_dict(value):
            inside = [(str(name), each) for name, each in value.items()]
        elif isinstance(value, (list, tuple)):
            inside = [(str(n), each) for n, each in enumerate(value)]
        else:
            continue
        if id(value) not in around:
            around.add(id(value))
            left += [((*path, name), each) for name, each in reversed(inside)]


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    tensors = [value for value in content.values() if isinstance(value, Tensor)]
    return bool(tensors) and all(
        isinstance(name, str) and (isinstance(value, Tensor) or name.endswith(EXTRA))
        for name, value in content.items()
    )


def _fits(module: nn.Module, way: tuple[str, ...], tensors: Mapping[str, Any]) -> list[Weights]:
    """The parts of a state_dict that are the network's, its own names before unwrapped ones."""
    fits = list(_under_prefixes(module, way, tensors))
    bare = OrderedDict[str, Any]() if fits else without_wrappers(tensors, module.state_dict())
    return list(_under_prefixes(module, way, bare)) if bare else fits


def _under_prefixes(
    module: nn.Module, way: tuple[str, ...], tensors: Mapping[str, Any]
) -> Iterator[Weights]:
    """The parts of a state_dict that are the network's, by the prefixes of its names."""
    expected = module.state_dict()
    anchor = next((name for name in expected if not name.endswith(COUNTERS)), "")
    ends = [name for name in tensors if name == anchor or name.endswith(f".{anchor}")]
    shared = _shared_prefixes(tensors)
    for prefix in dict.fromkeys([*shared, *(name.removesuffix(anchor) for name in ends)]):
        own = without_prefix(tensors, prefix)
        _tie(own, expected)
        more = [name for name in own if name not in expected] if prefix == "" else []
        if more and all(name in own for name in expected if not name.endswith((COUNTERS, EXTRA))):
            own = OrderedDict((name, own[name]) for name in own if name in expected)
        else:
            more = []
        if not strange(own, expected) and _is_taken(module, own, is_sure=prefix in shared):
            others = more + [
                name
                for name in tensors
                if not name.startswith(prefix) and name.split(".")[-1] not in OWN_OF_WRAPPERS
            ]
            yield Weights(".".join(filter(None, (*way, prefix.rstrip(".")))), own, others)


def _shared_prefixes(tensors: Mapping[str, Any]) -> list[str]:
    """What every name begins with, up to any dot; but those that wrappers add themselves."""
    names = [name for name in tensors if name.split(".")[-1] not in OWN_OF_WRAPPERS]
    first, last = min(names, default=""), max(names, default="")
    return [
        first[:end]
        for end in (0, *(match.end() for match in re.finditer(r"\.", first)))
        if last.startswith(first[:end])
    ]


def _tie(own: "OrderedDict[str, Any]", expected: Mapping[str, Any]) -> None:
    """Fills in tensors that are one and the same in the network, and stand once in the file."""
    by_memory: dict[int, str] = {
        expected[name].data_ptr(): name for name in own if _has_memory(expected.get(name))
    }
    for name, tensor in expected.items():
        if name not in own and _has_memory(tensor) and tensor.data_ptr() in by_memory:
            other = by_memory[tensor.data_ptr()]
            if expected[other].shape == tensor.shape:
                own[name] = own[other]


def _has_memory(tensor: object) -> bool:
    """Not lazy, not sparse, not empty."""
    if not isinstance(tensor, Tensor) or nn.parameter.is_lazy(tensor):
        return False
    return tensor.layout is torch.strided and tensor.numel() > 0


def _is_taken(module: nn.Module, tensors: Mapping[str, Any], *, is_sure: bool) -> bool:
    """Whether torch's own rules, and the network's, let `module` take them.

    Args:
        module: As it was, afterwards.
        tensors: By names.
        is_sure: Try although names are missing: hooks of the network may know others for them.
    """
    before = module.state_dict()
    if not is_sure and any(n not in tensors for n in before if not n.endswith((COUNTERS, EXTRA))):
        return False
    if len(tensors) < len(before) / 2:
        return False
    kept = {name: value.clone() if _has_memory(value) else value for name, value in before.items()}
    try:
        module.load_state_dict(tensors, strict=True)
    except FORWARD_FAILURES:
        return False
    else:
        return True
    finally:
        with torch.no_grad():
            for name, value in module.state_dict().items():
                if _has_memory(value) and isinstance(kept.get(name), Tensor):
                    value.copy_(kept[name])


def _are_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) for name, value in one.items() if isinstance(value, Tensor)
    )


def _check_averaged(
    path: Path,
    content: object,
    found: Weights,
    stand: Mapping[tuple[str, ...], str],
    n_tensors: int,
) -> None:
    """Raises `ModelError` where weights are in the file that may be the ones that are shipped."""
    beside = {name.partition(".")[0] for name in found.others if AVERAGED.search(name)}
    if len(found.others) > MANY * n_tensors:
        beside |= {name.partition(".")[0] for name in found.others}
    beside |= averaged_beside(content, stand)
    if beside:
        raise ModelError(
            f"{path} holds weights under {found.key or 'the names of the network'}, and others "
            f"under {', '.join(sorted(beside)[:5])} that do not fit as they are, but may be what "
            f"is shipped (averaged ones mostly are). To take the first, give --weights-key "
            f"{found.key or '.'}; to take the others, save them as a state_dict of their own."
        )


def averaged_beside(content: object, stand: Iterable[tuple[str, ...]]) -> set[str]:
    """Where averaged weights seem to be that are not among those at `stand`."""
    among = list(stand)
    return {
        ".".join(way)
        for way, each in _below(content)
        if not any(other[: len(way)] == way or way[: len(other)] == other for other in among)
        and AVERAGED.search(".".join(way))
        and _holds_tensors(each)
    }


def _holds_tensors(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    if isinstance(value, Tensor):
        return value.numel() >= LEAST_OF_WEIGHTS
    if isinstance(value, nn.Module):
        return True
    return any(
        isinstance(each, (Tensor, nn.Module)) for each in getattr(value, "__dict__", {}).values()
    )
