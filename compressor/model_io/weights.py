"""Which weights a checkpoint holds, and those of the network among them.

A checkpoint is a tree of dicts with one state_dict in it, or several, under the names that its
author chose, and each with the prefixes of whatever wrapped the network: `module.` of
DataParallel, `_orig_mod.` of torch.compile, `model.` of Lightning, in any order. Which of it is
the network's is not known by such names but tried: what torch's own `load_state_dict(strict=True)`
takes, fits. Nothing is guessed. Where several sets fit, or averaged weights (EMA) are there that
do not, the file is refused with their names, and `weights_key` says which.
"""

import copy
import logging
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ModelError, unknown_name
from compressor.inputs import LIBRARIES
from compressor.values import WRAPPERS

OWN_OF_WRAPPERS = ("n_averaged",)  # tensors of theirs that are no network's
COUNTERS = "num_batches_tracked"  # of batch-norms; old code has none, and torch does not mind
EXTRA = "_extra_state"  # what a module may keep beside tensors
AVERAGED = re.compile(r"(^|[._-])(ema|swa|averaged?|shadow)([._-]|$)", re.IGNORECASE)
MAX_DEPTH = 4

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


def modules_in(content: object, key: str = "") -> dict[str, nn.Module]:
    """Whole networks in a checkpoint, out of their wrappers: where they stand -> each."""
    if isinstance(content, nn.Module):
        return {key: unwrapped(content)}
    found: dict[str, nn.Module] = {}
    if isinstance(content, Mapping) and key.count(".") < MAX_DEPTH:
        for name, each in content.items():
            found |= modules_in(each, f"{key}.{name}".removeprefix("."))
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
        within = [key for key in found if f"{key}.".startswith(f"{weights_key}.")]
        if len(within) != 1 and weights_key not in found:
            raise ModelError(unknown_name(f"--weights-key of {path}", weights_key, found))
        return found[weights_key if weights_key in found else within[0]]
    if len(found) > 1:
        names = ", ".join(found)
        raise ModelError(
            f"{path} holds several {what}{of}: {names}. Say which is shipped: --weights-key "
            f"{list(found)[-1]}."
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
    if not isinstance(content, Mapping):
        raise ModelError(
            f"{path} holds a {type(content).__name__}; expected a state_dict (names to tensors), "
            f"or a checkpoint with one in it."
        )
    sets = dict(_sets(content))
    if not sets:
        raise ModelError(
            f"{path} holds a dict with the keys {sorted(map(str, content))[:8]}; expected a "
            f"state_dict (names to tensors), or a checkpoint with one in it."
        )
    fits: dict[str, Weights] = {}
    stand: list[str] = []  # keys of all that fit, of equal ones too
    for key, tensors in sets.items():
        for each in _fits(module, key, tensors):
            stand.append(each.key)
            if not any(_are_equal(each.tensors, other.tensors) for other in fits.values()):
                fits[each.key] = each
    if not fits:
        raise ModelError(_misfit(path, module, sets, arch))
    found: Weights = chosen(path, "sets of weights", fits, weights_key, f" that fit {arch}")
    if weights_key is None:
        _check_averaged(path, content, found.key, stand)
    if found.others:
        logger.warning(
            "%s: %d tensors beside %s are not the network's: %s",
            path, len(found.others), found.key, ", ".join(found.others[:5]),
        )  # fmt: skip
    module.load_state_dict(found.tensors)
    return found.key


def _sets(content: Mapping[Any, Any], key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The state_dicts in a checkpoint, by where they stand."""
    if _is_state_dict(content):
        yield key, content
    elif key.count(".") < MAX_DEPTH:
        for name, each in content.items():
            if isinstance(each, nn.Module):
                each = unwrapped(each).state_dict()
            if isinstance(each, Mapping):
                yield from _sets(each, f"{key}.{name}".removeprefix("."))


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    tensors = [value for value in content.values() if isinstance(value, Tensor)]
    return bool(tensors) and all(
        isinstance(name, str) and (isinstance(value, Tensor) or name.endswith(EXTRA))
        for name, value in content.items()
    )


def _fits(module: nn.Module, key: str, tensors: Mapping[str, Any]) -> Iterator[Weights]:
    """The parts of a state_dict that are the network's, by the prefixes of its names."""
    expected = module.state_dict()
    anchor = next((name for name in expected if not name.endswith(COUNTERS)), "")
    ends = [name for name in tensors if name == anchor or name.endswith(f".{anchor}")]
    for prefix in [name.removesuffix(anchor) for name in ends]:
        own = _without_prefix(tensors, prefix)
        _tie(own, expected)
        if not _strange(own, expected) and _is_taken(module, own):
            others = [
                name for name in tensors
                if not name.startswith(prefix) and name not in OWN_OF_WRAPPERS
            ]  # fmt: skip
            yield Weights(".".join(filter(None, (key, prefix.rstrip(".")))), own, others)


def _without_prefix(tensors: Mapping[str, Any], prefix: str) -> "OrderedDict[str, Any]":
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


def _tie(own: "OrderedDict[str, Any]", expected: Mapping[str, Any]) -> None:
    """Fills in tensors that are one and the same in the network, and stand once in the file."""
    by_memory: dict[int, str] = {
        expected[name].data_ptr(): name
        for name in own
        if isinstance(expected.get(name), Tensor) and expected[name].numel()
    }
    for name, tensor in expected.items():
        if name not in own and isinstance(tensor, Tensor) and tensor.data_ptr() in by_memory:
            other = by_memory[tensor.data_ptr()]
            if expected[other].shape == tensor.shape:
                own[name] = own[other]


def _is_taken(module: nn.Module, tensors: Mapping[str, Any]) -> bool:
    """Whether torch's own rules let `module` take them."""
    expected = module.state_dict()
    if any(name not in tensors for name in expected if not name.endswith((COUNTERS, EXTRA))):
        return False
    try:
        copy.deepcopy(module).load_state_dict(tensors, strict=True)
    except (RuntimeError, TypeError, AttributeError, KeyError, ValueError):
        return False
    return True


def _are_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) for name, value in one.items() if isinstance(value, Tensor)
    )


def _check_averaged(
    path: Path, content: Mapping[Any, Any], found: str, stand: Sequence[str]
) -> None:
    """Raises `ModelError` where averaged weights are in the file that were not among the fits."""
    for key, each in _below(content):
        is_among = any(f"{other}.".startswith(f"{key}.") for other in stand)
        if not is_among and AVERAGED.search(key.rpartition(".")[2]) and _holds_tensors(each):
            raise ModelError(
                f"{path} holds weights under {found}, and averaged ones under {key} that do not "
                f"fit as they are. Averaged weights are what is mostly shipped. To take the "
                f"others, give --weights-key {found}; to take these, save them as a state_dict of "
                f"their own."
            )


def _below(content: Mapping[Any, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested dicts that are no state_dict, by where it stands."""
    if _is_state_dict(content) or key.count(".") >= MAX_DEPTH:
        return
    for name, each in content.items():
        below = f"{key}.{name}".removeprefix(".")
        yield below, each
        if isinstance(each, Mapping):
            yield from _below(each, below)


def _holds_tensors(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, (Tensor, nn.Module))


def _strange(own: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Tensors of another kind of numbers, which torch would convert without a word."""
    return [
        f"{name} is {value.dtype}"
        for name, value in own.items()
        if isinstance(value, Tensor) and isinstance(expected.get(name), Tensor)
        and (value.is_floating_point(), value.is_complex())
        != (expected[name].is_floating_point(), expected[name].is_complex())
    ]  # fmt: skip


def _misfit(
    path: Path, module: nn.Module, sets: Mapping[str, Mapping[str, Any]], arch: str
) -> str:
    """What is wrong with the set that comes nearest."""
    expected = module.state_dict()

    def n_known(own: Mapping[str, Any]) -> int:
        return sum(name in expected for name in own)

    tried = []
    for key, tensors in sets.items():
        prefixes = {""} | {
            name.removesuffix(known)
            for known in list(expected)[:1]
            for name in tensors
            if name.endswith(f".{known}")
        }
        tried += [(key, _without_prefix(tensors, prefix)) for prefix in sorted(prefixes)]
    key, own = max(tried, key=lambda each: n_known(each[1]))
    missing = [n for n in expected if n not in own and not n.endswith(COUNTERS)]
    unexpected = [name for name in own if name not in expected]
    reshaped = [
        f"{name} is {tuple(own[name].shape)}, {arch} has {tuple(expected[name].shape)}"
        for name in expected
        if isinstance(own.get(name), Tensor) and own[name].shape != expected[name].shape
    ]
    faults = [
        f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in (
            ("missing in the file", missing),
            ("not in the network", unexpected),
            ("of another shape", reshaped),
            ("not of real numbers", _strange(own, expected)),
        )
        if names
    ]
    where = f" (under {key})" if key else ""
    said = "; ".join(faults) or "torch's load_state_dict does not take it"
    return f"{path}{where} does not fit {arch}. {said}.{_class_count_hint(arch, own, expected)}"


def _class_count_hint(arch: str, own: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """What to do where nothing but the number of classes differs."""
    other = [
        name for name in expected
        if isinstance(own.get(name), Tensor) and own[name].shape != expected[name].shape
    ]  # fmt: skip
    counts = {own[name].shape[:1] for name in other}
    tails = all(own[name].shape[1:] == expected[name].shape[1:] for name in other)
    if arch.partition(":")[0] not in LIBRARIES or len(counts) != 1 or not tails:
        return ""
    (count,) = counts
    return f" It seems to have {count[0]} classes: give --arch-arg num_classes={count[0]}."
