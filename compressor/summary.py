"""What a result says of its plan, its training and its search."""

from collections.abc import Sequence

from compressor.finalists import Winner
from compressor.job import Job
from compressor.prunable import Prunable
from compressor.run import Run
from compressor.search.clustering import importance_tree
from compressor.training import Tuned
from compressor.trials import INHERENT_PARTS, TRIAL_PARTS, Searched
from compressor.values import (
    Branch,
    BranchRow,
    GroupRow,
    Plan,
    Result,
    SearchCost,
    Trained,
    Tree,
    Trial,
    Untrained,
)


def training_report(
    job: Job, winner: Winner, tuned: Tuned, n_steps: int
) -> Trained | Untrained | None:
    """How the shipped network was trained, in `n_steps` steps."""
    if not job.data.is_trainable and job.config.fine_tune_epochs:
        return {"skipped_because": "there is no fit split to learn from"}
    if not job.n_steps:
        return None
    if not n_steps:
        return {"skipped_because": "the time budget had no time for it"}
    return {
        "steps": n_steps,
        "batch_size": job.config.batch_size,
        "finalists": [list(scores) for scores in winner.scores],
        "distillation": job.distillation,
        "hints": job.config.hints,
        "augmentations": list(job.augmentations),
        "search_accuracy": tuned.score,
        "search_accuracy_before": (
            tuned.score_before if winner.score_before is None else winner.score_before
        ),
        "stopped_because": winner.stopped_because or tuned.stopped_because,
    }


def groups_table(prunable: Prunable, plan: Plan) -> list[GroupRow]:
    """What became of every channel group."""
    gone = {name for b in prunable.branches if b.name in plan.dropped for name in b.groups}
    return [
        {
            "name": group.name,
            "channels": group.n_channels,
            "unit": group.unit,
            "kept": 0 if group.name in gone else plan.width(group),
            "locked_because": group.locked_because,
        }
        for group in prunable.groups
    ]


def branches_table(branches: Sequence[Branch], plan: Plan) -> list[BranchRow]:
    """What became of every residual branch."""
    return [{"name": b.name, "kept": b.name not in plan.dropped, "macs": b.macs} for b in branches]


def is_shipped(prunable: Prunable, plan: Plan, result: Result) -> bool:
    """Whether `plan` is what `result` shipped."""
    same_groups = groups_table(prunable, plan) == list(result.groups)
    return same_groups and branches_table(prunable.branches, plan) == list(result.branches)


def trial_shipped(job: Job, trials: Sequence[Trial], result: Result) -> Trial | None:
    """The trial whose plan `result` shipped; None where there is none."""
    for trial in trials:
        plan = job.space.plan(job.space.from_names(trial.widths))
        if trial.accuracy is not None and is_shipped(job.prunable, plan, result):
            return trial
    return None


def search_report(run: Run, searched: Searched) -> SearchCost:
    """How the plan was found, and what a trial cost: seconds a trial, part by part."""
    job, trials = run.job, searched.trials
    parts = {
        part: sum(t.seconds.get(part, 0.0) for t in trials) / len(trials) for part in TRIAL_PARTS
    }
    wall = searched.seconds / len(trials)
    floor = searched.noise_floor
    tree: Tree = {"names": [group.name for group in job.space.groups], "linkage": []}
    if len(job.space.groups) > 1:
        rows = importance_tree(job.space.scores).tolist()
        tree["linkage"] = [(one, other, height, n) for one, other, height, n in rows]
    return {
        "strategy": job.config.search,
        "n_trials": len(trials),
        "n_failed": sum(trial.failed_because is not None for trial in trials),
        "seconds": searched.seconds,
        "seed": job.config.seed,
        "task": job.criterion.name,
        "limits": dict(searched.problem.objective.limits),
        "front": job.config.pareto,
        "n_timed_before": len(searched.problem.timed),
        "noise_floor": {"ratio": floor.ratio, "ci95": floor.ci95},
        "seconds_per_trial": {**parts, "all": wall},
        "tree": tree,
        "n_corrections": len(searched.study.corrections),
        "cut_short": list(run.budget.cut_short),
        "overhead_seconds_per_trial": wall - sum(parts[part] for part in INHERENT_PARTS),
    }
