"""What can be refused without torch is refused without it, and says what to do."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "scipy", "optuna", "botorch", "plotly")
# Runs commands one after another in one process, which has imported nothing heavy at first, and
# would keep what one of them had imported.
COMMANDS = f"""
import contextlib, io, json, sys
from compressor.cli import main
for line in sys.stdin:
    err, code = io.StringIO(), None
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main(json.loads(line))
        except SystemExit as end:
            code = end.code
        except BaseException as fault:
            code = repr(fault)
    heavy = [name for name in {HEAVY} if name in sys.modules]
    print(json.dumps([code, err.getvalue(), out.getvalue(), heavy]), flush=True)
"""
LONG = "x" * 300  # no file can be called that
BROKEN = {
    "text.toml": "opset = [",
    "keys.toml": 'description = "mine"\n[runtime]\nkind = "abacus"\n',
    "devices.toml": '[shelf]\nuser = "me"\n[attic]\naddress = "ssh://me@host"\n'
    'ssh_config = "/none"\n',
}
READY = ("model.pt", "--target", "host-cpu", "--speedup", "2", "--data", "data.npz")


@dataclass(frozen=True)
class Refusal:
    """One command that cannot be done."""

    args: tuple[str, ...]
    code: int
    message: str


def refused(args: str, code: int, message: str) -> Refusal:
    return Refusal(tuple(args.split()), code, message)


def run(more: str, code: int, message: str, *without: str) -> Refusal:
    """`compress` with all it needs, but for the option `without`, and with `more`."""
    words = list(READY)
    for option in without:
        at = words.index(option)
        del words[at : at + 2]
    return Refusal((*words, *more.split()), code, message)


REFUSALS = [
    # The model.
    refused("nope.pt --target host-cpu --speedup 2 --data d", 2, "No model file at nope.pt"),
    refused("modle.pt --target host-cpu --speedup 2 --data data.npz", 2, "model.pt is there"),
    refused("no/model.pt --target host-cpu --speedup 2 --data data.npz", 2, "no folder no"),
    refused("images --target host-cpu --speedup 2 --data data.npz", 2, "images is a folder; give"),
    refused("empty.pt --target host-cpu --speedup 2 --data data.npz", 2, "empty.pt is empty"),
    refused("/proc/self/mem --target host-cpu --speedup 2 --data data.npz", 2, "cannot be read"),
    refused(f"{LONG} --target host-cpu --speedup 2 --data d", 2, "cannot be read: File name too"),
    refused(f"{LONG}/m.pt --target host-cpu --speedup 2 --data d", 2, "File name too long"),
    refused("net.onnx --target host-cpu --speedup 2 --data data.npz", 2, "is an ONNX file; give"),
    refused("net.pt2 --arch a:b --target host-cpu --speedup 2 --data data.npz", 2, "--arch away"),
    # Flags.
    run("", 2, "For which device? Give --target", "--target"),
    run("", 2, "How fast must it be? Give --speedup 2", "--speedup"),
    run("", 2, "No images to rank plans by; give --data", "--data"),
    run("--no-such-flag", 2, "No such option"),
    run("--trials 0", 2, "--trials: Input should be greater than or equal to 1 (got 0)"),
    run("--search bcor", 2, "Did you mean 'bocr'?"),
    run("--max-latency 12ms", 2, "give either speedup or max-latency, not both"),
    run("--pareto", 2, "not both"),
    run("--mean 0.5", 2, "mean has 1 values and std 0"),
    run("--constraint macs", 2, "expected KEY=VALUE"),
    run("--task masks:Task", 2, "a task brings its own data; leave data away"),
    run("--task masks:Task --search genetic", 2, "looks at classes; a task has none", "--data"),
    # compress.toml.
    refused("toml/model.pt --target host-cpu --speedup 2", 2, "compress.toml cannot be read"),
    refused("key/model.pt --target host-cpu", 2, "compress.toml 'spedup'. Did you mean 'speed"),
    # Images, architecture, task.
    run("--data none.npz", 2, "No data at none.npz; expected an .npz file or a folder", "--data"),
    run("--data hollow", 2, "hollow must hold one folder per class; it holds no", "--data"),
    run("--data flat --classes masks.py", 2, "flat holds images without any", "--data"),
    run("--labels no", 2, "Unknown --labels 'no'"),
    run("--labels none --classes devices.toml", 2, "without labels, leave classes away"),
    run("--data model.pt", 2, "--data must be an .npz file or a folder of images", "--data"),
    run("--data empty.npz", 2, "empty.npz is empty", "--data"),
    run("--image-size 8", 2, "--image-size resizes image files; data.npz is used as it is"),
    run("--data images --input-shape 2,8,8", 2, "1 or 3 channels; --input-shape asks", "--data"),
    run("--arch resnet18", 2, "--arch must be torchvision:NAME, timm:NAME or package.module"),
    run("--arch nonsense:f", 2, "cannot import nonsense: nothing called 'nonsense' is there"),
    run("--arch ../net:f", 2, "cannot import ../net"),
    run("--task masks", 2, "--task must be package.module:object; got 'masks'", "--data"),
    run("--task nowhere:x", 2, "--task nowhere:x: cannot import nowhere", "--data"),
    # The device.
    run("--target host-gpu", 2, "Unknown target 'host-gpu'. Did you mean 'host-cpu'?", "--target"),
    run("--target none.toml", 2, "No device profile at none.toml", "--target"),
    run("--target text.toml", 2, "Profile text.toml is broken", "--target"),
    run("--target keys.toml", 2, "Profile keys.toml is broken: runtime.kind", "--target"),
    run("--precision fp8", 2, "Unknown precision 'fp8'"),
    run("--device ssh://-oProxy", 2, "Expected --device ssh://user@host[:port]"),
    run("--device shelff", 2, "Unknown device 'shelff'. Did you mean 'shelf'?"),
    run("--device shelf", 2, '[shelf] needs address = "ssh://user@host"'),
    run("--device attic", 2, "[attic] ssh_config: there is no file /none"),
    run("--device ssh://me@host --estimate", 2, "give either device (to measure) or estimate"),
    # The run folder.
    run("--out full", 2, "--out full holds other files; name a folder that is empty or new"),
    run("--out begun", 2, "--out begun holds another run"),
    run("--out model.pt", 2, "model.pt is a file"),
    run("--out model.pt/run", 2, "model.pt, which is a file"),
    run("--out /proc/run", 2, "The run folder /proc/run cannot be written"),
    run("--out /proc/sys/kernel/run/1", 2, "cannot be written"),
    run(f"--out {LONG}", 2, "cannot be written: File name too long"),
    # Commands that go on with a run, or show it.
    refused("resume nowhere", 2, "nowhere has no config.toml: no run was begun there"),
    refused("resume model.pt", 2, "no config.toml"),
    refused("resume begun", 2, "begun has no manifest.json"),
    refused("resume gone", 2, "No model file at"),
    refused("replay nowhere", 2, "nowhere has no config.toml"),
    refused("replay gone", 2, "No study at gone/study.db"),
    refused("report nowhere", 2, "No study at nowhere/study.db: no run was begun in nowhere"),
    refused("report full", 2, "No study at full/study.db"),
    refused("dashboard nowhere", 2, "No study at nowhere/study.db"),
    refused("dashboard strange", 2, "it is not an SQLite file"),
    # Commands that look at something.
    refused("measure none.onnx --target host-cpu", 2, "No ONNX file at none.onnx"),
    refused("measure net.onnx --target host-cpu --against images", 2, "images is a folder"),
    refused("measure net.onnx --target host-gpu", 2, "Unknown target 'host-gpu'"),
    refused("measure net.onnx --target host-cpu --fail-below 1", 2, "give that file too"),
    refused("measure net.onnx --target host-cpu --device ssh://", 2, "Expected --device ssh"),
    refused("measure net.onnx --target jetson-nano --precision fp8", 2, "Unknown precision"),
    refused("inspect nope.pt", 2, "No model file at nope.pt"),
    refused("inspect model.pt --arch nonsense:f", 2, "cannot import nonsense"),
    refused("explain nope.pt --target host-cpu", 2, "No model file at nope.pt"),
    refused("explain model.pt", 2, "For which device?"),
    refused("explain model.pt --target host-gpu", 2, "Did you mean 'host-cpu'?"),
    refused("probe --target host-gpu", 2, "Did you mean 'host-cpu'?"),
    refused("probe --target host-cpu --device nobody", 2, "Unknown device 'nobody'"),
    refused("targets nano", 2, "Unknown target 'nano'"),
    refused("init nowhere", 2, "nowhere/compress.toml cannot be written"),
    refused("inspct model.pt", 2, "Unknown command 'inspct'. Did you mean 'inspect'?"),
]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that may be a model and its images, as far as is told without reading them."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("model.pt", "net.onnx", "net.pt2", "data.npz"):
        (folder / name).write_bytes(b"something")
    for name in ("empty.pt", "empty.npz"):
        (folder / name).touch()
    for name in ("images/cat", "hollow", "full", "begun", "gone", "strange", "toml", "key"):
        (folder / name).mkdir(parents=True)
    (folder / "flat").mkdir()
    (folder / "flat" / "1.png").write_bytes(b"something")
    (folder / "full" / "thesis.txt").write_text("precious")
    (folder / "strange" / "study.db").write_text("SQL")
    wanted = 'target = "host-cpu"\nspeedup = 2\n'
    (folder / "begun" / "config.toml").write_text(f'{wanted}model = "model.pt"\n')
    (folder / "gone" / "config.toml").write_text(f'{wanted}model = "no.pt"\ndata = "data.npz"\n')
    (folder / "gone" / "manifest.json").write_text('{"schema": 1}')
    (folder / "toml" / "compress.toml").write_text("trials = \n")
    (folder / "key" / "compress.toml").write_text("spedup = 2\n")
    (folder / "masks.py").write_text("raise SystemExit('user code ran')\n")
    for name in ("text.toml", "keys.toml"):
        (folder / name).write_text(BROKEN[name])
    (folder / "home" / "compressor").mkdir(parents=True)
    (folder / "home" / "compressor" / "devices.toml").write_text(BROKEN["devices.toml"])
    return folder


@pytest.fixture(scope="module")
def told(project: Path) -> dict[Refusal, tuple[int, str, str, list[str]]]:
    """Refusal -> exit code, stderr, stdout, and what heavy was imported until then."""
    before = sorted(project.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input="".join(f"{json.dumps(refusal.args)}\n" for refusal in REFUSALS),
        capture_output=True, text=True, check=True, cwd=project,
        env=os.environ | {"XDG_CONFIG_HOME": str(project / "home"), "COLUMNS": "200"},
    )  # fmt: skip
    assert sorted(project.rglob("*")) == before
    return dict(zip(REFUSALS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: " ".join(r.args)[:90])
def test_it_is_refused_before_torch_is_imported(
    refusal: Refusal, told: dict[Refusal, tuple[int, str, str, list[str]]]
) -> None:
    code, err, out, heavy = told[refusal]
    said = " ".join(err.replace("│", " ").split())
    assert refusal.message in said
    assert (code, out, heavy) == (refusal.code, "", [])


@pytest.mark.parametrize("module", ["border", "config", "goals", "inputs", "run_folder"])
def test_what_checks_early_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, compressor.{module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "[]\n"
