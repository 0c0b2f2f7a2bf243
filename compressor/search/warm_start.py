"""Plans that people make by hand, and what a latency table says of them: the first trials.

They cost trials like all others, and see to it that a search is never worse than a hand-tuned
tool. All are brought to the limit by `fitted`.
"""

from collections.abc import Callable, Sequence

import numpy as np

from compressor.search.costs import FloatArray, LatencyTable
from compressor.search.objective import TIME, TIME_MARGIN, Problem
from compressor.search.space import Ratios, Widths

N_BISECTIONS = 8
FREE_TIMES = (0.75, 0.6, 0.45)  # where no limit is given
# Damages add up steeper than one by one, those of whole branches most: ResNet-56 with half of its
# MACs had 55 % of its answers right with factor 1, which left out 14 branches, and 83 % with 7.
BRANCH_FACTORS = (2.0, 4.0, 1.0, 0.25)
LEAST_HARM = 0.1  # of the median; what was measured below that owes it to few images
Family = Callable[[FloatArray], Ratios]  # strength in [0, 1], (n,) -> ratios, (n, n_variables)


def limits_of(problem: Problem) -> list[dict[str, float]]:
    """The limits that plans are brought to; several where the user gave none."""
    limits = dict(problem.objective.limits)
    if TIME in limits:
        limits[TIME] *= TIME_MARGIN
    return [limits] if limits else [{TIME: share} for share in FREE_TIMES]


def meets(
    problem: Problem, table: LatencyTable, limits: dict[str, float], plans: Sequence[Widths]
) -> FloatArray:
    """`(n_plans,)`: 1 where a plan is expected to meet all limits, else 0."""
    return np.asarray((beyond(problem, table, limits, plans) == 0).astype(np.float64))


def beyond(
    problem: Problem, table: LatencyTable, limits: dict[str, float], plans: Sequence[Widths]
) -> FloatArray:
    """`(n_plans,)`: sum of the logarithms by which a plan is expected to exceed its limits."""
    excess = np.zeros(len(plans))
    for metric, limit in limits.items():
        excess += np.log(np.maximum(problem.expected(metric, plans, table) / limit, 1))
    return excess


def warm_starts(problem: Problem, table: LatencyTable) -> list[Widths]:
    """Hand-made plans and knapsacks at the limit, each once, most promising first."""
    space = problem.space
    plans: list[Widths] = []
    path = [space.from_names(each.widths) for each in problem.path]
    factors = BRANCH_FACTORS if space.branches else (1.0,)
    if path:
        factors = factors[:1]
    for limits in limits_of(problem):
        at_limit = next((p for p in path if meets(problem, table, limits, [p])[0]), None)
        if at_limit is not None:
            plans.append(widened(problem, table, limits, at_limit, damages(problem)))
        n_groups = len(space.groups)
        knapsack = Knapsack(problem, table, limits)
        for factor in factors:
            harm = damages(problem)
            harm[n_groups:] *= factor
            plans.append(knapsack.plan(harm))
        for family in (global_importance(problem), uniform(problem)):
            fitted_plan = fitted(problem, table, limits, family)
            if fitted_plan is not None:
                plans.append(fitted_plan)
    return [plan for plan in dict.fromkeys(plans) if plan != space.original]


def damages(problem: Problem) -> FloatArray:
    """`(n_variables,)` harm done where a variable alone is at its least, never 0.

    Where it was not measured: the share of the MACs that go then.
    """
    space = problem.space
    if not problem.damages:
        return np.maximum(1 - problem.costs.macs(space.each_alone()), 1e-3)
    measured = np.array([problem.damages.get(name, 0.0) for name in space.names])
    harm: FloatArray = np.maximum(measured, max(LEAST_HARM * float(np.median(measured)), 1e-6))
    return harm


def uniform(problem: Problem) -> Family:
    """The same ratio for every group; no branch is left out."""
    n_groups, n = len(problem.space.groups), len(problem.space.choices)

    def ratios(strength: FloatArray) -> Ratios:
        rows = np.ones((len(strength), n))
        rows[:, :n_groups] = 1 - strength[:, None]
        return rows

    return ratios


def global_importance(problem: Problem) -> Family:
    """The lowest-scored channels of the whole network go; scores as shares of their group's mean.

    No branch is left out.
    """
    space = problem.space
    relative = [scores / max(float(scores.mean()), 1e-12) for scores in space.scores]
    pooled = np.sort(np.concatenate(relative)) if relative else np.zeros(1)

    def ratios(strength: FloatArray) -> Ratios:
        rows = np.ones((len(strength), len(space.choices)))
        for row, share in zip(rows, strength, strict=True):
            threshold = pooled[min(int(share * len(pooled)), len(pooled) - 1)]
            row[: len(relative)] = [float((scores >= threshold).mean()) for scores in relative]
        return rows

    return ratios


def fitted(
    problem: Problem, table: LatencyTable, limits: dict[str, float], family: Family
) -> Widths | None:
    """The weakest plan of `family` that meets the limits; None where its strongest does not."""
    strengths = np.linspace(0, 1, 65)
    plans = problem.space.snap(family(strengths))
    fits = np.flatnonzero(meets(problem, table, limits, plans))
    return plans[int(fits[0])] if len(fits) else None


def scaled_to(
    problem: Problem, table: LatencyTable, limits: dict[str, float], ratios: Ratios
) -> list[Widths]:
    """Plans along the lines from `ratios` to the narrowest plan, where they first meet the limits.

    Proportional scaling: one factor for all variables of a plan, found by bisection.
    """
    space = problem.space
    floors = space.floors
    weakest, strongest = np.zeros(len(ratios)), np.ones(len(ratios))

    def plans_at(strength: FloatArray) -> list[Widths]:
        return space.snap(floors + (1 - strength[:, None]) * np.maximum(ratios - floors, 0))

    for _ in range(N_BISECTIONS):
        middle = (weakest + strongest) / 2
        fits = meets(problem, table, limits, plans_at(middle)) > 0
        strongest = np.where(fits, middle, strongest)
        weakest = np.where(fits, weakest, middle)
    return plans_at(strongest)


def clipped_to_limit(
    problem: Problem, table: LatencyTable, limits: dict[str, float], ratios: Ratios
) -> list[Widths]:
    """The action wall of the released code, one variable after the other [he2018, fan2022].

    Each gets what it asks for as long as all later ones could still be narrowest, so that late
    layers pay.

    [he2018] He, Lin, Liu, Wang, Li, Han, AMC, ECCV 2018.
    """
    space = problem.space
    asked = space.snap(ratios)
    n_groups = len(space.groups)
    first = [
        next((i for i in range(n_groups) if space.inside[i, b]), n_groups)
        for b in range(len(space.branches))
    ]
    order = sorted(
        range(len(space.choices)), key=lambda i: (i if i < n_groups else first[i - n_groups], -i)
    )
    rows = np.array([[choice[0] for choice in space.choices]] * len(asked))
    for i in order:
        for choice in space.choices[i][1:]:
            tried = rows.copy()
            tried[:, i] = np.where(np.array(asked)[:, i] >= choice, choice, tried[:, i])
            plans = space.written_once([tuple(row) for row in tried.tolist()])
            fits = meets(problem, table, limits, plans) > 0
            rows[fits, i] = tried[fits, i]
    return space.written_once([tuple(row) for row in rows.tolist()])


class Knapsack:
    """Plans at the limits, by what harm their steps do for the time that they save.

    What does not depend on the harm is worked out once.
    """

    def __init__(self, problem: Problem, table: LatencyTable, limits: dict[str, float]) -> None:
        """Looks at every step of every variable alone.

        Args:
            problem: What is searched.
            table: Expected times.
            limits: Metric -> largest share; the first one is what steps save.
        """
        self._problem, self._table, self._limits = problem, table, limits
        space = problem.space
        steps = [
            (i, choice, depth, len(choices) - 1)
            for i, choices in enumerate(space.choices)
            for depth, choice in enumerate(reversed(choices[:-1]), start=1)
        ]
        whole = space.original
        alone = [(*whole[:i], choice, *whole[i + 1 :]) for i, choice, _, _ in steps]
        metric = next(iter(limits))
        self._saved = 1 - problem.expected(metric, space.written_once(alone), table)
        columns = np.array(steps, dtype=np.int64).reshape(-1, 4).T
        self._variables, self._choices, self._depths, self._n_steps = columns

    def plan(self, harm: FloatArray) -> Widths:
        """Steps of least harm per time saved are taken until the limits are met.

        Then those are taken back that were not needed after all, most harmful first.

        Args:
            harm: `(n_variables,)` of taking each variable to its least; steps of a width have
                equal parts of it.
        """
        space = self._problem.space
        shares = harm[self._variables] * self._depths / self._n_steps
        rates = shares / np.maximum(self._saved, 1e-9)
        rates[self._saved <= 0] = np.inf
        plan = list(space.original)
        path = [space.original]
        for at in np.argsort(rates, kind="stable"):
            i, choice = int(self._variables[at]), int(self._choices[at])
            if np.isfinite(rates[at]) and choice < plan[i]:
                plan[i] = choice
                path.append(tuple(plan))
        path = [*space.written_once(path), space.narrowest]
        fits = np.flatnonzero(meets(self._problem, self._table, self._limits, path))
        if not len(fits):
            return space.narrowest
        at_limit = path[int(fits[0])]
        return widened(self._problem, self._table, self._limits, at_limit, harm)


def widened(
    problem: Problem,
    table: LatencyTable,
    limits: dict[str, float],
    plan: Widths,
    harm: FloatArray,
) -> Widths:
    """`plan` with all taken back that the limits leave room for, most harmful first."""
    space = problem.space
    per_share = harm / (1 - space.floors)
    while True:
        wider = space.wider(plan)
        if not wider:
            return plan
        fit = meets(problem, table, limits, wider)
        saved_harm = (space.ratios(wider) - space.ratios([plan])) @ per_share * fit
        if saved_harm.max() <= 0:
            return plan
        plan = wider[int(saved_harm.argmax())]
