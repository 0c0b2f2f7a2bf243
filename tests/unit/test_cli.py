"""What the command line knows before anything heavy is imported."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from compressor.cli import options

from compressor.config import Config
from compressor.training import SCHEDULES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("names", "field"),
    [
        (options.CLUSTERINGS, "clustering"),
        (options.ROLLBACKS, "rollback"),
        (options.BOUNDS, "bounds"),
        (options.FITS, "fit_to_limit"),
        (options.SCHEDULES, "schedule"),
    ],
)
def test_help_and_tab_know_the_names_that_are_taken(names: tuple[str, ...], field: str) -> None:
    assert names == get_args(Config.model_fields[field].annotation)


def test_names_are_those_of_what_they_choose() -> None:
    assert set(options.SCHEDULES) == set(SCHEDULES)


def completed(words: str, tmp_path: Path) -> list[str]:
    """What bash offers after `words`, by the script that is installed."""
    command = tmp_path / "compress"
    command.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'from compressor.cli import main; main()' \"$@\"\n"
    )
    command.chmod(0o755)
    script = (
        'eval "$(_COMPRESS_COMPLETE=source_bash compress)"\n'
        f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        '_compress_completion compress; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, cwd=ROOT,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("compress ins", ["inspect"]),
        ("compress --spee", ["--speedup"]),
        ("compress model.pt --max-", ["--max-latency", "--max-drop"]),
        ("compress model.pt --target jetson-na", ["jetson-nano"]),
        ("compress model.pt --search b", ["bocr", "bo"]),
        ("compress measure --fail", ["--fail-below"]),
    ],
)
def test_tab_completes(words: str, offered: list[str], tmp_path: Path) -> None:
    assert completed(words, tmp_path) == offered
