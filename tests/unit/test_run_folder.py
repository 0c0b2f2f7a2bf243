"""What is written is what is read; nothing is overwritten; nothing is half-written."""

import json
import logging
import sqlite3
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from compressor import run_folder
from compressor.errors import ConfigError, RunFolderError
from compressor.goals import Constraint
from compressor.report import text_report, trials_report
from compressor.search.study import Study, read_trials
from compressor.values import (
    Accuracy,
    Basis,
    Latency,
    PairedLatency,
    Result,
    SessionPair,
    Side,
    Trial,
    Verdict,
)
from tests.unit.test_space import space_of

LATENCY = PairedLatency(
    2.5, (2.4, 2.6), Latency(5.0, 5.5, 6), Latency(2.0, 2.2, 6),
    (SessionPair((5.0, 5.0, 5.5), (2.0, 2.1, 2.0)), SessionPair((5.0, 5.1, 5.0), (2.0, 2.2, 2.0))),
)  # fmt: skip


def make_result(out: Path, verdict: Verdict = Verdict.MET) -> Result:
    original = Side(0.979, Latency(5.0, 5.5, 6), 88_000_000, 2_700_000, 11_000_000)
    compressed = Side(0.977, Latency(2.0, 2.2, 6), 40_000_000, 900_000, 3_600_000)
    handed_back = verdict is not Verdict.NOT_FASTER
    return Result(
        verdict=verdict,
        target="host-cpu",
        runtime="onnxruntime",
        basis=Basis.MEASURED,
        constraint=Constraint("speedup", 2.0),
        original=original,
        compressed=compressed if handed_back else None,
        speedup=LATENCY,
        accuracy_drop_points=0.2 if handed_back else None,
        equivalence={"engines": {"nni": 1e-6}, "n_inputs": 32, "max_abs_error": 1e-6},
        search={
            "strategy": "bocr", "n_trials": 40, "n_failed": 1, "seconds": 80.0, "seed": 0,
            "overhead_seconds_per_trial": 0.25,
        },
        groups=[
            {"name": "stem", "channels": 64, "kept": 48, "locked_because": None},
            {"name": "head", "channels": 10, "kept": 10, "locked_because": "output"},
        ],
        environment={"versions": {"torch": "2"}, "cpu": "x", "threads": 1, "git": None},
        out=out,
        constraints=[Constraint("speedup", 2.0)],
        branches=[{"name": "block", "kept": False, "macs": 1000}],
    )  # fmt: skip


@pytest.mark.parametrize("verdict", list(Verdict))
def test_a_result_comes_back_as_it_was(verdict: Verdict, tmp_path: Path) -> None:
    folder = run_folder.create(tmp_path / "run", "x", {})
    result = make_result(folder.path, verdict)
    folder.write_result(result)
    assert run_folder.read_result(folder.path) == result


def test_result_json_has_the_stable_keys(tmp_path: Path) -> None:
    content = run_folder.to_json(make_result(tmp_path))
    assert set(content) == {
        "schema", "verdict", "target", "runtime", "basis", "constraint", "original",
        "compressed", "speedup", "accuracy_drop_points", "equivalence", "search", "groups",
        "environment", "constraints", "branches", "training", "layers",
    }  # fmt: skip
    text = json.loads(json.dumps(content))
    assert text["verdict"] == "met"
    assert text["constraint"] == {"kind": "speedup", "value": 2.0}
    assert set(text["original"]) == set(text["compressed"]) == {
        "accuracy", "latency_ms", "macs", "params", "file_bytes", "metric",
    }  # fmt: skip
    assert set(text["original"]["latency_ms"]) == {"median_ms", "p90_ms", "n"}
    assert text["speedup"]["ratio"] == 2.5
    assert text["speedup"]["ci95"] == [2.4, 2.6]
    assert text["speedup"]["session_pairs"][0]["candidate_ms"] == [2.0, 2.1, 2.0]


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    first = run_folder.create(tmp_path / "run", "x", {"a": 1})
    with pytest.raises(ConfigError, match="holds another run"):
        run_folder.create(first.path, "x", {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="holds other files"):
        run_folder.create(tmp_path / "other", "x", {})
    with pytest.raises(ConfigError, match="is a file"):
        run_folder.create(tmp_path / "other" / "thesis.txt", "x", {})
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert run_folder.create(tmp_path / "empty", "x", {}).path == tmp_path / "empty"


def test_default_folders_count_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [str(run_folder.create(None, "net-cpu", {}).path) for _ in range(3)]
    assert names == ["runs/net-cpu", "runs/net-cpu-2", "runs/net-cpu-3"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"lies under .*file, which is a file"):
        run_folder.create(tmp_path / "file" / "run", "x", {})
    with pytest.raises(RunFolderError, match="run folder /proc/run cannot be written"):
        run_folder.create(Path("/proc/run"), "x", {})


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder.create(tmp_path / "run", "x", {})
    folder.write_result(make_result(folder.path))
    whole = (folder.path / run_folder.RESULT).read_text()

    def disk_full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        folder.write_result(make_result(folder.path, Verdict.INFEASIBLE))
    assert (folder.path / run_folder.RESULT).read_text() == whole


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 99}', '{"schema": 1}'])
def test_foreign_results_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / run_folder.RESULT).write_text(text)
    with pytest.raises(RunFolderError, match=r"result\.json"):
        run_folder.read_result(tmp_path)


@pytest.mark.bad_input("limits in a result.json")
@pytest.mark.parametrize("limit", [("speedup", -1.0), ("max-latency", 0.0)])
def test_limits_of_no_use_are_refused(limit: tuple[str, float], tmp_path: Path) -> None:
    folder = run_folder.create(tmp_path / "run", "x", {})
    made = make_result(folder.path, Verdict.MET)
    folder.write_result(replace(made, constraints=[Constraint(*limit)]))
    with pytest.raises(RunFolderError, match="a limit below zero, or of no time"):
        run_folder.read_result(folder.path)


def test_the_log_goes_to_the_folder_and_nowhere_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder.create(tmp_path / "run", "x", {})
    with run_folder.logged(folder):
        logging.getLogger("compressor.anything").warning("hello %d", 7)
    logging.getLogger("compressor.anything").info("after")
    text = (folder.path / run_folder.LOG).read_text()
    assert "compressor.anything: hello 7" in text
    assert "after" not in text
    assert capsys.readouterr() == ("", "")


def test_trials_come_back_and_other_tools_can_read_them(tmp_path: Path) -> None:
    space = space_of([64, 32], step=16)
    study = Study.create(tmp_path / "study.db", space)
    done = Trial(
        0, {"g0": 48, "g1": 16}, "clusters", Accuracy(0.91, 700), 2.5, (2.4, 2.6), 2.0,
        {"surgery": 0.25},
    )  # fmt: skip
    study.add(done, LATENCY)
    failed = Trial(1, {"g0": 16, "g1": 16}, "layers", failed_because="the board is gone")
    study.add(failed, None)

    assert read_trials(tmp_path / "study.db") == study.trials == (done, failed)
    assert Study.open(tmp_path / "study.db", space).trials == (done, failed)
    with pytest.raises(RunFolderError, match="are of another network"):
        Study.open(tmp_path / "study.db", space_of([64], step=16))
    url = f"sqlite:///{tmp_path / 'study.db'}"
    plain = optuna.load_study(study_name=None, storage=url)
    assert plain.trials[0].params == {"g0": 48, "g1": 16}
    assert plain.trials[0].values == [0.91, 2.5]
    assert [t.state.name for t in plain.trials] == ["COMPLETE", "FAIL"]
    assert plain.trials[0].user_attrs["measured"]["rounds_ms"][0][0] == [5.0, 5.0, 5.5]


def test_files_that_hold_no_study_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="No study at"):
        read_trials(tmp_path / "study.db")
    for content in (b"", b"nonsense, and enough of it to be no empty database"):
        (tmp_path / "study.db").write_bytes(content)
        with pytest.raises(RunFolderError, match="holds no study"):
            read_trials(tmp_path / "study.db")
        assert (tmp_path / "study.db").read_bytes() == content
    for statements in (["create table t (x)"], []):
        with sqlite3.connect(tmp_path / "other.db") as connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()
        with pytest.raises(RunFolderError, match="holds no study"):
            read_trials(tmp_path / "other.db")


@pytest.mark.parametrize("name", ["plain", "ünï dir", "o%41#h", "ut?x=1&y"])
def test_a_study_lies_where_its_path_says(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    space = space_of([64], step=16)
    study = Study.create(folder / "study.db", space)
    failed = Trial(0, {"g0": 16}, "start", failed_because="x")
    study.add(failed, None)
    assert [p.name for p in folder.iterdir()] == ["study.db"]
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert read_trials(folder / "study.db") == (failed,)


def test_the_table_says_what_was_asked_and_found(tmp_path: Path) -> None:
    text = text_report(make_result(tmp_path))
    for words in (
        "97.90%", "97.70%", "-0.20 points", "2.50x faster", "[2.400, 2.600]", "stem 64->48",
        "2x on host-cpu", "locked      head", "40 trials (1 failed)",
            "left out    block",
    ):  # fmt: skip
        assert words in text
    assert "NOT met" in text_report(make_result(tmp_path, Verdict.INFEASIBLE))
    assert "no model is handed back" in text_report(make_result(tmp_path, Verdict.NOT_FASTER))


def test_an_unfinished_run_shows_its_trials(tmp_path: Path) -> None:
    trials = [
        Trial(0, {}, "start", Accuracy(0.5, 10), 3.0, (2, 4), 1.0),
        Trial(1, {}, "layers", Accuracy(0.9, 10), 2.0, (1, 3), 1.5),
        Trial(2, {}, "layers", failed_because="x"),
    ]
    lines = trials_report(tmp_path, trials).splitlines()
    assert "was not finished. Trials measured: 2, failed: 1." in lines[0]
    assert [line.split()[0] for line in lines[4:]] == ["2", "1"]


def test_a_model_that_was_set_aside_comes_back_however_often(tmp_path: Path) -> None:
    """A process may be killed after it was put back and before the result was written."""
    folder = run_folder.RunFolder(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"first")
    folder.set_aside(make_result(tmp_path))
    for _ in range(2):
        (tmp_path / "model.onnx").write_bytes(b"second")
        (tmp_path / "model.pt").write_bytes(b"second")
        folder.take_back()
        assert (tmp_path / "model.onnx").read_bytes() == b"first"
        assert not (tmp_path / "model.pt").exists()  # the first had none
    assert folder.aside is not None
