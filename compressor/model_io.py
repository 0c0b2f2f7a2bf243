"""Model file -> nn.Module and example input; which files are trusted.

A state_dict, or a checkpoint that holds one, is read with torch's restricted unpickler, which
builds tensors and plain containers and runs no code. Its architecture is a factory that the user
names (`--arch pkg.mod:factory`). A pickled module runs code from the file while it is read, so it
needs `--trust`.
"""

import contextlib
import hashlib
import importlib
import inspect
import pickle
import sys
import traceback
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ModelError, UntrustedModelError, unknown_name
from compressor.values import BATCH_NORMS, LoadedModel

STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile
# What code that is not ours may raise while it is imported, called or unpickled.
_USER_CODE_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
REFUSED_SUFFIXES = {
    ".onnx": "an ONNX file; give the PyTorch model that it was exported from",
    ".pt2": "a torch.export program, which is not read yet; save its state_dict and give --arch",
    ".engine": "a TensorRT engine; give the PyTorch model that it was built from",
    ".safetensors": "a safetensors file; load it and torch.save its tensors as a state_dict",
}


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
        path: A state_dict or a checkpoint holding one; or a pickled module, with `trust`.
        arch: "package.module:factory"; called with `arch_args`, returns the module. Modules
            beside the model file and in the current folder are found too.
        arch_args: Keyword arguments of the factory.
        input_shape: `(c, h, w)` of one input.
        trust: Read a pickled module although that runs code from the file.

    Raises:
        ModelError: The file, the architecture or the weights cannot be used.
        UntrustedModelError: The file is a pickle that holds more than tensors.
    """
    if not path.is_file():
        raise ModelError(f"No model file at {path}.")
    if path.suffix in REFUSED_SUFFIXES:
        raise ModelError(f"{path} is {REFUSED_SUFFIXES[path.suffix]}.")
    content = _read(path, trust=trust)
    if isinstance(content, nn.Module):
        module = content
    else:
        if arch is None:
            raise ModelError(
                f"{path} holds weights only. Name the function that builds their network: "
                f"--arch package.module:factory."
            )
        module = build(arch, dict(arch_args or {}), beside=path.parent)
        load_weights(path, module, find_state_dict(path, content), arch)
    check_usable(path, module)
    if input_shape is None:
        raise ModelError("The shape of one input is not known; give --input-shape C,H,W or data.")
    module = module.cpu().eval()
    example = torch.randn((1, *input_shape), generator=torch.Generator().manual_seed(0))
    provenance = {
        "file": path.name,
        "sha256": sha256(path),
        "arch": arch,
        "arch_args": dict(arch_args or {}),
    }
    return LoadedModel(module, example, provenance)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a `model.pt` that a run left.

    Raises:
        ModelError: It is another file.
    """
    if not path.is_file():
        raise ModelError(f"No model file at {path}.")
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
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(
                "/code/" in name or name.endswith("constants.pkl") for name in archive.namelist()
            ):
                raise ModelError(
                    f"{path} is a TorchScript archive; give the state_dict of the module that it "
                    f"was scripted from, with --arch."
                )
    try:
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
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as err:
        raise ModelError(f"{path} is not a file that torch.save wrote.") from err
    else:
        return content
    try:
        with _importable(path.parent):
            return torch.load(path, map_location="cpu", weights_only=False)
    except (*_USER_CODE_FAILURES, EOFError, pickle.UnpicklingError) as err:
        raise ModelError(f"{path} cannot be unpickled: {_told(err)}.") from err


def build(arch: str, arch_args: Mapping[str, object], *, beside: Path) -> nn.Module:
    """What the factory `arch`, "package.module:factory", returns for `arch_args`.

    Raises:
        ModelError: It cannot be imported or called, or returns no module.
    """
    module_name, _, factory_name = arch.partition(":")
    if not module_name or not factory_name:
        raise ModelError(f"--arch must be package.module:factory; got {arch!r}.")
    with _importable(beside):
        _forget_namesake(module_name.partition(".")[0], beside)
        try:
            python_module = importlib.import_module(module_name)
        except _USER_CODE_FAILURES as err:
            raise ModelError(
                f"--arch {arch}: cannot import {module_name}: {_told(err)}. It is looked for in "
                f"the current folder, beside the model and among installed packages."
            ) from err
    factory = getattr(python_module, factory_name, None)
    if not callable(factory):
        known = [n for n, v in vars(python_module).items() if callable(v) and n[0] != "_"]
        where = f"function of {module_name} (--arch)"
        raise ModelError(unknown_name(where, factory_name, known))
    try:
        with contextlib.suppress(ValueError):  # some builtins tell no signature
            inspect.signature(factory).bind(**arch_args)
    except TypeError as err:
        raise ModelError(f"--arch {arch} does not take --arch-arg {arch_args}: {err}.") from err
    with _importable(beside):
        try:
            module = factory(**arch_args)
        except _USER_CODE_FAILURES as err:
            raise ModelError(f"--arch {arch} failed: {_told(err)}.") from err
    if not isinstance(module, nn.Module):
        raise ModelError(f"--arch {arch} returned a {type(module).__name__}, not an nn.Module.")
    return module


def _told(err: BaseException) -> str:
    """The kind and text of an error in the user's code, and its line."""
    place = ""
    for frame in traceback.extract_tb(err.__traceback__):
        if frame.filename != __file__ and not frame.filename.startswith("<"):
            place = f" ({frame.filename}, line {frame.lineno})"
    return f"{type(err).__name__}: {err}{place}"


def _forget_namesake(module_name: str, beside: Path) -> None:
    """Two projects may each have a `network.py`; Python would keep the first it saw."""
    wanted = (beside / f"{module_name}.py").resolve()
    known = getattr(sys.modules.get(module_name), "__file__", None)
    if known is not None and wanted.is_file() and Path(known).resolve() != wanted:
        del sys.modules[module_name]


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Python modules in `folder` and in the current folder can be imported meanwhile."""
    extra = [str(folder.resolve()), str(Path.cwd())]
    sys.path[:0] = extra
    try:
        yield
    finally:
        for entry in extra:
            sys.path.remove(entry)


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
        raise ModelError(f"{path} does not fit --arch {arch}. {'; '.join(faults)}.")
    module.load_state_dict(dict(state_dict))
