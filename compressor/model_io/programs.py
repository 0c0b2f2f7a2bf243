"""`.pt2` files: torch.export programs, read without running code from them."""

import io
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.verifier import SpecViolationError

from compressor.errors import ModelError, UntrustedModelError
from compressor.files import UNREADABLE, check_size, parsed_json
from compressor.values import Example

_OBJECT_PREFIXES = ("custom_obj_", "opaque_obj_")


def read_program(path: Path, *, trust: bool) -> tuple[nn.Module, Example]:
    """A torch.export program as a module, and an example of its input.

    Raises:
        ModelError: It is none, or calls something that is not an operation on tensors.
        UntrustedModelError: There are pickles in it that hold more than tensors.
    """
    try:
        check_size(path)
        if not trust:
            _refuse_pickles(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
    except SpecViolationError as err:
        raise ModelError(f"{path} calls something that is no operation on tensors.") from err
    except UNREADABLE as err:
        raise ModelError(f"{path} is not a program that torch.export.save wrote: {err}.") from err
    args: tuple[Any, ...]
    args, kwargs = program.example_inputs or ((), {})
    if not args and not kwargs:
        args = tuple(
            torch.randn([int(size) if isinstance(size, int) else 1 for size in value.shape])
            for node in program.graph.nodes
            if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
            and isinstance(value := node.meta.get("val"), Tensor)
        )  # fmt: skip
    single: Any = torch.utils._pytree.tree_map(
        lambda value: value[:1] if isinstance(value, Tensor) and value.ndim else value,
        kwargs if kwargs else args,
    )
    is_one_tensor = not kwargs and len(args) == 1 and isinstance(args[0], Tensor)
    return program.module(check_guards=False), single[0] if is_one_tensor else single


def _refuse_pickles(path: Path) -> None:
    """Raises `UntrustedModelError` for a program whose pickles hold more than tensors.

    torch.export.load reads them with the unrestricted unpickler where the other one fails.
    """
    reason = (
        "holds more than tensors; reading it would run code from the file. Give --trust if you "
        "wrote it"
    )
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickled = {name for name in names if name.endswith(".pt")}
            for name in names:
                if Path(name).name.startswith(_OBJECT_PREFIXES):
                    raise UntrustedModelError(f"{path}: {name} {reason}.")
                if name.endswith("config.json"):
                    payloads = parsed_json(archive.read(name)).get("config", {}).values()
                    used = {str(p["path_name"]) for p in payloads if p.get("use_pickle")}
                    pickled |= {n for n in names if Path(n).name in used}
            for name in sorted(pickled):
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    except pickle.UnpicklingError as err:
        raise UntrustedModelError(f"{path}: {name} {reason}.") from err
