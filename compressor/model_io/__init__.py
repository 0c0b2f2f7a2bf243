"""Model file -> nn.Module and example input; which files are trusted.

A state_dict, or a checkpoint that holds one, is read with torch's restricted unpickler, which
builds tensors and plain containers and runs no code; safetensors files hold nothing else. Its
architecture is one of torchvision's or timm's (`--arch torchvision:resnet18`), or a factory that
the user names (`--arch pkg.mod:factory`). A pickled module runs code from the file while it is
read, so it needs `--trust`. So does a `.pt2` program with pickles in it, which torch.export.load
would unpickle unasked.
"""

import argparse
import hashlib
import logging
import math
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from compressor.errors import ModelError, UntrustedModelError
from compressor.files import UNREADABLE, check_size, memory_bytes
from compressor.inputs import (
    LIBRARIES,
    PROGRAM_SUFFIX,
    SAFETENSORS_SUFFIX,
    check_file,
    check_model_file,
)
from compressor.model_io.architectures import build, own_input_shape
from compressor.model_io.programs import read_program
from compressor.model_io.weights import averaged_beside, chosen, load_weights, modules_in
from compressor.user_code import importable, told
from compressor.values import BATCH_NORMS, Example, LoadedModel

PICKLE = b"\x80"  # begins one, as torch.save writes it without an archive around it
SAFETENSORS_HEAD = 8  # bytes of such a file before its JSON
# What training scripts keep beside weights, and what builds nothing but itself.
PLAIN_KINDS: list[Any] = [
    argparse.Namespace, np.dtype, np.float64().__reduce__()[0],
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdgFD"),
]  # fmt: skip

logger = logging.getLogger(__name__)


def load_model(
    path: Path,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, object] | None = None,
    input_shape: Sequence[int] | None = None,
    example: Example | None = None,
    trust: bool = False,
    weights_key: str | None = None,
) -> LoadedModel:
    """The trained network in eval mode on the CPU, and an input to trace it with.

    Args:
        path: A state_dict or a checkpoint with one in it, of torch.save or `.safetensors`; a
            `.pt2` program, which comes back as torch.export makes it; or a pickled module, or a
            checkpoint with one in it, with `trust`.
        arch: `torchvision:NAME`, `timm:NAME`, or "package.module:factory", which is called with
            `arch_args` and returns the module. Modules beside the model file and in the current
            folder are found too. A checkpoint may name one of the first two itself.
        arch_args: Keyword arguments of the factory.
        input_shape: `(c, h, w)` of one input; None takes the architecture's or program's own.
        example: What it takes, in place of `input_shape`: tensors of `(1, ...)`.
        trust: Read pickles in the file although that runs code from it.
        weights_key: Which weights of a checkpoint with several, such as "ema".

    Raises:
        ModelError: The file, the architecture or the weights cannot be used.
        UntrustedModelError: The file is a pickle that holds more than tensors.
    """
    check_model_file(path, arch)
    own: Example | None = None
    if path.suffix == PROGRAM_SUFFIX:
        module, own = read_program(path, trust=trust)
    else:
        content = _read(path, trust=trust)
        whole = modules_in(content) if arch is None or isinstance(content, nn.Module) else {}
        if whole:
            module = _one_of(path, whole, content, weights_key)
        else:
            arch = arch or _named_in(path, content)
            module = build(arch, dict(arch_args or {}), beside=path.parent)
            stood = load_weights(path, module, content, arch, weights_key=weights_key)
            logger.info("the weights stand under %s", stood or "the names of the network")
        module = nn.Module.cpu(module).eval()
    check_usable(path, module)
    if input_shape is None and example is None and own is None:
        input_shape = own_input_shape(module, arch)
    if input_shape is not None:
        own = _drawn(input_shape)
    example = own if example is None else example
    if example is None:
        raise ModelError("The shape of one input is not known; give --input-shape C,H,W or data.")
    provenance = {
        "file": path.name,
        "sha256": sha256(path),
        "arch": arch,
        "arch_args": dict(arch_args or {}),
    }
    return LoadedModel(module, example, provenance)


def _drawn(input_shape: Sequence[int]) -> Tensor:
    """An input of that shape.

    Raises:
        ModelError: It needs more memory than there is.
    """
    n_bytes = 4 * math.prod(input_shape)
    if n_bytes > memory_bytes():
        raise ModelError(
            f"One input of --input-shape {','.join(map(str, input_shape))} has "
            f"{n_bytes / 2**30:.0f} GiB, and this machine {memory_bytes() / 2**30:.0f}."
        )
    return torch.randn((1, *input_shape), generator=torch.Generator().manual_seed(0))


def _one_of(
    path: Path, whole: Mapping[str, nn.Module], content: object, weights_key: str | None
) -> nn.Module:
    """The network that was asked for; in float32 where a checkpoint keeps it in half precision.

    Raises:
        ModelError: There are several.
    """
    module: nn.Module = chosen(path, "networks", whole, weights_key, "")
    beside = averaged_beside(content, [tuple(key.split(".")) for key in whole])
    if beside and weights_key is None:
        raise ModelError(
            f"{path} holds a network under {next(iter(whole))}, and weights under "
            f"{', '.join(sorted(beside)[:5])} that may be what is shipped. To take the network, "
            f"give --weights-key {next(iter(whole))}."
        )
    kinds = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if "" not in whole and kinds == {torch.float16}:
        logger.info("%s holds its network in float16; it goes on in float32", path)
        module = nn.Module.float(module)
    return module


def _named_in(path: Path, content: object) -> str:
    """The architecture that a checkpoint names; only well-known ones, for it decides what runs.

    Raises:
        ModelError: It names none, or another.
    """
    named = content.get("arch") if isinstance(content, Mapping) else None
    if isinstance(named, str) and named.partition(":")[0] in LIBRARIES:
        return named
    says = f" (it says arch={named!r})" if isinstance(named, str) else ""
    raise ModelError(
        f"{path} holds weights only{says}. Name their network: --arch torchvision:NAME, "
        f"--arch timm:NAME, or the function that builds it, --arch package.module:factory."
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a `model.pt` that a run left.

    Raises:
        ModelError: It is another file.
    """
    check_file(path, "model", ModelError)
    content = _read(path, trust=False)
    wanted = {"state_dict", "plan", "arch", "arch_args", "input_shape"}
    if not isinstance(content, dict) or not wanted <= content.keys():
        raise ModelError(f"{path} is not the model.pt of a run: it lacks {sorted(wanted)}.")
    return content


def check_usable(path: Path, module: nn.Module) -> None:
    """Raises `ModelError` where a weight is not finite float32, or a norm has no statistics."""
    learned = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if tensor.layout is not torch.strided or nn.parameter.is_lazy(tensor):
            raise ModelError(f"{path}: {name} is sparse or not initialised; expected numbers.")
        if tensor.dtype != torch.float32:
            raise ModelError(
                f"{path}: {name} is {tensor.dtype}; expected float32. Call model.float() in the "
                f"factory; the target's precision is chosen at export."
            )
        n_bad = int((~tensor.isfinite()).sum())
        is_learned = name in learned or name.endswith(("running_mean", "running_var"))
        if n_bad and is_learned:  # a mask may hold -inf
            raise ModelError(
                f"{path}: {n_bad} of {tensor.numel()} values of {name} are NaN or infinite; "
                f"the training that wrote it diverged."
            )
    for name, layer in module.named_modules():
        if isinstance(layer, BATCH_NORMS) and layer.running_mean is None:
            raise ModelError(
                f"{path}: {name} has no running statistics, so its answer for an image depends on "
                f"the other images of the batch. Build it with track_running_stats=True."
            )


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, *, trust: bool) -> object:
    try:
        check_size(path)
        with path.open("rb") as file:
            begins = file.read(len(PICKLE) + SAFETENSORS_HEAD)
        is_zip = zipfile.is_zipfile(path)
        if path.suffix.lower() == SAFETENSORS_SUFFIX or begins[SAFETENSORS_HEAD:][:1] == b"{":
            return load_file(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            if any("/code/" in name or name.endswith("constants.pkl") for name in names):
                raise ModelError(
                    f"{path} is a TorchScript archive; give the state_dict of the module that it "
                    f"was scripted from, with --arch."
                )
        with torch.serialization.safe_globals(PLAIN_KINDS):
            content: object = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        is_other = "weights_only" not in str(err) and "WeightsUnpickler" not in str(err)
        if is_other or not (is_zip or begins.startswith(PICKLE)):
            raise ModelError(f"{path} is not a file that torch.save wrote.") from err
        if not trust:
            raise UntrustedModelError(
                f"{path} is a pickle that holds more than tensors{_named(err)}; reading it would "
                f"run code from the file. Save the weights alone with "
                f"torch.save(model.state_dict(), 'weights.pt') and give --arch, or give --trust "
                f"if you wrote the file."
            ) from err
    except SafetensorError as err:
        raise ModelError(f"{path} is not a safetensors file: {err}.") from err
    except UNREADABLE as err:
        raise ModelError(f"{path} is not a file that torch.save wrote: {err}.") from err
    else:
        return content
    try:
        with importable(path.parent):
            return torch.load(path, map_location="cpu", weights_only=False)
    except UNREADABLE as err:
        raise ModelError(f"{path} cannot be unpickled: {told(err)}.") from err


def _named(err: pickle.UnpicklingError) -> str:
    """Which class or function torch did not call, where it says so."""
    found = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(err))
    return f" ({found[1]})" if found else ""
