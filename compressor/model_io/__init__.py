"""Model file -> nn.Module and example input; which files are trusted.

A state_dict, or a checkpoint that holds one, is read with torch's restricted unpickler, which
builds tensors and plain containers and runs no code. Its architecture is one of torchvision's or
timm's (`--arch torchvision:resnet18`), or a factory that the user names
(`--arch pkg.mod:factory`). A pickled module runs code from the file while it is read, so it needs
`--trust`. So does a `.pt2` program with pickles in it, which torch.export.load would unpickle
unasked.
"""

import hashlib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ModelError, UntrustedModelError
from compressor.files import UNREADABLE, check_size
from compressor.inputs import LIBRARIES, PROGRAM_SUFFIX, check_file, check_model_file
from compressor.model_io.architectures import build, own_input_shape
from compressor.model_io.programs import read_program
from compressor.user_code import importable, told
from compressor.values import BATCH_NORMS, Example, LoadedModel

STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile


def load_model(
    path: Path,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, object] | None = None,
    input_shape: Sequence[int] | None = None,
    trust: bool = False,
) -> LoadedModel:
    """The trained network in eval mode on the CPU, and an input to trace it with.

    Args:
        path: A state_dict or a checkpoint holding one; a `.pt2` program, which comes back as
            torch.export makes it; or a pickled module, with `trust`.
        arch: `torchvision:NAME`, `timm:NAME`, or "package.module:factory", which is called with
            `arch_args` and returns the module. Modules beside the model file and in the current
            folder are found too. A checkpoint may name one of the first two itself.
        arch_args: Keyword arguments of the factory.
        input_shape: `(c, h, w)` of one input; None takes the architecture's or program's own.
        trust: Read pickles in the file although that runs code from it.

    Raises:
        ModelError: The file, the architecture or the weights cannot be used.
        UntrustedModelError: The file is a pickle that holds more than tensors.
    """
    check_model_file(path, arch)
    example: Example | None = None
    if path.suffix == PROGRAM_SUFFIX:
        module, example = read_program(path, trust=trust)
    else:
        content = _read(path, trust=trust)
        if isinstance(content, nn.Module):
            module = content
        else:
            arch = arch or _named_in(path, content)
            module = build(arch, dict(arch_args or {}), beside=path.parent)
            load_weights(path, module, find_state_dict(path, content), arch)
        module = module.cpu().eval()
    check_usable(path, module)
    if input_shape is None and example is None:
        input_shape = own_input_shape(module, arch)
    if input_shape is not None:
        example = torch.randn((1, *input_shape), generator=torch.Generator().manual_seed(0))
    if example is None:
        raise ModelError("The shape of one input is not known; give --input-shape C,H,W or data.")
    provenance = {
        "file": path.name,
        "sha256": sha256(path),
        "arch": arch,
        "arch_args": dict(arch_args or {}),
    }
    return LoadedModel(module, example, provenance)


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


def find_state_dict(path: Path, content: object) -> dict[str, Tensor]:
    """The tensors of a state_dict or of a checkpoint around one, without wrapper prefixes.

    Raises:
        ModelError: There is none.
    """
    if isinstance(content, Mapping):
        for key in STATE_DICT_KEYS:
            inner = content.get(key)
            if isinstance(inner, Mapping):
                content = inner
                break
        if content and all(isinstance(value, Tensor) for value in content.values()):
            tensors = {str(key): value for key, value in content.items()}
            for prefix in WRAPPER_PREFIXES:
                if all(key.startswith(prefix) for key in tensors):
                    tensors = {key.removeprefix(prefix): v for key, v in tensors.items()}
            return tensors
        found = f"a dict with the keys {sorted(map(str, content))[:8]}"
    else:
        found = f"a {type(content).__name__}"
    raise ModelError(
        f"{path} holds {found}; expected a state_dict (names to tensors) or a checkpoint with "
        f"one under {', '.join(STATE_DICT_KEYS)}."
    )


def check_usable(path: Path, module: nn.Module) -> None:
    """Raises `ModelError` where a weight is not finite float32, or a norm has no statistics."""
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if tensor.dtype != torch.float32:
            raise ModelError(
                f"{path}: {name} is {tensor.dtype}; expected float32. Call model.float() in the "
                f"factory; the target's precision is chosen at export."
            )
        n_bad = int((~tensor.isfinite()).sum())
        if n_bad:
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
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            if any("/code/" in name or name.endswith("constants.pkl") for name in names):
                raise ModelError(
                    f"{path} is a TorchScript archive; give the state_dict of the module that it "
                    f"was scripted from, with --arch."
                )
        content: object = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        if "weights_only" not in str(err) and "WeightsUnpickler" not in str(err):
            raise ModelError(f"{path} is not a file that torch.save wrote.") from err
        if not trust:
            raise UntrustedModelError(
                f"{path} is a pickle that holds more than tensors; reading it would run code "
                f"from the file. Save the weights alone with torch.save(model.state_dict(), "
                f"'weights.pt') and give --arch, or give --trust if you wrote the file."
            ) from err
    except UNREADABLE as err:
        raise ModelError(f"{path} is not a file that torch.save wrote: {err}.") from err
    else:
        return content
    try:
        with importable(path.parent):
            return torch.load(path, map_location="cpu", weights_only=False)
    except UNREADABLE as err:
        raise ModelError(f"{path} cannot be unpickled: {told(err)}.") from err


def load_weights(
    path: Path, module: nn.Module, state_dict: Mapping[str, Tensor], arch: str
) -> None:
    """Copies `state_dict` into `module`, in place.

    Raises:
        ModelError: Names or shapes differ; the message lists them.
    """
    expected = module.state_dict()
    missing = [key for key in expected if key not in state_dict]
    unexpected = [key for key in state_dict if key not in expected]
    reshaped = [
        f"{key} is {tuple(state_dict[key].shape)}, {arch} has {tuple(expected[key].shape)}"
        for key in expected
        if key in state_dict and state_dict[key].shape != expected[key].shape
    ]
    strange = [
        f"{key} is {state_dict[key].dtype}"
        for key in expected
        if key in state_dict
        and state_dict[key].is_floating_point() != expected[key].is_floating_point()
    ]
    faults = [
        f"{what}: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
        for what, keys in (
            ("missing in the file", missing),
            ("not in the network", unexpected),
            ("of another shape", reshaped),
            ("not of real numbers", strange),
        )
        if keys
    ]
    if faults:
        hint = _class_count_hint(arch, state_dict, expected)
        raise ModelError(f"{path} does not fit {arch}. {'; '.join(faults)}.{hint}")
    module.load_state_dict(dict(state_dict))


def _class_count_hint(
    arch: str, state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> str:
    """What to do where nothing but the number of classes differs."""
    other = [key for key in expected if key in state_dict
             and state_dict[key].shape != expected[key].shape]  # fmt: skip
    counts = {state_dict[key].shape[:1] for key in other}
    tails = all(state_dict[key].shape[1:] == expected[key].shape[1:] for key in other)
    if arch.partition(":")[0] not in LIBRARIES or len(counts) != 1 or not tails:
        return ""
    (count,) = counts
    return f" It seems to have {count[0]} classes: give --arch-arg num_classes={count[0]}."
