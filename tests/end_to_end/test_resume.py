"""Runs that are really killed go on as if nothing had been."""

import contextlib
import json
import random
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor.bench import Bench
from compressor.budget import Budget
from compressor.errors import (
    ConfigError,
    DataError,
    InterruptedRunError,
    ModelError,
    RunFolderError,
)
from compressor.latency.machine import Model
from compressor.least_squares import gather
from compressor.run_folder import IDENTITIES, RunFolder, read_settings
from compressor.search.study import read_trials
from compressor.values import (
    GATHERING,
    ChannelGroup,
    PairedLatency,
    Progress,
    Result,
    Trial,
)
from tests.command import fork_server, run_or_go_on

FLAGS: dict[str, object] = {
    "target": "host-cpu", "arch": "tests.conftest:make_conv_net", "constraint": {"macs": 0.6},
    "trials": 14, "fine_tune_epochs": 4, "batch_size": 4, "learning_rate": 0.002,
    "finalists": 2,
}  # fmt: skip

QUICK = FLAGS | {"trials": 3, "fine_tune_epochs": 0, "finalists": 1}


@pytest.fixture
def flags(trained: Path, blobs: Path, tmp_path: Path) -> dict[str, object]:
    shutil.copy(trained, tmp_path / "model.pt")
    return FLAGS | {"data": blobs}


FINISHES_S = 240  # also on a busy machine


def kill_at_random(
    model: Path, flags: dict[str, object], out: Path, n_kills: int, seed: int
) -> list[int]:
    """Kills and goes on so many times, then lets it finish; trials on disk after every kill."""
    server = fork_server()
    generator = random.Random(seed)
    n_trials = []
    for _ in range(n_kills):
        process = server.Process(target=run_or_go_on, args=(model, flags, out))
        process.start()
        process.join(generator.uniform(0.3, 1.8))
        if process.exitcode is None:
            process.kill()
            process.join()
        else:
            assert process.exitcode == 0
        n_trials.append(len(read_trials(out / "study.db")) if has_study(out) else 0)
    process = server.Process(target=run_or_go_on, args=(model, flags, out))
    process.start()
    process.join(FINISHES_S)
    assert process.exitcode == 0
    return n_trials


def has_study(out: Path) -> bool:
    """Whether the file holds one: it may have been made in part."""
    try:
        read_trials(out / "study.db")
    except RunFolderError:
        return False
    return True


def check_is_as_if_undisturbed(model: Path, flags: dict[str, object], out: Path) -> None:
    """Every proposal follows from the trials before it, and the same weights come out again."""
    trials = read_trials(out / "study.db")
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert len({tuple(trial.widths.items()) for trial in trials}) == len(trials)
    with sqlite3.connect(out / "study.db") as connection:
        states = [row[0] for row in connection.execute("select state from trials")]
    assert states == ["COMPLETE"] * len(trials)
    found = compressor.replay(out)
    assert (found.n_trials, found.differs_at) == (len(trials), None)
    assert found.shipped is not None

    again = out.parent / "again"
    again.mkdir()
    for name in ("manifest.json", "config.toml", "study.db"):
        shutil.copy(out / name, again / name)
    undisturbed = compressor.resume(again)
    assert isinstance(undisturbed, compressor.Result)
    shown = compressor.folder_report(out, as_json=True)
    assert json.loads(shown)["groups"] == list(undisturbed.groups)
    mine, theirs = (
        torch.load(folder / "model.pt", weights_only=True)["state_dict"] for folder in (out, again)
    )
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert not (out / ".unfinished").exists()


@pytest.mark.fault("SIGKILL at a random moment of a run, resumed", n=8)
def test_a_run_that_is_killed_8_times(flags: dict[str, object], tmp_path: Path) -> None:
    model, out = tmp_path / "model.pt", tmp_path / "run"
    n_trials = kill_at_random(model, flags, out, n_kills=8, seed=0)
    assert n_trials == sorted(n_trials)  # none is ever lost
    check_is_as_if_undisturbed(model, flags, out)


@pytest.mark.fault("SIGKILL at a random moment of a run, resumed", n=20)
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", range(1, 11))
def test_runs_that_are_killed_200_times(
    flags: dict[str, object], tmp_path: Path, seed: int
) -> None:
    model, out = tmp_path / "model.pt", tmp_path / "run"
    n_trials = kill_at_random(model, flags, out, n_kills=20, seed=seed)
    assert n_trials == sorted(n_trials)
    check_is_as_if_undisturbed(model, flags, out)


class Stop(Exception):
    """Ends a run from a callback."""


def stopped_run(model: Path, flags: dict[str, object], out: Path, after: int = 2) -> Path:
    """A run that ended after so many trials."""

    def on_trial(trial: Trial) -> None:
        if trial.number + 1 == after:
            raise Stop

    with pytest.raises(Stop):
        compressor.compress(compressor.load_config(model, flags | {"out": out}), on_trial=on_trial)
    return out


def attributes_of(study: Path) -> dict[str, str]:
    with sqlite3.connect(study) as connection:
        return dict(connection.execute("select key, value_json from study_user_attributes"))


def test_least_squares_looks_at_as_many_images_as_before(
    flags: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was no time for all of them; a run that goes on must refit by the same ones."""
    n_images: list[int] = []

    def counted(model: nn.Module, groups: Sequence[ChannelGroup], images: Iterable[Tensor]) -> Any:
        looked_at = list(images)
        n_images.append(sum(map(len, looked_at)))
        return gather(model, groups, looked_at)

    monkeypatch.setattr("compressor.bench.gather", counted)
    monkeypatch.setattr("compressor.bench.LEAST_REPAIR_IMAGES", 8)
    monkeypatch.setattr("compressor.bench.images_at_once", lambda _split: 4)
    of_s = Budget.of_s
    with monkeypatch.context() as late:
        late.setattr(Budget, "of_s", lambda b, p: 0.0 if p == GATHERING else of_s(b, p))
        out = stopped_run(
            tmp_path / "model.pt", flags | QUICK | {"time_budget": 300}, tmp_path / "run"
        )
    result = compressor.resume(out)
    assert n_images == [8, 8]
    assert isinstance(result, Result)
    assert "least squares looked at 8 images" in result.search["cut_short"]


@pytest.mark.fault("stopped before the first trial")
@pytest.mark.parametrize("phase", ["Timing the layers", "Trying every group and branch"])
def test_what_was_measured_before_the_first_trial_is_kept(
    flags: dict[str, object], tmp_path: Path, phase: str
) -> None:
    """On a Jetson, where every engine is built, it takes an hour."""

    def stop(progress: Progress) -> None:
        if progress.phase == phase and progress.n_done == 3:
            raise KeyboardInterrupt

    out, small = tmp_path / "run", flags | {"trials": 12, "fine_tune_epochs": 0}
    with pytest.raises(InterruptedRunError, match="compress resume"):
        compressor.compress(
            compressor.load_config(tmp_path / "model.pt", small | {"out": out}), on_progress=stop
        )
    before = attributes_of(out / "study.db")
    kind = "timed before" if phase == "Timing the layers" else "harm of"
    assert len([key for key in before if key.startswith(kind)]) == 3
    compressor.resume(out)
    after = attributes_of(out / "study.db")
    assert {key: after[key] for key in before} == before
    assert len(after) > len(before)


def test_a_finished_run_is_shown(flags: dict[str, object], tmp_path: Path) -> None:
    small = flags | QUICK
    config = compressor.load_config(tmp_path / "model.pt", small | {"out": tmp_path / "run"})
    result = compressor.compress(config)
    again = compressor.resume(tmp_path / "run")
    assert isinstance(again, compressor.Result)
    assert replace(again, out=result.out).speedup.ratio == result.speedup.ratio


def test_a_front_goes_on(flags: dict[str, object], tmp_path: Path) -> None:
    """Points that were finished stay as they are."""
    front = flags | {"pareto": True, "trials": 12, "fine_tune_epochs": 1}
    del front["constraint"]
    out = stopped_run(tmp_path / "model.pt", front, tmp_path / "run", after=12)
    results = compressor.resume(out)
    assert isinstance(results, tuple)
    assert results
    written = (out / "point-1" / "result.json").stat().st_mtime_ns
    again = compressor.resume(out)
    assert isinstance(again, tuple)
    assert [r.speedup.ratio for r in again] == [r.speedup.ratio for r in results]
    assert (out / "point-1" / "result.json").stat().st_mtime_ns == written


@pytest.mark.fault("two processes in one folder; a lock of a dead one")
def test_two_processes_never_work_in_one_folder(flags: dict[str, object], tmp_path: Path) -> None:
    """A lock that a dead process left behind is none."""
    out = stopped_run(tmp_path / "model.pt", flags | QUICK, tmp_path / "run")
    with RunFolder(out).locked():
        server = fork_server()
        other = server.Process(target=run_or_go_on, args=(tmp_path / "model.pt", flags, out))
        other.start()
        other.join(60)
        assert other.exitcode == 1
        assert len(read_trials(out / "study.db")) == 2
    assert (out / ".unfinished" / "lock").exists()  # a file, held by nobody
    result = compressor.resume(out)
    assert isinstance(result, compressor.Result)


@pytest.fixture(scope="module")
def stopped(trained: Path, blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and `run`, which ended after two of three trials."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copy(trained, folder / "model.pt")
    shutil.copy(blobs, folder / "data.npz")
    stopped_run(folder / "model.pt", QUICK | {"data": folder / "data.npz"}, folder / "run")
    return folder


@contextlib.contextmanager
def changed(file: Path, content: bytes | None) -> Iterator[None]:
    """The file holds something else meanwhile, or is gone."""
    before = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    yield
    file.write_bytes(before)


@pytest.mark.bad_input("run folder: model, config, version changed, files missing")
def test_another_model_is_not_taken_for_this_one(stopped: Path) -> None:
    tensors = torch.load(stopped / "model.pt", weights_only=True)
    tensors["head.bias"] += 0.01
    torch.save(tensors, stopped / "other.pt")
    with changed(stopped / "model.pt", (stopped / "other.pt").read_bytes()):
        with pytest.raises(RunFolderError, match="the model file changed"):
            compressor.resume(stopped / "run")
        assert len(read_trials(stopped / "run" / "study.db")) == 2


@pytest.mark.bad_input("run folder: model, config, version changed, files missing")
def test_an_edited_config_needs_force(stopped: Path, tmp_path: Path) -> None:
    out = shutil.copytree(stopped / "run", tmp_path / "run")
    file = out / "config.toml"
    file.write_text(file.read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(RunFolderError, match=r"config.toml changed since the run in .* was begun"):
        compressor.resume(out)
    compressor.resume(out, force=True)
    assert len(read_trials(out / "study.db")) == 3


def test_the_manifest_says_what_the_run_follows_from(stopped: Path) -> None:
    manifest = json.loads((stopped / "run" / "manifest.json").read_text())
    assert {"seed", "versions", "threads", "git", *IDENTITIES} <= set(manifest)
    assert {"cpu_flags", "instruction_set", "runtime", "state"} <= set(manifest["device"])
    assert "governor" in manifest["device"]["state"]


@pytest.mark.bad_input("run folder: model, config, version changed, files missing")
def test_another_version_of_the_folder_is_named(stopped: Path, tmp_path: Path) -> None:
    out = shutil.copytree(stopped / "run", tmp_path / "run")
    file = out / "manifest.json"
    file.write_text(file.read_text().replace('"schema": 1', '"schema": 0'))
    with pytest.raises(RunFolderError, match="has schema 0; this version goes on with 1 only"):
        compressor.resume(out)


@pytest.mark.bad_input("run folder: model, config, version changed, files missing")
@pytest.mark.parametrize(
    ("gone", "error", "message"),
    [
        ("run/config.toml", RunFolderError, "has no config.toml: no run was begun there"),
        ("run/manifest.json", RunFolderError, "has no manifest.json"),
        ("model.pt", ModelError, "model.pt"),
        ("data.npz", DataError, "No data at"),
    ],
)
def test_what_is_missing_is_named(
    stopped: Path, gone: str, error: type[Exception], message: str
) -> None:
    with changed(stopped / gone, None), pytest.raises(error, match=message):
        compressor.resume(stopped / "run")


def test_what_was_half_trained_goes_with_another_model(stopped: Path, tmp_path: Path) -> None:
    out = shutil.copytree(stopped / "run", tmp_path / "run")
    half = out / ".unfinished" / "training.pt"
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(b"of the other model")
    tensors = torch.load(stopped / "model.pt", weights_only=True)
    tensors["head.bias"] += 0.01
    torch.save(tensors, stopped / "other.pt")

    def stop(progress: Progress) -> None:
        if progress.phase == "Measuring the original":
            raise KeyboardInterrupt

    with changed(stopped / "model.pt", (stopped / "other.pt").read_bytes()):
        with pytest.raises(RunFolderError, match="the model file changed"):
            compressor.resume(out)
        assert half.exists()
        with pytest.raises(InterruptedRunError):
            compressor.resume(out, force=True, on_progress=stop)
    assert not half.exists()


@pytest.mark.fault("a study cut off by a power cut")
def test_a_lost_study_is_begun_anew(stopped: Path, tmp_path: Path) -> None:
    out = shutil.copytree(stopped / "run", tmp_path / "run")
    (out / "study.db").write_bytes(b"SQLite format 3\0 and then the power went")
    compressor.resume(out)
    assert len(read_trials(out / "study.db")) == 3


@pytest.mark.bad_input("run folder: model, config, version changed, files missing")
def test_settings_of_another_version_are_named(stopped: Path, tmp_path: Path) -> None:
    out = shutil.copytree(stopped / "run", tmp_path / "run")
    text = (out / "config.toml").read_text()
    (out / "config.toml").write_text(f"no-such-flag = 1\n{text}")
    with pytest.raises(ConfigError, match="no-such-flag"):
        compressor.resume(out)


def test_a_run_goes_on_from_another_folder(
    flags: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths that were given relative to the one it was begun in."""
    monkeypatch.chdir(tmp_path)
    out = stopped_run(Path("model.pt"), flags | QUICK, Path("run")).resolve()
    assert read_settings(out)["model"] == str(tmp_path / "model.pt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    compressor.resume(out)
    assert len(read_trials(out / "study.db")) == 3


def test_time_spent_before_counts(flags: dict[str, object], tmp_path: Path) -> None:
    out = stopped_run(tmp_path / "model.pt", flags | QUICK, tmp_path / "run")
    began = time.perf_counter()
    result = compressor.resume(out)
    spent = time.perf_counter() - began
    assert isinstance(result, compressor.Result)
    trials = read_trials(out / "study.db")
    before = sum(sum(trial.seconds.values()) for trial in trials[:2])
    assert before < result.search["seconds"] < before + spent


def test_a_replay_that_differs_says_where(flags: dict[str, object], tmp_path: Path) -> None:
    """Trial 5 of 12 is changed by hand."""
    small = flags | {"trials": 12, "fine_tune_epochs": 0, "out": tmp_path / "run"}
    compressor.compress(compressor.load_config(tmp_path / "model.pt", small))
    with sqlite3.connect(tmp_path / "run" / "study.db") as connection:
        for name, width in {"hidden": 24, "inner": 64, "last": 64}.items():
            connection.execute(
                "update trial_params set param_value = ? where param_name = ? and trial_id = "
                "(select trial_id from trials where number = 4)", (width, name),
            )  # fmt: skip
    found = compressor.replay(tmp_path / "run")
    assert found.differs_at == 4
    assert "DIFFERS from trial 5 of 12 on" in compressor.replay_report(tmp_path, found)


def measured_originals(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is timed against itself from now on: the original."""
    found: list[bytes] = []
    compare = Bench.compare

    def counted(bench: Bench, original: Model, candidate: Model, *args: Any) -> PairedLatency:
        if original is candidate:
            assert isinstance(original, bytes)
            found.append(original)
        return compare(bench, original, candidate, *args)

    monkeypatch.setattr(Bench, "compare", counted)
    return found


def test_the_original_is_measured_again_on_another_machine_only(
    flags: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.pt"
    measured = measured_originals(monkeypatch)
    out = stopped_run(model, flags | QUICK, tmp_path / "here", after=1)
    assert len(measured) == 1
    result = compressor.resume(out)
    assert isinstance(result, Result)
    assert len(measured) == 1
    floor = result.search["noise_floor"]["ratio"]
    elsewhere = stopped_run(model, flags | QUICK, tmp_path / "elsewhere", after=1)
    manifest = elsewhere / "manifest.json"
    content = json.loads(manifest.read_text())
    content["device"]["n_cores"] += 1
    manifest.write_text(json.dumps(content))
    compressor.resume(elsewhere)
    assert len(measured) == 3
    assert floor > 0


@pytest.mark.fault("stopped with a time budget that is spent")
def test_a_stopped_run_whose_budget_is_spent_is_finished(
    flags: dict[str, object], tmp_path: Path
) -> None:
    """What it spent before counts: no trial more, no training, and a result all the same."""
    budget = flags | {"trials": 1000, "time_budget": 60, "finalists": 1}
    out = stopped_run(tmp_path / "model.pt", budget, tmp_path / "run", after=3)
    spent = out / ".unfinished" / "spent.json"
    assert json.loads(spent.read_text())["spent_s"] > 0
    spent.write_text('{"spent_s": 59.9, "cut_short": ["something earlier"]}')
    began = time.monotonic()
    result = compressor.resume(out)
    assert time.monotonic() - began < 40
    assert isinstance(result, Result)
    assert result.search["n_trials"] <= 4
    cut_short = result.search.get("cut_short", [])
    assert cut_short[0] == "something earlier"
    assert any("training steps" in what for what in cut_short)


@pytest.mark.fault("stopped before the first trial, with a time budget that is spent")
def test_a_run_stopped_before_its_first_trial_is_finished_too(
    flags: dict[str, object], tmp_path: Path
) -> None:
    def stop(progress: Progress) -> None:
        if progress.phase == "Timing the layers" and progress.n_done == 1:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    config = compressor.load_config(
        tmp_path / "model.pt", flags | {"out": out, "time_budget": 60, "fine_tune_epochs": 0}
    )
    with pytest.raises(InterruptedRunError):
        compressor.compress(config, on_progress=stop)
    (out / ".unfinished" / "spent.json").write_text('{"spent_s": 61}')
    result = compressor.resume(out)
    assert isinstance(result, Result)
    assert result.search["n_trials"] == 1
