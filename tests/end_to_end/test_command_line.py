"""The real command in a real process: results, files, exit codes, bad input, Ctrl-C."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import optuna
import pytest
import torch
from compressor.cli import main

import compressor
from tests.command import compress
from tests.conftest import make_conv_net

ROOT = Path(__file__).parents[2]
COMPRESS = (sys.executable, "-c", "from compressor.cli import main; main()")
ARCH = "tests.conftest:make_conv_net"


@pytest.fixture(scope="module")
def project(trained: Path, blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: model, data, compress.toml."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(trained, folder / "model.pt")
    shutil.copy(blobs, folder / "blobs.npz")
    (folder / "compress.toml").write_text(
        f'target = "host-cpu"\narch = "{ARCH}"\ndata = "blobs.npz"\n'
        "trials = 8\nfine-tune-epochs = 2\nclusters = 2\n"
    )
    return folder


@pytest.fixture(scope="module")
def finished(project: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One run that meets a limit within easy reach."""
    done = compress(
        "model.pt", "--speedup", "1.1", "--out", "run", "--json", "--finalists", "2",
        "--distillation", "0.5", "--augment", "crop", "--ema", "0.5", cwd=project,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return project / "run", done


def test_stdout_is_the_result_and_stderr_the_progress(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = finished
    printed = json.loads(done.stdout)
    assert printed == json.loads((folder / "result.json").read_text())
    assert printed["verdict"] == "met"
    assert printed["training"]["distillation"] == 0.5
    assert printed["training"]["augmentations"] == ["crop"]
    assert "trial   8/8" in done.stderr
    assert "Fine-tuning" in done.stderr
    assert "Warning" not in done.stderr


def test_the_folder_holds_what_was_promised(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    assert {p.name for p in folder.iterdir()} == {
        "model.onnx", "original.onnx", "model.pt", "result.json", "study.db", "config.toml",
        "log.txt", "manifest.json", "report.html",
    }  # fmt: skip
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder / 'study.db'}")
    assert len(study.trials) == 8


def test_the_figures_are_those_of_the_files(
    finished: tuple[Path, subprocess.CompletedProcess[str]], blobs: Path
) -> None:
    """Accuracy, sizes and widths counted again with nothing but onnx, onnxruntime and numpy."""
    folder, done = finished
    result = json.loads(done.stdout)
    with np.load(blobs) as arrays:
        images = arrays["test_images"].astype(np.float32) / 255
        labels = arrays["test_labels"]
    for side, name in (("original", "original.onnx"), ("compressed", "model.onnx")):
        session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        guesses = [session.run(None, {"input": image[None]})[0].argmax() for image in images]
        assert np.mean(np.array(guesses) == labels) == result[side]["accuracy"]
        assert (folder / name).stat().st_size == result[side]["file_bytes"]
        n_params = sum(int(np.prod(t.dims)) for t in onnx.load(folder / name).graph.initializer)
        assert n_params == pytest.approx(result[side]["params"], rel=0.02)  # BN is folded
    kept = {g["name"]: g["kept"] for g in result["groups"]}
    weights = {t.dims[0] for t in onnx.load(folder / "model.onnx").graph.initializer}
    assert {kept["stem"], kept["inner"], kept["last"], kept["hidden"], 5} >= weights - {1}
    assert result["compressed"]["macs"] < result["original"]["macs"]
    lo, hi = result["speedup"]["ci95"]
    assert 1 < lo <= result["speedup"]["ratio"] <= hi
    step = compressor.load_target("host-cpu").step
    original = {g["name"]: g["channels"] for g in result["groups"]}
    assert all(n % step == 0 or n == original[name] for name, n in kept.items())


def test_a_front_is_a_table_of_folders(project: Path) -> None:
    """And stderr, which is a terminal here, a live table."""
    terminal, stderr = pty.openpty()
    running = subprocess.Popen(
        [*COMPRESS, "model.pt", "--pareto", "--trials", "6", "--fine-tune-epochs", "0",
         "--augment", "none", "--out", "front"],
        cwd=project, env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdout=subprocess.PIPE, stderr=stderr, text=True,
    )  # fmt: skip
    os.close(stderr)
    drawn = b""
    with contextlib.suppress(OSError):  # Linux says so where the other side is closed
        while chunk := os.read(terminal, 65536):
            drawn += chunk
    os.close(terminal)
    stdout, _ = running.communicate(timeout=60)
    assert running.returncode == 0, drawn
    for shown in (b"best so far", b"Searching", b"6/6", b"left in all"):
        assert shown in drawn
    folders = sorted(path.name for path in (project / "front").iterdir() if path.is_dir())
    assert folders == [f"point-{i + 1}" for i in range(len(folders))]
    head, _, *rows = stdout.strip().splitlines()
    assert head.split()[:2] == ["model", "speed-up"]
    assert [row.split()[0] for row in rows] == [f"front/{name}" for name in folders]
    both = compress("model.pt", "--pareto", "--speedup", "2", cwd=project)
    assert both.returncode == 2
    assert "not both" in both.stderr


def test_model_pt_rebuilds_the_network_of_the_onnx(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    assert torch.load(folder / "model.pt", weights_only=True)["arch"] == ARCH
    net = compressor.load_compressed(folder / "model.pt", arch=ARCH)
    assert set(net.state_dict()) <= set(make_conv_net().state_dict())
    image = torch.rand(1, 1, 8, 8)
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    with torch.no_grad():
        np.testing.assert_allclose(
            session.run(None, {"input": image.numpy()})[0], net(image), rtol=1e-3, atol=1e-4
        )
    with pytest.raises(compressor.CompressorError, match="can be rebuilt with arch="):
        compressor.load_compressed(folder / "model.pt")


def test_report_shows_the_run_again(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = finished
    shown = compress("report", folder, cwd=folder)
    assert shown.returncode == 0
    assert "verdict     met" in shown.stdout
    again = compress("report", folder, "--json", cwd=folder)
    assert json.loads(again.stdout) == json.loads(done.stdout)


def test_a_dashboard_shows_a_study_and_cannot_change_it(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    before = (folder / "study.db").read_bytes()
    with compressor.dashboard(folder, port=0) as server:
        threading.Thread(target=server.serve, daemon=True).start()
        with urllib.request.urlopen(server.address) as page:
            assert b"Optuna Dashboard" in page.read()
        host = server.address.removesuffix("/dashboard")
        with urllib.request.urlopen(f"{host}/api/studies") as reply:
            studies = json.loads(reply.read())
        assert studies["study_summaries"][0]["study_name"] == "compress"
        remove = urllib.request.Request(f"{host}/api/studies/1", method="DELETE")
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(remove)
        taken = int(host.rpartition(":")[2])
        with (
            pytest.raises(compressor.CompressorError, match="--port"),
            compressor.dashboard(folder, port=taken),
        ):
            pass
    assert (folder / "study.db").read_bytes() == before


def test_the_pair_can_be_measured_again(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    done = compress(
        "measure", "model.onnx", "--against", "original.onnx", "--target", "host-cpu", "--json",
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ci95"][0] > 1
    alone = compress("measure", "model.onnx", "--target", "host-cpu", cwd=folder)
    assert "noise floor" in alone.stdout
    missing = compress("measure", "none.onnx", "--target", "host-cpu", cwd=folder)
    assert (missing.returncode, missing.stderr) == (2, "error: No ONNX file at none.onnx.\n")


def test_a_release_that_got_slower_is_stopped(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """The original in the place of the new model; the limit is far from what noise can reach."""
    folder, _ = finished
    slower = ("original.onnx", "--against", "model.onnx", "--target", "host-cpu")
    stopped = compress("measure", *slower, "--fail-below", "5", cwd=folder)
    assert stopped.returncode == 3
    assert "5 was asked" in stopped.stderr
    assert compress("measure", *slower, "--fail-below", "0.01", cwd=folder).returncode == 0
    alone = ("measure", "model.onnx", "--target", "host-cpu", "--fail-below", "1")
    assert compress(*alone, cwd=folder).returncode == 2


def test_a_folder_with_a_run_is_not_touched(
    finished: tuple[Path, subprocess.CompletedProcess[str]], project: Path
) -> None:
    folder, _ = finished
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    done = compress("model.pt", "--speedup", "1.1", "--out", "run", cwd=project)
    assert done.returncode == 2
    assert "holds another run" in done.stderr
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_an_unreachable_limit_ends_with_3_and_the_best_plan(project: Path) -> None:
    done = compress(
        "model.pt", "--speedup", "500", "--out", "far", "--trials", "30", "--json-progress",
        cwd=project,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert {each["event"] for each in told} == {"expected", "progress", "trial"}
    assert next(each for each in told if each["event"] == "trial")["speedup"] > 1
    assert "NOT met" in done.stdout
    result = json.loads((project / "far" / "result.json").read_text())
    assert result["verdict"] == "infeasible"
    assert result["search"]["n_trials"] == 1  # the narrowest plan says it all
    assert (project / "far" / "model.onnx").is_file()


def test_a_latency_limit_in_milliseconds(project: Path) -> None:
    """Asked for half of what the original takes just now, in the unit of the flag."""
    device = compressor.load_target("host-cpu")
    original = project / "run" / "original.onnx"
    if not original.is_file():
        compress("model.pt", "--speedup", "1.1", "--out", "run", cwd=project)
    now_ms = compressor.compare_latency(original, original, device).original.median_ms
    limit = f"{1000 * 0.5 * now_ms:.1f}us"
    done = compress("model.pt", "--max-latency", limit, "--out", "ms", "--json", cwd=project)
    assert done.returncode in (0, 3), done.stderr
    result = json.loads(done.stdout)
    assert result["constraint"]["kind"] == "max-latency"
    is_met = result["compressed"]["latency_ms"]["median_ms"] <= result["constraint"]["value"]
    assert result["verdict"] == ("met" if is_met else "infeasible")
    assert done.returncode == (0 if result["verdict"] == "met" else 3)
    assert result["speedup"]["ci95"][0] > 1
    lazy = compress("model.pt", "--max-latency", "10s", "--out", "lazy", cwd=project)
    assert lazy.returncode == 2
    assert "already meets" in lazy.stderr
    assert not (project / "lazy").exists()


@pytest.mark.fault("Ctrl-C, Ctrl-C again and again, SIGTERM")
@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGINT, signal.SIGINT, signal.SIGINT), 130),
        ((signal.SIGTERM,), 143),
    ],
)
def test_a_signal_leaves_a_folder_that_can_be_read_and_gone_on_with(
    project: Path, signals: tuple[signal.Signals, ...], code: int
) -> None:
    name = f"stopped-by-{len(signals)}-{signals[0].name}"
    running = subprocess.Popen(
        [*COMPRESS, "model.pt", "--speedup", "1.1", "--out", name, "--trials", "14"],
        cwd=project, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # A shell's background job, as these tests may be, hands on that Ctrl-C is ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("trial   4"):
            break
    time.sleep(0.1)  # somewhere within the next trial
    for number in signals:
        running.send_signal(number)
        time.sleep(0.02)
    out, err = running.communicate(timeout=60)
    assert running.returncode == code, err
    assert out == ""
    assert "Stopped" in err
    assert "Traceback" not in err
    assert not (project / name / "model.onnx").exists()
    shown = compress("report", name, cwd=project)
    assert shown.returncode == 0
    assert "was not finished" in shown.stdout
    n_shown = len([line for line in shown.stdout.splitlines() if line.endswith(" ms")])
    assert n_shown >= 4
    if signals == (signal.SIGTERM,):
        done = compress("resume", name, "--json", cwd=project)
        assert done.returncode in (0, 3), done.stderr
        assert json.loads(done.stdout)["search"]["n_trials"] >= 14
        assert "trial   4" not in done.stderr  # it was there


@pytest.mark.bad_input("command line")
@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("none.pt", "--speedup", "2"), 2, "No model file at none.pt"),
        (("model.pt",), 2, "Give --speedup 2 or --max-latency 12ms"),
        (("model.pt", "--speedup", "2", "--target", "host-gpu"), 2, "Did you mean 'host-cpu'"),
        (("model.pt", "--speedup", "2", "--arch", "nonsense:f"), 2, "cannot import nonsense"),
        (("model.pt", "--speedup", "2", "--data", "none.npz"), 2, "No data at none.npz"),
        (("model.pt", "--speedup", "2", "--arch-arg", "width=16"), 1, "does not fit tests"),
        (("model.pt", "--speedup", "2", "--trials", "many"), 2, "Invalid value for '--trials'"),
        (("model.pt", "--speedup", "2", "--no-such-flag"), 2, "No such option"),
        (("broken.pt", "--speedup", "2"), 1, "broken.pt"),
        (("model.pt", "--speedup", "2", "--input-shape", "3,9,9"), 2, "--input-shape is (3, 9"),
        (("model.pt", "--speedup", "2", "--image-size", "16"), 2, "resizes image files"),
        (("model.pt", "--speedup", "2", "--arch-arg", "width=null"), 1, "--arch-arg|failed"),
        (("model.pt", "--speedup", "2", "--mean", "nan", "--std", "1"), 2, "--mean"),
        (("inspect", "model.pt", "--input-shape", "3,8,8"), 1, "does not take an input of shape"),
        (("targets", "nano"), 2, "Unknown target 'nano'"),
        (("report", "none"), 2, "No study at"),
        (("dashboard", "none"), 2, "No study at"),
        (("inspct", "model.pt"), 2, "Unknown command 'inspct'. Did you mean 'inspect'?"),
        (("model.pt", "--speedp", "2"), 2, "--speedup"),
        (("model.pt", "--speedup", "2", "--search", "bcor"), 2, "Did you mean 'bocr'?"),
        (("model.pt", "--speedup", "2", "--augment", "flop"), 2, "Did you mean 'flip'?"),
        (("model.pt", "--constraint", "mac=0.5"), 2, "Did you mean 'macs'?"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    args: tuple[str, ...],
    code: int,
    message: str,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process: a new one would spend seconds on imports alone."""
    (project / "broken.pt").write_bytes(b"nonsense")
    before = sorted(project.rglob("*"))
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit) as ended:
        main(args)
    out, err = capsys.readouterr()
    assert ended.value.code == code, err
    said = " ".join(err.replace("│", " ").split())
    assert any(part in said for part in message.split("|")), said
    assert "Traceback" not in err
    assert out == ""
    assert sorted(project.rglob("*")) == before


def test_inspect_and_targets(project: Path) -> None:
    shown = compress("inspect", "model.pt", cwd=project)
    assert shown.returncode == 0, shown.stderr
    assert "head: its channels are the model's output" in shown.stdout
    rows = json.loads(compress("inspect", "model.pt", "--json", cwd=project).stdout)
    assert {row["name"]: row["channels"] for row in rows["groups"]}["stem"] == 32
    assert rows["export"] == {"target": "host-cpu", "opset": 13, "error": None}
    assert "can be exported for host-cpu: ONNX opset 13" in shown.stdout
    listed = compress("targets", cwd=project)
    assert listed.returncode == 0
    assert "host-cpu" in listed.stdout


def test_explain_says_where_the_time_goes(project: Path) -> None:
    shown = compress("explain", "model.pt", cwd=project)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^inner +Conv .* ms .* inner$", shown.stdout, re.MULTILINE)
    assert re.search(r"^head .*locked: its channels are the model's output$", shown.stdout, re.M)
    assert re.search(r"^at most +\d+\.\d+x, 95 % interval", shown.stdout, re.MULTILINE)
    told = json.loads(compress("explain", "model.pt", "--json", cwd=project).stdout)
    assert {"stem", "inner", "head"} <= {row["name"] for row in told["layers"]}
    assert told["at_most"]["ratio"] > 1


def test_init_writes_every_setting_once(project: Path) -> None:
    (project / "new").mkdir()
    assert compress("init", "new", cwd=project).returncode == 0
    text = (project / "new" / "compress.toml").read_text()
    assert "# trials = 60" in text
    again = compress("init", "new", cwd=project)
    assert (again.returncode, "is there already" in again.stderr) == (2, True)
    assert compress("init", "new", "--force", cwd=project).returncode == 0


def test_a_result_that_cannot_be_written_is_an_error(project: Path) -> None:
    done = compress("targets", "host-cpu", cwd=project, stdout=Path("/dev/full"))
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "cannot be written to stdout" in done.stderr


def test_help_teaches_and_is_quick(project: Path) -> None:
    for words in ((), ("--help",), ("inspect", "--help"), ("measure", "--help")):
        assert compress(*words, cwd=project).returncode == 0
    text = compress("--help", cwd=project).stdout
    for word in ("--speedup", "compress inspect", "compress report", "Example"):
        assert word in text
    probe = "import sys, compressor.cli; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.bad_input("a checkpoint with several sets of weights")
def test_averaged_weights_are_asked_for_by_name(project: Path) -> None:
    weights = torch.load(project / "model.pt")
    raw = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save({"model": raw, "ema": weights, "epoch": 3}, project / "both.pt")
    refused = compress("inspect", "both.pt", cwd=project)
    assert refused.returncode == 1
    assert "several sets of weights" in refused.stderr
    assert "--weights-key ema" in refused.stderr
    assert compress("inspect", "both.pt", "--weights-key", "ema", cwd=project).returncode == 0
    chance = compress("both.pt", "--weights-key", "model", "--speedup", "1.1", cwd=project)
    assert chance.returncode == 1  # the raw weights of this file were never trained
    assert "not the trained weights" in chance.stderr
    assert not (project / "runs").exists()
