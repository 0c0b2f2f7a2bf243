"""Files that are written whole or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes | str) -> Path:
    """Writes to another name, has it on disk, and renames: nobody ever sees half a file.

    Args:
        path: Replaced where it exists.
        content: Text is written as UTF-8.

    Returns:
        `path`.
    """
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    if os.name == "posix":  # the new name is on disk too; elsewhere folders cannot be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path
