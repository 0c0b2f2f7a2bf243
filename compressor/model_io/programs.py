"""`.pt2` files: torch.export programs, read without running code from them."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.verifier import SpecViolationError

from compressor.errors import ModelError
from compressor.files import UNREADABLE, check_size
from compressor.model_io.archives import checked_archive
from compressor.values import Example

LOUD = "torch.export"  # prints tracebacks of what it then raises


def read_program(path: Path, *, trust: bool) -> tuple[nn.Module, Example]:
    """A torch.export program as a module, and an example of its input.

    Raises:
        ModelError: It is none, or calls something that is not an operation on tensors.
        UntrustedModelError: It holds what torch would run, import or unpickle.
    """
    try:
        check_size(path)
        source = path if trust else checked_archive(path)
        with warnings.catch_warnings(), _silent(LOUD):
            warnings.simplefilter("ignore")
            program = torch.export.load(source)
            return program.module(check_guards=False), _example(program)
    except SpecViolationError as err:
        raise ModelError(f"{path} calls something that is no operation on tensors.") from err
    except UNREADABLE as err:
        raise ModelError(f"{path} is not a program that torch.export.save wrote: {err}.") from err


def _example(program: torch.export.ExportedProgram) -> Example:
    """What a program takes, one of a batch."""
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
    example: Example = single[0] if is_one_tensor else single
    return example


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """What a logger of that name says meanwhile is lost: an error tells it."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
