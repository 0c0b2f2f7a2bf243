"""The wheel installs one import package and its data, and the command starts from it."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

import compressor

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(280)
def test_the_wheel_holds_one_package_and_the_command_starts(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tracked = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in tracked:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    wheels = tmp_path / "wheels"
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", wheels)
    run(sys.executable, *build, cwd=source)
    (wheel,) = wheels.iterdir()

    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    (site,) = home.glob("lib/python*/site-packages")
    before = {p.name for p in site.iterdir()}
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    new = {p.name for p in site.iterdir()} - before
    assert {name for name in new if not name.endswith(".dist-info")} == {"compressor"}
    installed = {p.name for p in (site / "compressor").iterdir()}
    assert {"cli", "hardware_profiles", "py.typed", "pipeline.py"} <= installed
    assert (site / "compressor" / "hardware_profiles" / "host-cpu.toml").is_file()

    # --help needs typer and rich; they are lent from this environment, not downloaded again.
    lent = next(p for p in map(Path, sys.path) if p.name == "site-packages")
    (site / "lent.pth").write_text(f"{lent}\n")
    text = run(home / "bin" / "compress", "--help", cwd=tmp_path)
    assert "--speedup" in text
    code = "import compressor, pathlib; print(pathlib.Path(compressor.__file__).parent)"
    assert run(python, "-c", code, cwd=tmp_path).strip() == str(site / "compressor")

    (info,) = site.glob("compressor-*.dist-info")
    assert f"compressor-{compressor.__version__}.dist-info" == info.name
    assert run(home / "bin" / "compress", "--version", cwd=tmp_path).split()[1] in info.name
    assert (info / "licenses" / "LICENSE").is_file()
