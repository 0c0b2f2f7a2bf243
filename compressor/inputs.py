"""What can be said of the files and names that users give before a heavy library reads them.

Nothing here imports torch or code of the user's. What reads a file or a name further checks it by
these functions first, so that no rule stands twice.
"""

import difflib
import tempfile
from pathlib import Path

from compressor.errors import (
    CompressorError,
    ConfigError,
    DataError,
    ModelError,
    RunFolderError,
    TaskError,
)
from compressor.user_code import check_can_be_found, is_installed

LIBRARIES = ("torchvision", "timm")  # whose networks have names, which a file may give itself
PROGRAM_SUFFIX, SAFETENSORS_SUFFIX = ".pt2", ".safetensors"
REFUSED_SUFFIXES = {
    ".onnx": "an ONNX file; give the PyTorch model that it was exported from",
    ".engine": "a TensorRT engine; give the PyTorch model that it was built from",
}
REFUSED_BEGINNINGS = {
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself (git lfs pull)",
    b"<": "text like that of a web page; download the file itself",
    b"\x1f\x8b": "packed with gzip; give the file in it",
    b"\x89HDF": "an HDF5 file, as Keras writes them; give a PyTorch model",
    b"{": "JSON; give the file with the weights themselves",
}
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
)


def check_file(path: Path, what: str, error: type[CompressorError]) -> None:
    """Whether `path` is a file that holds something and can be read.

    Args:
        path: As the user gave it.
        what: It is to be, for messages: "model", "ONNX".
        error: Raised where it is not.
    """
    try:
        if path.is_dir():
            raise error(f"{path} is a folder; give the path of the {what} file itself.")
        if not path.is_file():
            raise error(f"No {what} file at {path}{_meant(path)}.")
        with path.open("rb") as file:
            if not file.read(1):
                raise error(f"{path} is empty; expected the {what} file.")
    except OSError as err:
        raise error(f"The {what} file {path} cannot be read: {err.strerror}.") from err


def _meant(path: Path) -> str:
    """What else is there, of nearly that name."""
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    names = [each.name for each in path.parent.iterdir() if each.is_file()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.8)
    return f"; {path.with_name(close[0])} is there" if close else ""


def check_model_file(path: Path, arch: str | None = None) -> None:
    """Whether `path` may be a trained network.

    Args:
        path: Of the model.
        arch: What builds its network, where that was named.

    Raises:
        ModelError: There is no such file, or it is of a kind that cannot be used.
    """
    check_file(path, "model", ModelError)
    if path.suffix.lower() in REFUSED_SUFFIXES:
        raise ModelError(f"{path} is {REFUSED_SUFFIXES[path.suffix.lower()]}.")
    with path.open("rb") as file:
        begins = file.read(32)
    for beginning, what in REFUSED_BEGINNINGS.items():
        if begins.startswith(beginning):
            raise ModelError(f"{path} is {what}.")
    if path.suffix == PROGRAM_SUFFIX and arch is not None:
        raise ModelError(f"{path} is a program and describes itself; leave --arch away.")


def check_arch(arch: str, *, beside: Path) -> None:
    """Whether `arch` has a form that can be built, and its module can be found.

    Args:
        arch: `torchvision:NAME`, `timm:NAME` or "package.module:factory".
        beside: Folder of the model.

    Raises:
        ModelError: It has another form, or nothing of that name is there.
    """
    module_name, _, name = arch.partition(":")
    if not module_name or not name:
        raise ModelError(
            f"--arch must be torchvision:NAME, timm:NAME or package.module:factory; got {arch!r}."
        )
    if module_name not in LIBRARIES:
        check_can_be_found("--arch", arch, beside=beside, error=ModelError)
    elif not is_installed(module_name):
        raise ModelError(
            f"--arch {arch} needs {module_name}: pip install 'compressor[{module_name}]'."
        )


def check_task(reference: str, *, beside: Path) -> None:
    """Whether `reference` has the form of a task, and its module can be found.

    Args:
        reference: "package.module:object".
        beside: Folder of the model.

    Raises:
        TaskError: It has another form, or nothing of that name is there.
    """
    module_name, _, name = reference.partition(":")
    if not module_name or not name:
        raise TaskError(f"--task must be package.module:object; got {reference!r}.")
    check_can_be_found("--task", reference, beside=beside, error=TaskError)


def check_data(
    source: Path,
    *,
    image_size: int | None = None,
    n_channels: int | None = None,
    classes: Path | None = None,
) -> None:
    """Whether `source` may hold images, and what is said of them suits it.

    Args:
        source: An `.npz` file, or a folder.
        image_size: Side that image files are to be resized to.
        n_channels: That the network takes, where that was given.
        classes: File with the order of the class folders.

    Raises:
        DataError: Nothing is there, it is of another kind, or the settings are for another.
    """
    try:
        if not source.exists():
            raise DataError(f"No data at {source}; expected an .npz file or a folder (--data).")
        if classes is not None:
            check_file(classes, "classes", DataError)
        if source.is_dir():
            has_folders = bool(folders(source))
            if not has_folders and not loose_images(source):
                raise DataError(no_classes(source, source))
            if not has_folders and classes is not None:
                raise DataError(
                    f"--classes orders class folders; {source} holds images without any."
                )
            if n_channels not in (None, 1, 3):
                raise DataError(
                    f"Image files have 1 or 3 channels; --input-shape asks {n_channels}."
                )
            return
    except OSError as err:
        raise DataError(f"--data {source} cannot be read: {err.strerror}.") from err
    if classes is not None:
        raise DataError(f"--classes orders class folders; {source} has its labels as numbers.")
    if source.suffix.lower() != ".npz":
        raise DataError(f"--data must be an .npz file or a folder of images; got {source}.")
    check_file(source, "data", DataError)
    if image_size is not None:
        raise DataError(f"--image-size resizes image files; {source} is used as it is.")


def folders(parent: Path) -> list[Path]:
    """The folders in `parent` that are not hidden, by name."""
    return sorted(p for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))


def loose_images(parent: Path) -> list[Path]:
    """The image files that lie in `parent` itself and are not hidden, by name."""
    return sorted(
        path for path in parent.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        and path.is_file()
    )  # fmt: skip


def no_classes(folder: Path, source: Path) -> str:
    """What is wrong with a `folder` of the data at `source` that has nothing in it."""
    return (
        f"{folder} must hold one folder per class; it holds no folder and no image. Expected "
        f"{source}/<class>/*.png or {source}/train/<class>/*.png; or, where there are no labels, "
        f"{source}/*.png."
    )


def check_writable(wanted: Path) -> None:
    """Whether the folder `wanted` can be written, or made, by what the system says to a try.

    Permissions say less: the superuser passes them, and a disk may be read-only.

    Raises:
        ConfigError: `wanted` is or lies under a file.
        RunFolderError: It cannot be written.
    """
    try:
        there = next(p for p in (wanted, *wanted.absolute().parents) if p.exists())
        if not there.is_dir():
            where = "is" if there == wanted else f"lies under {there}, which is"
            raise ConfigError(
                f"The run folder {wanted} {where} a file; name one that is new with --out."
            )
        with tempfile.TemporaryFile(dir=there):
            pass
    except (OSError, ValueError) as err:  # ValueError for a name that no file can have
        said = err.strerror if isinstance(err, OSError) else err
        raise RunFolderError(
            f"The run folder {wanted} cannot be written: {said}. Name another one with --out."
        ) from err


def check_has_dashboard() -> None:
    """Whether optuna-dashboard, which is optional, is installed.

    Raises:
        CompressorError: It is not.
    """
    if not is_installed("optuna_dashboard"):
        raise CompressorError(
            "The dashboard needs optuna-dashboard: pip install 'compressor[dashboard]'."
        )
