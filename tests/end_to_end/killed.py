"""What the processes run that `test_resume.py` kills; imported by their fork server beforehand."""

import os
import sys
from pathlib import Path

import compressor
import compressor.api
import compressor.pipeline


def run(model: Path, flags: dict[str, object], out: Path) -> None:
    """Begins the run in `out`, or goes on with it."""
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if (out / "manifest.json").is_file():
        compressor.resume(out)
    else:
        compressor.compress(compressor.load_config(model, flags | {"out": out}))
