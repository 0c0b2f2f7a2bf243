"""`compress()` itself: what stops a model from being handed back, and what is told meanwhile."""

import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor import (
    corrections,
    evaluate,
    export,
    finalists,
    pipeline,
    prunable,
    shipping,
    surgery,
    training,
)
from compressor.bench import Bench
from compressor.budget import Budget
from compressor.config import Config
from compressor.errors import (
    ConfigError,
    DataError,
    EngineError,
    EquivalenceError,
    GraphError,
    InterruptedRunError,
    MeasurementError,
    SearchError,
    TrainingError,
)
from compressor.finalists import choose
from compressor.goals import Constraint
from compressor.graph.costs import layer_costs
from compressor.job import Job, prepare
from compressor.latency import onnxruntime as runtime
from compressor.latency.by_runner import RunnerDevice
from compressor.latency.machine import Model
from compressor.latency.timing import FINAL, FINALIST, TRIAL, Effort
from compressor.report import text_report
from compressor.search.objective import TIME, History, Objective, Problem, corrected
from compressor.search.space import make_space
from compressor.search.study import Study, read_before, read_corrections, read_trials
from compressor.shipping import judge
from compressor.trials import TRIAL_PARTS, Searched
from compressor.values import (
    Accuracy,
    Basis,
    ChannelGroup,
    Latency,
    PairedLatency,
    Plan,
    Progress,
    Result,
    Side,
    Trial,
    Verdict,
)
from tests.conftest import ConvNet, make_conv_net, randomised, training_of

Make = Callable[..., Config]


@pytest.fixture
def make_config(trained: Path, blobs: Path, tmp_path: Path) -> Make:
    """A run of seconds in an empty folder."""
    shutil.copy(trained, tmp_path / "model.pt")

    def make(**flags: object) -> Config:
        small: dict[str, object] = {
            "target": "host-cpu", "arch": "tests.conftest:make_conv_net", "data": blobs,
            "speedup": 1.05, "trials": 5, "fine_tune_epochs": 0, "out": tmp_path / "run",
        }  # fmt: skip
        return compressor.load_config(tmp_path / "model.pt", small | flags)

    return make


def paired(ratio: float, low: float, high: float) -> PairedLatency:
    return PairedLatency(ratio, (low, high), Latency(2, 2, 9), Latency(1, 1, 9), ())


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (paired(2.01, 1.95, 2.07), Verdict.MET),
        (paired(1.99, 1.95, 2.07), Verdict.INFEASIBLE),
        (paired(1.02, 0.99, 1.05), Verdict.NOT_FASTER),
        (paired(2.50, 1.00, 3.00), Verdict.NOT_FASTER),
    ],
)
def test_verdicts(measured: PairedLatency, verdict: Verdict) -> None:
    floor = paired(1.0, 0.99, 1.01)
    is_met = Constraint("speedup", 2.0).is_met_in_time(measured)
    assert judge(measured, floor, [True, is_met]) is verdict


def test_what_the_original_reaches_against_itself_is_no_win() -> None:
    noisy = paired(1.07, 0.99, 1.15)
    assert judge(paired(1.05, 1.02, 1.08), noisy, [True]) is Verdict.NOT_FASTER


def test_an_estimate_is_judged_by_its_ratio_and_labelled() -> None:
    """Its interval is the error of the estimate, which holds 1 below a factor of that error."""
    estimated = replace(paired(1.6, 0.8, 3.2), basis=Basis.ESTIMATE)
    assert judge(estimated, paired(1, 1, 1), [True]) is Verdict.MET
    slower = replace(paired(0.9, 0.45, 1.8), basis=Basis.ESTIMATE)
    assert judge(slower, paired(1, 1, 1), [True]) is Verdict.NOT_FASTER


def test_limits_look_at_the_figure_that_they_speak_of() -> None:
    """Of 2 ms and 1 ms medians, whatever the ratio says; of accuracy, MACs and parameters."""
    pair = paired(2.5, 2.45, 2.55)
    before = Side(0.90, Latency(2, 2, 9), 100, 1000, 1)
    after = Side(0.89, Latency(1, 1, 9), 50, 400, 1)
    for kind, met, missed in (
        ("speedup", 2.5, 2.51), ("max-latency", 1.0, 0.99), ("max-drop", 1.01, 0.99),
        ("macs", 0.5, 0.49), ("params", 0.4, 0.39),
    ):  # fmt: skip
        assert Constraint(kind, met).is_met(pair, before, after)
        assert not Constraint(kind, missed).is_met(pair, before, after)


def test_a_limit_that_noise_alone_may_have_reached_is_not_met() -> None:
    """Of a figure that is sure it counts; of one that is not, the end of its interval."""
    sides = Side(0.9, Latency(2, 2, 9), 1, 1, 1), Side(0.9, Latency(1, 1, 9), 1, 1, 1)
    limits = Constraint("speedup", 2.0), Constraint("max-latency", 1.0)
    for pair, met in (
        (paired(2.0, 1.95, 2.05), True), (paired(2.0, 1.7, 2.4), False),
        (paired(2.4, 2.0, 2.9), True),
    ):  # fmt: skip
        assert limits[0].is_met(pair, *sides) is met
        assert limits[0].is_met_in_time(pair)  # as a figure, by which finalists are chosen
    assert limits[1].is_met(paired(2.0, 1.95, 2.05), *sides)
    assert not limits[1].is_met(paired(2.0, 1.7, 2.4), *sides)
    estimate = replace(paired(2.0, 1.0, 4.0), basis=Basis.ESTIMATE)
    assert limits[0].is_met(estimate, *sides)


class FakeBench:
    """Remeasures to what it is told, in the order it is asked."""

    def __init__(self, *again: PairedLatency) -> None:
        self.again = list(again)

    def remeasure(self, _plan: object, _effort: object) -> PairedLatency:
        return self.again.pop(0)


def chosen_widths(
    make_config: Make, speedups: list[float], again: list[PairedLatency]
) -> list[int]:
    """Widths of the plans chosen; trial `i` keeps 1 + i channels and is the i-th most accurate."""
    groups = (ChannelGroup("g", 64, ()),)
    space = make_space(groups, {"g": np.arange(64.0)}, step=1, min_keep_ratio=0.0)
    trials = [
        Trial(i, {"g": 1 + i}, "", Accuracy(0.9 - i / 100, 1000), s, (s - 0.05, s + 0.05), 1.0)
        for i, s in enumerate(speedups)
    ]
    job = cast(Job, SimpleNamespace(config=make_config(speedup=2.0), space=space))
    wanted = Objective(limits={TIME: 0.5})
    problem = Problem(space, wanted, Accuracy(0.95, 1000), 10, 3, seed=0)
    study = Study.create(Path(tempfile.mkdtemp()) / "study.db", space)
    searched = Searched(problem, trials, study, 1.0, paired(1, 1, 1))
    bench = cast(Bench, FakeBench(*again))
    found = choose(job, searched, bench, lambda _p: None, Budget(None))
    return [len(plan.kept["g"]) for plan in found.plans]


def test_the_surest_of_the_most_accurate_plans_are_finalists(make_config: Make) -> None:
    sure, likely, short = paired(2.2, 2.1, 2.3), paired(2.01, 1.9, 2.1), paired(1.98, 1.9, 2.1)
    assert chosen_widths(make_config, [2.1, 2.2], [sure, sure]) == [1, 2]
    assert chosen_widths(make_config, [2.1, 2.2], [likely, sure]) == [2]
    assert chosen_widths(make_config, [2.1, 2.2], [short, likely]) == [2]
    assert chosen_widths(make_config, [2.1, 2.2], [likely, likely]) == [1, 2]
    # What the first lost, the next ones are expected to lose: those just within are passed over.
    near, slower = [2.02] * 20, paired(1.8, 1.79, 1.81)
    assert chosen_widths(make_config, [*near, 2.3, 3.0], [slower, likely, sure]) == [22]
    # A sure plan is not preferred to one that is clearly more accurate, nor looked at.
    assert chosen_widths(make_config, [*near, 2.3, 2.01, 2.01, 3.0], [slower, likely]) == [21]
    # Where nothing meets it, the last one measured is the fastest.
    some = [2.2 + i / 10 for i in range(9)]
    assert chosen_widths(make_config, some, [short] * 7 + [sure]) == [9]
    assert chosen_widths(make_config, [2.01] * 5 + [2.05, 3.0], [short] * 2 + [likely]) == [7]
    assert chosen_widths(make_config, [1.5, 1.9, 1.7], []) == [2]  # none met it: the fastest


def test_callbacks_are_told_of_every_trial_and_phase(make_config: Make) -> None:
    trials, phases = list[Trial](), list[Progress]()
    result = compressor.compress(make_config(), on_trial=trials.append, on_progress=phases.append)
    assert [t.number for t in trials] == list(range(5))
    assert set(trials[0].seconds) == set(TRIAL_PARTS)
    assert all(t.speedup and t.accuracy for t in trials)
    assert "Searching" in {p.phase for p in phases}
    assert all(0 <= p.n_done <= p.n_total for p in phases)
    assert {"stem", "head"} <= {row["name"] for row in result.layers}
    assert sum(row["original_macs"] for row in result.layers) == result.original.macs
    engines = result.equivalence["engines"]
    assert set(engines) == {"masked", "nni", "onnxruntime"}
    assert all(isinstance(e, float) and e < 1e-4 for e in engines.values())
    floor = result.search["noise_floor"]
    assert 0.5 < floor["ratio"] < 2


@pytest.mark.parametrize(
    "goal",
    [{"max_drop": 100.0}, {"constraint": {"macs": 0.8}}, {"weight": {"accuracy": 1, "time": 0.5}}],
)
def test_other_goals_than_time(make_config: Make, goal: dict[str, object]) -> None:
    result = compressor.compress(make_config(speedup=None, **goal))
    assert result.verdict is Verdict.MET
    assert result.compressed is not None
    if "constraint" in goal:
        assert result.compressed.macs <= 0.8 * result.original.macs
        assert [str(c) for c in result.constraints] == ["80% of the MACs"]
    if "weight" in goal:
        assert result.constraint is None


def test_branches_that_were_left_out_are_told(make_config: Make, tmp_path: Path) -> None:
    """Only without its branch does this network reach the limit; the model.pt rebuilds it."""
    result = compressor.compress(make_config(speedup=3.0, trials=6))
    (branch,) = result.branches
    assert not branch["kept"]
    kept = {g["name"]: g["kept"] for g in result.groups}
    assert kept["inner"] == 0
    assert "left out    " in compressor.text_report(result)
    assert f"{branch['name']}" in compressor.text_report(result)
    arch = "tests.conftest:make_conv_net"
    net = compressor.load_compressed(tmp_path / "run" / "model.pt", arch=arch)
    assert not any(name.startswith("inner") for name in net.state_dict())
    answers = runtime.predictor(tmp_path / "run" / "model.onnx", n_threads=1)
    image = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(net(image), answers(image), rtol=1e-3, atol=1e-3)


def test_the_same_trials_follow_from_what_is_kept(make_config: Make, tmp_path: Path) -> None:
    """Every proposal again, from the study and the same seed, with no measurement."""
    config = make_config(trials=12, speedup=1.5)
    compressor.compress(config)
    study = tmp_path / "run" / "study.db"
    job = prepare(make_config(trials=12, speedup=1.5, out=tmp_path / "again"))
    posed = Problem(
        job.space, Objective(), Accuracy(0.0, 1), 12, config.clusters, config.seed,
        layer_costs(job.model, job.groups),
    )  # fmt: skip
    problem, trials = read_before(study, posed), read_trials(study)
    assert problem.timed
    assert problem.damages
    assert problem.objective.limits == {TIME: pytest.approx(1 / 1.5)}
    taught = read_corrections(study)
    for n, trial in enumerate(trials):
        known = corrected(trials[:n], [each for each in taught if each.n_trials <= n])
        proposal = job.strategy.propose(problem, History(known))
        assert proposal is not None
        assert problem.space.by_name(proposal.widths) == trial.widths
        assert proposal.phase == trial.phase


def assert_no_model(folder: Path) -> None:
    """Neither under its name nor under another."""
    assert not [p.name for p in folder.iterdir() if p.name.startswith((".model", "model"))]
    assert not (folder / "result.json").exists()


def test_an_engine_that_disagrees_is_not_used(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The model is then that of our own surgery, which equals the masked original."""

    def wrong(*args: object) -> nn.Module:
        return randomised(real(*args))  # type: ignore[arg-type]

    real = surgery.prune_with_nni
    monkeypatch.setattr(shipping, "prune_with_nni", wrong)
    result = compressor.compress(make_config())
    engines = result.equivalence["engines"]
    assert "NNI and own surgery disagree" in str(engines["nni"])
    assert float(engines["masked"]) < 1e-4


def test_an_onnx_file_that_disagrees_is_removed(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = export.export_onnx

    def wrong(model: nn.Module, *args: object, **options: object) -> Path:
        return real(randomised(model), *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shipping, "export_onnx", wrong)
    monkeypatch.setattr(shipping, "check_agree", _only_onnx(evaluate.check_agree))
    with pytest.raises(EquivalenceError, match="torch and ONNX Runtime disagree"):
        compressor.compress(make_config())
    assert_no_model(tmp_path / "run")


def _only_onnx(real: Callable[..., float]) -> Callable[..., float]:
    """The model is corrupted in place by the export above: check against a fresh copy."""

    def check(what: str, expected: nn.Module, got: object, images: Tensor) -> float:
        if what == "torch and ONNX Runtime":
            expected = randomised(expected, seed=1)
        return real(what, expected, got, images)

    return check


def test_a_failing_nni_is_recorded_and_own_surgery_used(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_args: object) -> nn.Module:
        raise EngineError("NNI cannot process it: no rule")

    monkeypatch.setattr(shipping, "prune_with_nni", fails)
    result = compressor.compress(make_config())
    engines = result.equivalence["engines"]
    assert engines["nni"] == "NNI cannot process it: no rule"
    assert isinstance(engines["masked"], float)
    assert result.compressed is not None


def test_a_model_that_is_not_faster_is_not_handed_back(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = RunnerDevice.compare

    def slow_in_the_end(
        self: RunnerDevice, *models: Model, effort: Effort, seed: int
    ) -> PairedLatency:
        if effort in (FINAL, FINALIST):
            return paired(1.01, 0.98, 1.04)
        return real(self, *models, effort=effort, seed=seed)

    monkeypatch.setattr(RunnerDevice, "compare", slow_in_the_end)
    result = compressor.compress(make_config())
    assert result.verdict is Verdict.NOT_FASTER
    assert result.compressed is None
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert "result.json" in names
    assert not names & {"model.onnx", "model.pt", ".model.onnx.unproven"}


def test_failed_trials_do_not_end_a_search(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunnerDevice.compare
    calls = 0

    def flaky(self: RunnerDevice, *models: Model, effort: Effort, seed: int) -> PairedLatency:
        nonlocal calls
        calls += effort is TRIAL
        if effort is TRIAL and calls in (3, 5):  # the first call measures the original
            raise MeasurementError("the runtime is gone")
        return real(self, *models, effort=effort, seed=seed)

    monkeypatch.setattr(RunnerDevice, "compare", flaky)
    trials = list[Trial]()
    result = compressor.compress(make_config(trials=6), on_trial=trials.append)
    assert [t.number for t in trials if t.failed_because == "the runtime is gone"] == [1, 3]
    assert result.search["n_trials"] >= 6  # more where finalists send the search on
    assert result.search["n_failed"] == 2


def test_a_search_in_which_nothing_could_be_measured_says_so(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: object, *_args: object, **_options: object) -> None:
        raise MeasurementError("the runtime is gone")

    monkeypatch.setattr(Bench, "measure", gone)
    with pytest.raises(SearchError, match=r"None of 5 trials.*the runtime is gone"):
        compressor.compress(make_config())


def test_a_time_budget_shorter_than_measuring_the_original_is_said_at_once(
    make_config: Make, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--time-budget 0.01s is spent: reading model and data"):
        compressor.compress(make_config(time_budget="10ms"))
    hour_ago = time.monotonic() - 3600  # as where torch took long to load
    with pytest.raises(ConfigError, match=r"--time-budget 1800s is spent: reading model and data"):
        compressor.compress(make_config(time_budget="30m"), since=hour_ago)
    assert not (tmp_path / "run").exists()


def test_a_time_budget_bounds_the_whole_run_and_says_what_it_cost(
    make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.perf_counter()
    result = compressor.compress(
        make_config(trials=10_000, fine_tune_epochs=500, time_budget="40s")
    )
    assert time.perf_counter() - began < 70
    cut_short = result.search.get("cut_short", [])
    is_exhausted = "every plan of the space was tried" in caplog.text  # on a quick machine
    assert is_exhausted or any(re.fullmatch(r"\d+ of 10000 trials", what) for what in cut_short)
    assert any(re.fullmatch(r"\d+ of 4500 training steps", what) for what in cut_short)
    assert all(f"cut short   {what}: the time budget" in text_report(result) for what in cut_short)
    assert result.search["n_trials"] >= 1
    assert training_of(result)["steps"] > 0


def test_more_classes_than_logits_are_refused_before_anything_is_written(
    make_config: Make, tmp_path: Path
) -> None:
    torch.save(three_logits().state_dict(), tmp_path / "model.pt")
    config = make_config(arch="tests.end_to_end.test_pipeline:three_logits")
    with pytest.raises(DataError, match=r"5 classes \(0 to 4\), the model 3 logits"):
        compressor.compress(config)
    assert not (tmp_path / "run").exists()


def three_logits() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(32, 3))  # fmt: skip


def test_finalists_are_trained_before_one_is_chosen(make_config: Make, tmp_path: Path) -> None:
    config = make_config(
        trials=6,
        fine_tune_epochs=6,
        batch_size=2,
        learning_rate=1e-3,
        finalists=3,
        augment=["crop"],
        ema=0.5,
    )
    result = compressor.compress(config)
    assert result.verdict is Verdict.MET
    scores = training_of(result)["finalists"]
    assert 1 <= len(scores) <= 3
    if len(scores) > 2:  # of two, the better one has the rest
        assert max(map(len, scores)) > min(map(len, scores))  # the worst did not go on
    assert training_of(result)["augmentations"] == ["crop"]
    assert training_of(result)["stopped_because"] is None
    assert "of 2 images" in compressor.text_report(result)
    assert not (tmp_path / "run" / ".training.pt").exists()
    # What was trained is what was shipped, whichever engine pruned it.
    compact = compressor.load_compressed(tmp_path / "run" / "model.pt", arch=config.arch)
    answers = runtime.predictor(tmp_path / "run" / "model.onnx", n_threads=1)
    image = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compact(image), answers(image), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("max_drop", [0.0, 30.0])
def test_the_fastest_within_a_drop_is_found_after_training(
    make_config: Make, tmp_path: Path, max_drop: float
) -> None:
    """What is lost before training does not count; what is lost after it does."""
    config = make_config(speedup=None, max_drop=max_drop, trials=12, fine_tune_epochs=3)
    result = compressor.compress(config)
    trials = read_trials(tmp_path / "run" / "study.db")
    fastest = max(trial.speedup or 0.0 for trial in trials)
    shipped = training_of(result)["search_accuracy"]
    if max_drop:
        assert result.verdict is Verdict.MET
        assert result.speedup.ratio > 0.75 * fastest
        before = {t.speedup: t.accuracy.value for t in trials if t.accuracy}[fastest]
        assert shipped >= before  # what training spoilt is not shipped
    elif shipped < 1.0:  # as accurate as the original
        assert result.verdict is not Verdict.MET
    assert (tmp_path / "run" / "result.json").exists()


def test_a_front_is_several_complete_folders(make_config: Make, tmp_path: Path) -> None:
    config = make_config(speedup=None, pareto=True, trials=12, fine_tune_epochs=1)
    results = compressor.compress_front(config)
    assert len(results) >= 2
    speedups = [result.speedup.ratio for result in results if result.compressed]
    assert speedups == sorted(speedups)
    points = [tmp_path / "run" / f"point-{i}" for i in range(1, len(results) + 1)]
    assert sorted(result.out for result in results) == points
    for result in results:
        folder = result.out
        assert compressor.read_result(folder).speedup.ratio == result.speedup.ratio
        names = {"config.toml", "original.onnx", "report.html", "result.json"}
        if result.compressed:
            names |= {"model.onnx", "model.pt"}
        assert {path.name for path in folder.iterdir()} == names
        assert "a model for every speed" in compressor.text_report(result)
    table = compressor.front_report(results)
    assert all(f"point-{i}" in table for i in range(1, len(results) + 1))
    last = results[-1]
    assert last.compressed is not None
    slower = replace(last.speedup, ratio=last.speedup.ratio / 2)
    less_accurate = replace(last.compressed, accuracy=last.compressed.accuracy - 0.01)
    beaten = replace(last, speedup=slower, compressed=less_accurate)
    assert f"beaten by {last.out.name}" in compressor.front_report([beaten, last])
    assert "beaten" not in compressor.front_report([last, last])
    with pytest.raises(compressor.CompressorError, match="not both"):
        make_config(pareto=True)


def test_a_program_goes_all_the_way(make_config: Make, tmp_path: Path) -> None:
    """A .pt2 file in, a measured ONNX file and a loadable model.pt out; NNI says why it cannot."""
    net = make_conv_net()
    net.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    program = torch.export.export(net.eval(), (torch.randn(1, 1, 8, 8),))
    torch.export.save(program, tmp_path / "model.pt2")
    flags = make_config().model_dump(exclude_unset=True) | {"fine_tune_epochs": 1}
    del flags["model"], flags["arch"]
    config = compressor.load_config(tmp_path / "model.pt2", flags)
    result = compressor.compress(config)
    assert result.verdict is Verdict.MET
    engines = result.equivalence["engines"]
    assert isinstance(engines["nni"], str | float)
    original = compressor.load_model(tmp_path / "model.pt2").module
    compact = compressor.load_compressed(tmp_path / "run" / "model.pt", original=original)
    answers = runtime.predictor(tmp_path / "run" / "model.onnx", n_threads=1)
    image = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compact(image), answers(image), rtol=1e-3, atol=1e-3)
    with pytest.raises(compressor.CompressorError, match="rebuilt with original=load_model"):
        compressor.load_compressed(tmp_path / "run" / "model.pt")


class Written(ConvNet):
    """Has the width of its last layer written into its code."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.outer(self.depthwise(torch.relu(self.inner_norm(self.inner(x)))))
        x = nn.functional.adaptive_avg_pool2d(torch.relu(self.last(x)), 1).view(-1, 64)
        return self.head(torch.relu(self.hidden(x)))


def make_written() -> nn.Module:
    return Written()


def test_a_network_with_numbers_in_its_code_goes_all_the_way(
    make_config: Make, tmp_path: Path
) -> None:
    config = make_config(
        arch="tests.end_to_end.test_pipeline:make_written",
        speedup=None, constraint={"params": 0.4}, depth=False,
    )  # fmt: skip
    result = compressor.compress(config)
    assert result.verdict is Verdict.MET
    (last,) = (g for g in result.groups if g["name"] == "last")
    assert last["kept"] != last["channels"]
    compact = compressor.load_compressed(
        tmp_path / "run" / "model.pt", arch="tests.end_to_end.test_pipeline:make_written"
    )
    answers = runtime.predictor(tmp_path / "run" / "model.onnx", n_threads=1)
    image = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compact(image), answers(image), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("importance", ["taylor", "cpmc", "random"])
def test_other_importances_rank_too(make_config: Make, importance: str) -> None:
    result = compressor.compress(make_config(importance=importance, trials=1))
    assert result.search["n_failed"] == 0


@pytest.mark.parametrize("keep_ratio", [0.25, 0.5, 1.0])
def test_prune_with_one_ratio(keep_ratio: float) -> None:
    net, example = randomised(three_logits()), torch.randn(1, 1, 8, 8)
    small = compressor.prune(net, example, keep_ratio)
    assert small.get_parameter("0.weight").shape[0] == 32 * keep_ratio
    assert net.get_parameter("0.weight").shape[0] == 32
    assert compressor.prune(net, example, 0.4, step=8).get_parameter("0.weight").shape[0] == 16
    for bad, message in ((0.0, r"\(0, 1\]"), (1.5, r"\(0, 1\]")):
        with pytest.raises(compressor.CompressorError, match=message):
            compressor.prune(net, example, bad)
    with pytest.raises(compressor.CompressorError, match="Did you mean 'l1'"):
        compressor.prune(net, example, 0.5, importance="l11")


def test_prune_gives_a_program_where_the_code_has_numbers() -> None:
    net, example = randomised(make_written()), torch.randn(1, 1, 8, 8)
    small = compressor.prune(net, example, 0.5)
    assert isinstance(small, torch.fx.GraphModule)
    assert small.get_parameter("last.weight").shape[0] == 32
    assert small(torch.randn(3, 1, 8, 8)).shape == (3, 5)
    assert isinstance(compressor.prune(randomised(ConvNet()), example, 0.5), ConvNet)


def test_prune_by_gradients_takes_batches() -> None:
    net, example = randomised(ConvNet()), torch.randn(1, 1, 8, 8)
    batch = (torch.randn(8, 1, 8, 8), torch.arange(8) % 5)
    small = compressor.prune(net, example, 0.5, importance="taylor", batches=lambda: [batch])
    assert small.get_parameter("last.weight").shape[0] == 32
    with pytest.raises(compressor.CompressorError, match="give it labelled images"):
        compressor.prune(net, example, 0.5, importance="taylor")


def test_prune_never_returns_a_wrong_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """If surgery ever cut a wrong channel, the caller would get an error and no model."""

    def wrong(model: nn.Module, *args: object) -> nn.Module:
        pruned = rightly(model, *args)  # type: ignore[arg-type]
        last = pruned.get_parameter("last.weight")
        last.data.copy_(last.data.flip(0))
        return pruned

    net, example = randomised(ConvNet()), torch.randn(1, 1, 8, 8)
    plan = compressor.Plan({"last": tuple(range(20))})
    rightly = surgery.remove_channels
    monkeypatch.setattr(surgery, "remove_channels", wrong)
    monkeypatch.setattr(prunable, "export_program", no_program)
    with pytest.raises(compressor.CompressorError, match=r"does not follow|not the masked"):
        compressor.prune(net, example, plan)


def no_program(*_args: object) -> nn.Module:
    raise GraphError("not today")


class Moved:
    """`Bench.compare` of a machine on which pairs of files come out at other ratios than plans."""

    def __init__(self, factor: float) -> None:
        self.factor, self.n_files = factor, 0

    def __call__(self, compare: Callable[..., PairedLatency]) -> Callable[..., PairedLatency]:
        def moved(bench: Bench, original: Model, candidate: Model, *args: object) -> PairedLatency:
            pair = compare(bench, original, candidate, *args)
            if not isinstance(original, Path):
                return pair
            self.n_files += 1
            factor = self.factor if self.n_files == 1 else 1.0
            low, high = pair.ci95
            return replace(
                pair, ratio=pair.ratio * factor, ci95=(low * factor, high * factor),
                candidate=replace(
                    pair.candidate, median_ms=pair.candidate.median_ms / factor
                ),
            )  # fmt: skip

        return moved


@pytest.fixture
def by_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency is a noiseless function of the file's size: what a test expects does not hang on."""

    def compare(
        _device: object, original: Model, candidate: Model, **_options: object
    ) -> PairedLatency:
        sizes = [
            len(each if isinstance(each, bytes) else each.read_bytes())
            for each in (original, candidate)
        ]
        ratio = sizes[0] / sizes[1]
        return PairedLatency(
            ratio, (0.999 * ratio, 1.001 * ratio), Latency(2, 2, 9), Latency(2 / ratio, 2, 9), ()
        )

    monkeypatch.setattr(RunnerDevice, "compare", compare)


@pytest.mark.usefixtures("by_macs")
def test_a_search_goes_on_where_the_files_miss_the_limit(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Bench, "compare", Moved(0.3)(Bench.compare))
    result = compressor.compress(make_config(speedup=1.4, trials=8, fine_tune_epochs=1))
    assert result.search.get("n_corrections") == 1
    assert result.search["n_trials"] == 11
    assert result.verdict is Verdict.MET
    assert result.speedup.ratio >= 1.4
    assert "which went on once after measuring again" in text_report(result)
    found = compressor.replay(tmp_path / "run")
    assert (found.n_trials, found.differs_at) == (11, None)
    assert (tmp_path / "run" / "model.onnx").is_file()
    assert not (tmp_path / "run" / ".unfinished").exists()


@pytest.mark.usefixtures("by_macs")
def test_the_better_one_of_two_finished_models_is_shipped(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second one comes out no faster than the first, and loses to it."""
    moved = Moved(0.3)
    monkeypatch.setattr(Bench, "compare", moved(Bench.compare))
    real = corrections.worth
    monkeypatch.setattr(pipeline, "worth", lambda result: tuple(-x for x in real(result)))
    result = compressor.compress(make_config(speedup=1.4, trials=8))
    assert moved.n_files == 2
    assert result.speedup.ratio < 1.4
    assert compressor.read_result(tmp_path / "run").speedup.ratio == result.speedup.ratio
    assert result.compressed is not None
    assert (tmp_path / "run" / "model.onnx").stat().st_size == result.compressed.file_bytes
    assert not (tmp_path / "run" / ".unfinished").exists()


@pytest.mark.usefixtures("by_macs")
def test_a_run_that_is_stopped_between_two_models_goes_on(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    moved = Moved(0.3)
    monkeypatch.setattr(Bench, "compare", moved(Bench.compare))
    whole = compressor.compress(make_config(speedup=1.4, trials=8, out=tmp_path / "whole"))
    for stop_at in ("correct", "add"):
        moved.n_files = 0
        out = tmp_path / stop_at
        honest = getattr(Study, stop_at)

        def stopping(
            study: Study, *args: object, honest: Any = honest, name: str = stop_at
        ) -> None:
            if name == "correct" or study.corrections:
                raise KeyboardInterrupt
            honest(study, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Study, stop_at, stopping)
            with pytest.raises(InterruptedRunError):
                compressor.compress(make_config(speedup=1.4, trials=8, out=out))
        assert not (out / "result.json").exists()
        result = compressor.resume(out)
        assert isinstance(result, Result)
        assert result.groups == whole.groups
        assert result.search["n_trials"] == whole.search["n_trials"] == 11
        assert moved.n_files == 2


@pytest.mark.parametrize(
    ("ratio", "accuracy", "goes_on"),
    [
        (2.0, 0.80, False),  # met
        (2.1, 0.80, False),  # a little faster
        (2.3, 0.80, True),  # far faster, and accuracy was paid for it
        (2.3, 0.95, False),  # there is nothing to be gained
        (1.9, 0.95, True),  # missed
    ],
)
def test_when_files_send_a_search_on(ratio: float, accuracy: float, goes_on: bool) -> None:
    space = make_space(
        (ChannelGroup("g", 64, ()),), {"g": np.arange(64.0)}, step=1, min_keep_ratio=0.0
    )
    wanted = Objective(limits={TIME: 0.5})
    problem = Problem(space, wanted, Accuracy(0.95, 1000), 10, 3, seed=0)
    trial = Trial(0, {"g": 1}, "", Accuracy(accuracy, 1000), 2.05, (2.0, 2.1), 1.0)
    study = Study.create(Path(tempfile.mkdtemp()) / "study.db", space)
    study.add(trial, paired(2.05, 2.0, 2.1))
    searched = Searched(problem, [trial], study, 1.0, paired(1, 1, 1))
    measured = paired(ratio, ratio - 0.01, ratio + 0.01)
    taught = corrections.taught_by_files(searched, trial, measured)
    assert (taught is not None) is goes_on
    if taught is not None:
        assert taught.moved == pytest.approx(ratio / 2.05)
        assert (taught.n_trials, taught.is_by_files) == (1, True)
        study.correct(taught)
        study.correct(taught)
        missed = paired(1.5, 1.4, 1.6)
        assert corrections.taught_by_files(searched, trial, missed) is None  # bounded


@pytest.mark.usefixtures("by_macs")
def test_a_run_that_met_its_limit_does_not_go_on(make_config: Make) -> None:
    result = compressor.compress(make_config(speedup=1.4, trials=8))
    assert result.verdict is Verdict.MET
    assert result.search.get("n_corrections") == 0
    assert result.search["n_trials"] == 8


@pytest.mark.usefixtures("by_macs")
@pytest.mark.parametrize("lost", [0.85, 0.7])
def test_a_search_goes_on_where_finalists_miss_the_limit(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, lost: float
) -> None:
    """Trials come out faster than they are: no finalist meets the limit, later trials do."""
    honest = Bench.measure
    n_measured = 0

    def flattered(
        bench: Bench, plan: Plan, seconds: dict[str, float], seed: int
    ) -> tuple[Accuracy, PairedLatency]:
        nonlocal n_measured
        n_measured += 1
        accuracy, pair = honest(bench, plan, seconds, seed)
        factor = 1 / lost if n_measured <= 8 else 1.0
        ratio, (low, high) = pair.ratio * factor, pair.ci95
        return accuracy, replace(pair, ratio=ratio, ci95=(low * factor, high * factor))

    monkeypatch.setattr(Bench, "measure", flattered)
    monkeypatch.setattr("compressor.finalists.N_FINALISTS", 3)
    result = compressor.compress(make_config(speedup=1.6, trials=8))
    assert result.verdict is Verdict.MET
    assert result.speedup.ratio >= 1.6


def test_where_training_a_finalist_fails_the_next_one_is_taken(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = training.fine_tune
    n_failed = 0

    def fails_once(*args: object, **options: object) -> object:
        nonlocal n_failed
        if n_failed == 0:
            n_failed += 1
            raise TrainingError("the network failed while it was trained: one of the variables")
        return trained(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(finalists, "fine_tune", fails_once)
    result = compressor.compress(make_config(trials=6, fine_tune_epochs=1, finalists=2))
    assert n_failed == 1
    assert result.training is not None
    assert training_of(result)["steps"] > 0


def test_where_no_finalist_can_be_trained_the_error_is_one_line(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_args: object, **_options: object) -> None:
        raise TrainingError("the network failed while it was trained: one of the variables")

    monkeypatch.setattr(finalists, "fine_tune", fails)
    with pytest.raises(TrainingError, match="one of the variables"):
        compressor.compress(make_config(trials=6, fine_tune_epochs=1))
