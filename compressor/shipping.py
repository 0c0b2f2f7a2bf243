"""From a plan to files: pruned for real, trained on, exported, proven, measured, and told."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from compressor.bench import N_PROOF_IMAGES, Bench, check_surgery
from compressor.containers import map_tensors
from compressor.environment import describe_environment
from compressor.errors import EngineError, EquivalenceError, ExportError, TrainingError
from compressor.evaluate import accuracy, check_agree, posed
from compressor.export import export_onnx
from compressor.files import write_whole
from compressor.finalists import Place, Winner, train
from compressor.graph import cost
from compressor.job import Job
from compressor.latency.onnxruntime import predictor
from compressor.latency.precision import FP16, half_onnx
from compressor.latency.timing import FINAL, is_win
from compressor.prunable import MODULE, TRACED
from compressor.report.html import html_report
from compressor.run import Run
from compressor.summary import branches_table, groups_table, search_report, training_report
from compressor.surgery import check_dropped, groups_left, prune_with_nni, remove_branches
from compressor.tasks import OwnTask
from compressor.trials import Searched
from compressor.values import (
    MEASURING_FILES,
    PRUNING,
    Accuracy,
    Basis,
    Equivalence,
    Example,
    Latency,
    PairedLatency,
    Plan,
    Progress,
    Result,
    Side,
    Trained,
    Untrained,
    Verdict,
)

NNI_SHARE, NNI_TIMES = 0.1, 10  # of the time budget, and of own surgery's time: what NNI needs
FILES_SHARE = 0.4  # of what is left, for timing the files; the rest is for their accuracy
N_FINISH_PARTS = 5
FP16_TOLERANCE = 3e-2  # of the largest output; each of some 50 layers rounds to 1 in 2,048

Exam = Callable[[Path, float | None], Accuracy]

logger = logging.getLogger(__name__)


def build(run: Run, searched: Searched, winners: Sequence[Winner], place: Place) -> Result:
    """Prunes for real, trains on, exports and proves; `write_result` ends it.

    Args:
        run: That it belongs to.
        searched: Where the plans come from.
        winners: The first one that can be trained is built.
        place: Where and how long is trained.

    Raises:
        TrainingError: None can be trained.
    """
    for n_left, winner in zip(reversed(range(len(winners))), winners, strict=True):
        compact, engines = cut_out(run, winner.plan)
        network = winner.network or run.bench.repaired(winner.plan, {})
        recipe = run.job.recipe(winner.n_steps_left, run.job.config.seed)
        try:
            tuned = train(
                run.job, winner.plan, network, run.bench, recipe, run.on_progress,
                place.file("training.pt"), place,
            )  # fmt: skip
        except TrainingError as err:
            if not n_left:
                raise
            logger.warning("this plan cannot be trained, so the next one is taken: %s", err)
            continue
        compact.load_state_dict(tuned.model.state_dict())
        training = training_report(run.job, winner, tuned, place.n_steps)
        return finish(run, searched, winner.plan, compact, engines, training)
    raise AssertionError


def cut_out(run: Run, plan: Plan) -> tuple[nn.Module, dict[str, float | str]]:
    """The compact network, and how far each engine's outputs are from it on real images.

    It is NNI's where NNI can process the network and answers the same, else that of our own
    surgery; `engines` says which and why.

    Raises:
        EquivalenceError: The masked original answers differently.
    """
    job = run.job
    run.on_progress(Progress(PRUNING, 0, 2, "own surgery"))
    images = job.data.search.model_input(slice(0, N_PROOF_IMAGES))
    began_s = run.budget.spent_s
    compact, error = check_surgery(job.prunable, plan, job.data)
    own_s = run.budget.spent_s - began_s
    engines: dict[str, float | str] = {"masked": error}
    if run.budget.left_s < NNI_SHARE * run.budget.total_s + NNI_TIMES * own_s:
        run.budget.cut("NNI was not asked to prune the network too")
        return compact, engines | {"nni": "the time budget had no time for it"}
    run.on_progress(Progress(PRUNING, 1, 2, "NNI"))
    dropped = check_dropped(job.prunable.branches, plan)
    network = remove_branches(job.model, dropped)
    groups = groups_left(job.groups, dropped, network)
    try:
        by_nni = prune_with_nni(network, job.example, groups, plan)
        engines["nni"] = check_agree("NNI and own surgery", compact, by_nni, images)
    except (EngineError, EquivalenceError) as err:
        logger.warning("%s Own surgery's model is used; it equals the masked original.", err)
        engines["nni"] = str(err)
        return compact, engines
    return by_nni, engines


def finish(
    run: Run,
    searched: Searched,
    plan: Plan,
    tuned: nn.Module,
    engines: dict[str, float | str],
    training: Trained | Untrained | None,
) -> Result:
    """Exports both models, proves and measures the files; leaves them in the run's folder."""
    job, bench, folder = run.job, run.bench, run.folder

    def tell(n_done: int, note: str) -> None:
        run.on_progress(Progress(MEASURING_FILES, n_done, N_FINISH_PARTS, note))

    tell(0, "exporting")
    images = job.data.test.model_input(slice(0, N_PROOF_IMAGES))
    original_file = folder.original_onnx
    with folder.unproven_onnx() as unproven:
        engines = {
            **engines, **export_both(job, tuned, (original_file, unproven), images, bench)
        }  # fmt: skip
        tell(1, "timing them")
        effort = run.budget.effort(FINAL, FILES_SHARE * run.budget.left_s)
        speedup = bench.compare(original_file, unproven, effort)
        tell(2, "timing the layers")
        layers = bench.layers(original_file, unproven, tuned)
        tell(3, "accuracy of the original")
        tested = exam(job, original_file, bench)
        before = measured_side(job, job.model, original_file, speedup.original, tested)
        tell(4, "accuracy of the compressed network")
        after = measured_side(job, tuned, unproven, speedup.candidate, tested, before.metric)
        tell(N_FINISH_PARTS, "")
        are_met = [c.is_met(speedup, before, after) for c in job.config.constraints]
        verdict = judge(speedup, searched.noise_floor, are_met)
        handed_back = verdict is not Verdict.NOT_FASTER
        if handed_back:
            folder.write_checkpoint(rebuildable(job, plan, tuned))
            unproven.replace(folder.model_onnx)
    return Result(
        verdict=verdict,
        target=job.target.name,
        runtime=job.target.runtime,
        basis=speedup.basis,
        constraint=next(iter(job.config.constraints), None),
        constraints=job.config.constraints,
        branches=branches_table(job.prunable.branches, plan),
        training=training,
        layers=list(layers),
        original=before,
        compressed=after if handed_back else None,
        speedup=speedup,
        accuracy_drop_points=100 * (before.accuracy - after.accuracy) if handed_back else None,
        equivalence=_agreed(engines, len(images)),
        search=search_report(run, searched),
        groups=groups_table(job.prunable, plan),
        environment={
            **describe_environment(job.target, job.loaded, job.data),
            "device": dict(bench.described),
        },
        out=folder.path,
    )


def _agreed(engines: dict[str, float | str], n_inputs: int) -> Equivalence:
    errors = [e for e in engines.values() if isinstance(e, float)]
    return {"engines": engines, "n_inputs": n_inputs, "max_abs_error": max(errors)}


def write_result(run: Run, searched: Searched, result: Result) -> Result:
    """Writes report and result, which ends the run."""
    search = search_report(run, searched)
    result = replace(result, search=search, out=run.folder.path)
    run.folder.write_report(html_report(result, searched.trials))
    run.folder.write_result(result)
    run.folder.forget_unfinished()
    return result


def rebuildable(job: Job, plan: Plan, tuned: nn.Module) -> dict[str, object]:
    """The content of `model.pt`: tensors and plain values, read by `load_compressed`."""
    return {
        "state_dict": tuned.state_dict(),
        "plan": {name: list(kept) for name, kept in plan.kept.items()},
        "dropped": list(plan.dropped),
        "arch": job.config.arch,
        "arch_args": dict(job.config.arch_args),
        **_kept_example(job.example),
        "part_of": job.config.task if _is_part(job) else None,
        "form": MODULE if job.prunable.form == TRACED and not plan.dropped else job.prunable.form,
    }


def _is_part(job: Job) -> bool:
    """Whether a part of the model is compressed, which its task picks."""
    return isinstance(job.criterion, OwnTask) and job.criterion.has_network


def _kept_example(example: Example) -> dict[str, object]:
    """What rebuilding records the network with: shapes, and of ids one that there is.

    No other value of the data is kept.
    """
    if isinstance(example, Tensor) and example.is_floating_point():
        return {"input_shape": list(example.shape[1:])}
    kept = map_tensors(
        lambda t: (t.new_zeros(()) if t.is_floating_point() else t.amin()).expand(t.shape), example
    )
    return {"input_shape": [], "example": kept}


def export_both(
    job: Job, tuned: nn.Module, files: tuple[Path, Path], images: Example, bench: Bench
) -> dict[str, float]:
    """Writes the original and the compressed network; how far the latter's answers are from torch.

    For a target that runs FP16 both files are FP16, inputs and outputs aside. ONNX Runtime on a
    CPU rounds to FP16 between operations, not within them: the device's own rounding may add to
    that error.

    Raises:
        ExportError: A file cannot be written as the target needs it.
        EquivalenceError: They do not agree, or FP16 has not the range for this network.
    """
    for network, file in zip((job.model, tuned), files, strict=True):
        export_onnx(network, job.example, file, target=job.target)
    open_file = partial(predictor, files[-1], like=bench.like)
    errors = {"onnxruntime": check_agree("torch and ONNX Runtime", tuned, open_file(), images)}
    if job.target.precision != FP16:
        return errors
    for file in files:
        try:
            write_whole(file, half_onnx(file.read_bytes(), str(file)))
        except ValueError as err:
            raise ExportError(str(err)) from err
    in_half = check_agree("torch and FP16", tuned, open_file(), images, tolerance=FP16_TOLERANCE)
    return errors | {FP16: in_half}


def exam(job: Job, original: Path, bench: Bench) -> Exam:
    """What takes the test accuracy of an ONNX file, given the original's metric but for its own.

    Args:
        job: With its test images.
        original: The original's file, whose answers are right where there are no labels.
        bench: That knows what the original returns.
    """
    open_file = partial(predictor, like=bench.like)
    test = posed(
        partial(open_file, original), job.data.test, batch_size=1, criterion=job.criterion
    )

    def tested(file: Path, metric: float | None) -> Accuracy:
        return accuracy(
            open_file(file), test, batch_size=1, criterion=job.criterion, original=metric
        )

    return tested


def measured_side(
    job: Job,
    model: nn.Module,
    file: Path,
    latency: Latency,
    tested: Exam,
    original: float | None = None,
) -> Side:
    """One model of the result: its test accuracy is that of the ONNX file.

    `original` is the metric of the original, of a task that is no classification.
    """
    paper = cost(model, job.loaded.example_input)
    measured = tested(file, original)
    return Side(
        accuracy=measured.value,
        latency_ms=latency,
        macs=paper.macs,
        params=paper.params,
        file_bytes=file.stat().st_size,
        metric=measured.metric,
    )


def judge(speedup: PairedLatency, noise_floor: PairedLatency, are_met: Sequence[bool]) -> Verdict:
    """Whether the limits are met; and what is no faster than noise can make it is no win.

    An estimate has no noise, and its error is no interval: only its ratio is looked at, and the
    result is labelled with its basis.
    """
    is_estimate = speedup.basis is Basis.ESTIMATE
    if not (speedup.ratio > 1 if is_estimate else is_win(speedup, noise_floor)):
        return Verdict.NOT_FASTER
    return Verdict.MET if all(are_met) else Verdict.INFEASIBLE
