"""Packages of others, installed by pip and found by their entry points."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from tests.end_to_end.pages import anchors

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "tests" / "plugins"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Package -> folder that it alone is installed in."""
    folder = tmp_path_factory.mktemp("site")
    for package in ("methods", "faults"):
        source = folder / "source" / package
        shutil.copytree(PACKAGES / package, source)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
               "--no-build-isolation", "--target", folder / package, source]  # fmt: skip
        subprocess.run(list(map(str, pip)), check=True, capture_output=True)
    return {package: folder / package for package in ("methods", "faults")}


@pytest.fixture(scope="module")
def project(trained: Path, blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(trained, folder / "model.pt")
    shutil.copy(blobs, folder / "blobs.npz")
    (folder / "compress.toml").write_text(
        'target = "host-cpu"\narch = "tests.conftest:make_conv_net"\ndata = "blobs.npz"\n'
        "trials = 4\nfine-tune-epochs = 1\n"
    )
    return folder


def python(*words: str | Path, site: Path, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join(map(str, (site, ROOT)))
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def compress(*words: str | Path, site: Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    main = "from compressor.cli import main; main()"
    return python("-c", main, *words, site=site, cwd=cwd)


def test_a_strategy_and_an_importance_of_others_are_used(
    site: dict[str, Path], project: Path
) -> None:
    asked = ("--search", "ladder", "--importance", "peak", "--constraint", "macs=0.8")
    done = compress(
        "model.pt", *asked, "--out", "theirs", "--json", site=site["methods"], cwd=project
    )
    assert done.returncode in (0, 3), done.stderr  # 3: within the limit, and not faster
    assert json.loads(done.stdout)["search"]["strategy"] == "ladder"
    storage = f"sqlite:///{project / 'theirs' / 'study.db'}"
    study = optuna.load_study(study_name=None, storage=storage)
    assert {trial.user_attrs["measured"]["phase"] for trial in study.trials} == {"ladder"}

    again = compress("replay", "theirs", site=site["methods"], cwd=project)
    assert again.returncode == 0, again.stderr
    without = compress("replay", "theirs", site=project, cwd=project)
    assert without.returncode == 2
    assert "Unknown --search 'ladder'" in without.stderr


def test_help_and_init_know_them(site: dict[str, Path], tmp_path: Path) -> None:
    said = compress("--help", site=site["methods"], cwd=tmp_path).stdout
    assert "ladder" in said
    assert "peak" in said
    assert compress("init", site=site["methods"], cwd=tmp_path).returncode == 0
    assert "swarm, ladder." in (tmp_path / "compress.toml").read_text().replace("\n# ", " ")


@pytest.mark.parametrize("contract", ["test_strategies.py", "test_importance.py"])
def test_they_pass_the_contract_of_ours(site: dict[str, Path], contract: str) -> None:
    done = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "ladder or peak",
        ROOT / "tests" / "unit" / contract, site=site["methods"],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@pytest.mark.bad_input("packages that cannot be used")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--search", "gone"), "'gone' of the package toy-faults cannot be imported: ImportError"),
        (("--search", "wrong"), "'wrong' of the package toy-faults (toy_faults.strategies:RUNGS)"),
        (("--search", "stubborn"), "which is no new plan."),
        (("--search", "raising"), "toy-faults: SystemExit: I have had enough"),
        (("--importance", "short"), "toy-faults: ValueError"),
        (("--importance", "negative"), "toy-faults: ValueError: the scores of"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    site: dict[str, Path], project: Path, tmp_path: Path, words: tuple[str, str], said: str
) -> None:
    done = compress(
        project / "model.pt", *words, "--constraint", "macs=0.8", "--out", tmp_path / "run",
        site=site["faults"], cwd=project,
    )  # fmt: skip
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert said in error
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.bad_input("packages that cannot be used")
def test_a_name_that_is_taken_stays_with_whom_it_was(
    site: dict[str, Path], project: Path, tmp_path: Path
) -> None:
    done = compress("init", site=site["faults"], cwd=tmp_path)
    assert done.returncode == 0
    (warning,) = [line for line in done.stderr.splitlines() if "toy-faults" in line]
    assert "'bocr', a name that compressor has" in warning


def test_contributing_shows_what_is_installed_here() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = PACKAGES / "methods"
    for name in ("ladder.py", "peak.py"):
        assert f"```python\n{(package / 'toy_methods' / name).read_text()}```\n" in page
    project = (package / "pyproject.toml").read_text()
    for block in re.findall(r"```toml\n(.*?)```", page, re.S):
        assert block in project
    for link, anchor in re.findall(r"\]\(([^)#]+)#([^)]+)\)", page):
        assert anchor in anchors(ROOT / link)
