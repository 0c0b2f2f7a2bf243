"""Where device profiles lie.

They come with the package (`hardware_profiles`), lie in the user's own folder
(`~/.config/compressor/profiles`), or are named by path. This is apart from `targets` because TAB,
which asks for their names, cannot wait for torch.
"""

import os
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from compressor import files
from compressor.errors import ConfigError, unknown_name


def user_profiles() -> Path:
    """Where users keep profiles of their own."""
    place = os.environ.get("XDG_CONFIG_HOME") or files.home() / ".config"
    return Path(place) / "compressor" / "profiles"


def target_names() -> tuple[str, ...]:
    """Names of the profiles that come with the package and of the user's own, sorted."""
    return tuple(sorted(_profiles()))


def is_path(name: str) -> bool:
    """Whether it is the path of a profile, and not the name of one."""
    return name.endswith(".toml")


def profile_text(name: str) -> tuple[str, str, str]:
    """(text, name, what to call it in a message) of the profile.

    Args:
        name: Of a profile that has one, or the path of a TOML file.

    Raises:
        ConfigError: There is none of that name, or it cannot be read.
    """
    if is_path(name):
        path = Path(name)
        if not os.path.lexists(path):
            raise ConfigError(f"No device profile at {path}.")
        return _text(path), path.stem, str(path)
    known = _profiles()
    if name not in known:
        raise ConfigError(
            f"{unknown_name('target', name, known)} A path to your own profile (.toml) works "
            f"too, and so does a file in {user_profiles()}."
        )
    found = known[name]
    if isinstance(found, Path) and found.parent == user_profiles():
        return _text(found), name, str(found)
    return found.read_text(encoding="utf-8"), name, name


def _profiles() -> dict[str, Traversable]:
    """Name -> file of every profile that has a name; the user's own win."""
    found: dict[str, Traversable] = {}
    for file in resources.files("compressor.hardware_profiles").iterdir():
        if file.name.endswith(".toml"):
            found[file.name.removesuffix(".toml")] = file
    folder = user_profiles()
    if folder.is_dir():
        found |= {path.stem: path for path in folder.glob("*.toml")}
    return found


def _text(path: Path) -> str:
    try:
        return files.read_text(path, files.MAX_TOML_BYTES)
    except (OSError, ValueError) as err:
        raise ConfigError(f"Profile {path} cannot be read: {err}.") from err
