"""Architectures: a library's own by name, or a factory of the user's."""

import contextlib
import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from compressor.errors import ModelError
from compressor.inputs import LIBRARIES, check_arch
from compressor.user_code import USER_CODE_FAILURES, find, importable, told

# Arguments of a library's networks that download, or unpickle another file.
LOADING = (
    "weights",
    "weights_backbone",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "checkpoint_path",
    "cache_dir",
)


def build(arch: str, arch_args: Mapping[str, object], *, beside: Path) -> nn.Module:
    """What the factory `arch`, "package.module:factory", returns for `arch_args`.

    Raises:
        ModelError: It cannot be imported or called, or returns no module.
    """
    check_arch(arch, beside=beside)
    module_name, _, factory_name = arch.partition(":")
    if module_name in LIBRARIES:
        return _build_from_library(module_name, factory_name, arch_args)
    factory = find("--arch", arch, beside=beside, error=ModelError)
    if not callable(factory):
        raise ModelError(f"--arch {arch} is a {type(factory).__name__}; expected a function.")
    try:
        with contextlib.suppress(ValueError):  # some builtins tell no signature
            inspect.signature(factory).bind(**arch_args)
    except TypeError as err:
        raise ModelError(f"--arch {arch} does not take --arch-arg {arch_args}: {err}.") from err
    with importable(beside):
        try:
            module = factory(**arch_args)
        except USER_CODE_FAILURES as err:
            raise ModelError(f"--arch {arch} failed: {told(err)}.") from err
    if not isinstance(module, nn.Module):
        raise ModelError(f"--arch {arch} returned a {type(module).__name__}, not an nn.Module.")
    return module


def _build_from_library(library: str, name: str, arch_args: Mapping[str, object]) -> nn.Module:
    """A network of torchvision or timm, without pretrained weights: nothing is downloaded."""
    try:
        if library == "torchvision":
            from torchvision import models

            known, factory = models.list_models(), models.get_model
            fixed: dict[str, object] = {"weights": None}
            if name in ("googlenet", "inception_v3"):
                fixed["init_weights"] = False
            if name in models.list_models(module=models.detection) or name in models.list_models(
                module=models.segmentation
            ):
                fixed["weights_backbone"] = None
        else:
            import timm

            known, factory, fixed = timm.list_models(), timm.create_model, {"pretrained": False}
    except ImportError as err:
        raise ModelError(
            f"--arch {library}:{name} needs {library}, which cannot be imported: {told(err)}."
        ) from err
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise ModelError(f"{library} has no network {name!r}.{hint}")
    loading = [key for key in arch_args if key in LOADING and arch_args[key]]
    if loading:
        raise ModelError(
            f"--arch {library}:{name} with --arch-arg {loading[0]} would load other weights than "
            f"those of the model's file; leave it away."
        )
    try:
        module = factory(name, **{**fixed, **arch_args})
    except USER_CODE_FAILURES as err:
        raise ModelError(
            f"--arch {library}:{name} does not take --arch-arg {dict(arch_args)}: {told(err)}."
        ) from err
    assert isinstance(module, nn.Module)
    return module


def own_input_shape(module: nn.Module, arch: str | None) -> tuple[int, ...] | None:
    """The input that an architecture of a library was made for; None where it is not known."""
    library, _, name = (arch or "").partition(":")
    if library == "timm":
        config = getattr(module, "default_cfg", None) or {}
        return tuple(config["input_size"]) if "input_size" in config else None
    if library == "torchvision":
        return (3, 299, 299) if name == "inception_v3" else (3, 224, 224)
    return None
