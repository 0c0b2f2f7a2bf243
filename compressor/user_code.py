"""Code that is not ours: found by its name, and what it may do to us told in our words."""

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from compressor.errors import CompressorError, unknown_name

OWN_FOLDER = str(Path(__file__).parent)
# What code that is not ours may raise while it is imported or called: whatever it likes, and it
# may mean to end the program. Only where nothing of ours runs within.
USER_CODE_FAILURES = (Exception, SystemExit)
LOOKED_FOR = (
    "It is looked for in the current folder, beside the model and among installed packages."
)


def find(flag: str, reference: str, *, beside: Path, error: type[CompressorError]) -> object:
    """What `reference`, "package.module:name", means.

    Args:
        flag: That the reference was given by, for messages.
        reference: Is looked for beside the model, in the current folder and among installed
            packages.
        beside: Folder of the model.
        error: Raised where it is not found.
    """
    check_can_be_found(flag, reference, beside=beside, error=error)
    module_name, _, name = reference.partition(":")
    with importable(beside):
        _forget_namesake(module_name.partition(".")[0], beside)
        try:
            python_module = importlib.import_module(module_name)
        except USER_CODE_FAILURES as err:
            raise error(
                f"{flag} {reference}: cannot import {module_name}: {told(err)}. {LOOKED_FOR}"
            ) from err
    if not hasattr(python_module, name):
        known = [n for n, v in vars(python_module).items() if callable(v) and n[0] != "_"]
        raise error(unknown_name(f"name in {module_name} ({flag})", name, known))
    return getattr(python_module, name)


def check_can_be_found(
    flag: str, reference: str, *, beside: Path, error: type[CompressorError]
) -> None:
    """Whether the package of `reference` is there; nothing of it is run.

    Args:
        flag: That the reference was given by, for messages.
        reference: "package.module:name".
        beside: Folder of the model.
        error: Raised where it is not.
    """
    module_name = reference.partition(":")[0]
    package = module_name.partition(".")[0]
    is_name = all(part.isidentifier() for part in module_name.split("."))
    with importable(beside):
        if not is_name or not is_installed(package):
            raise error(
                f"{flag} {reference}: cannot import {module_name}: nothing called {package!r} is "
                f"there. {LOOKED_FOR}"
            )


def is_installed(package: str) -> bool:
    """Whether a module or package of that name, without dots, can be imported from here."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it is there already and does not say where it came from
        return True


def told(err: BaseException) -> str:
    """The kind and text of an error in the user's code, and its line."""
    place = ""
    for frame in traceback.extract_tb(err.__traceback__):
        if not frame.filename.startswith(OWN_FOLDER) and not frame.filename.startswith("<"):
            place = f" ({frame.filename}, line {frame.lineno})"
    return f"{type(err).__name__}: {err}{place}"


def _forget_namesake(module_name: str, beside: Path) -> None:
    """Two projects may each have a `network.py`; Python would keep the first it saw."""
    wanted = (beside / f"{module_name}.py").resolve()
    known = getattr(sys.modules.get(module_name), "__file__", None)
    if known is not None and wanted.is_file() and Path(known).resolve() != wanted:
        del sys.modules[module_name]


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Python modules in `folder` and in the current folder can be imported meanwhile."""
    extra = [str(folder.resolve()), str(Path.cwd())]
    sys.path[:0] = extra
    try:
        yield
    finally:
        for entry in extra:
            sys.path.remove(entry)
