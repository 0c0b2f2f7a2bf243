"""Result -> text for people."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter

from compressor.report.clock import clock_of, went_on
from compressor.report.words import NO_LABELS, is_agreement, measure
from compressor.tasks import CLASSIFICATION
from compressor.values import (
    Basis,
    Branch,
    ChannelGroup,
    Cost,
    PairedLatency,
    Replayed,
    Result,
    Role,
    Side,
    Staircase,
    Target,
    Trial,
    Verdict,
)

VERDICTS = {
    Verdict.MET: "met",
    Verdict.INFEASIBLE: "NOT met: the best plan found is written, but it misses a limit",
    Verdict.NOT_FASTER: "NOT faster: no model is handed back",
}


def text_report(result: Result) -> str:
    """A table of before and after, the verdict, and what was pruned."""
    locked = [g for g in result.groups if g["locked_because"]]
    pruned = [g for g in result.groups if g["kept"] != g["channels"] and g["kept"]]
    dropped = [str(b["name"]) for b in result.branches if not b["kept"]]
    widths = ", ".join(f"{g['name']} {g['channels']}->{g['kept']}" for g in pruned) or "none"
    overhead = result.search["overhead_seconds_per_trial"]
    return "\n".join([
        *aligned(before_and_after(result)),
        "",
        f"asked for   {_asked_for(result)} on {result.target} ({result.runtime})",
        *([f"agreement   {NO_LABELS}"] if is_agreement(result) else []),
        f"verdict     {VERDICTS[result.verdict]}",
        f"speed-up    {speedup_of(result.speedup)}",
        *(f"clock       {told}" for told in clock_of(result.speedup)),
        *(f"doubtful    {condition}" for condition in result.speedup.conditions),
        f"search      {result.search['strategy']}, {result.search['n_trials']} trials "
        f"({result.search['n_failed']} failed) in {result.search['seconds']:.0f} s"
        f"{went_on(result)}; "
        f"{overhead:.2f} s a trial outside forward passes and measuring",
        *(f"cut short   {what}: the time budget" for what in result.search.get("cut_short", ())),
        *_training(result),
        f"proof       largest output difference {result.equivalence['max_abs_error']:.1e} on "
        f"{result.equivalence['n_inputs']} real images: {_engines(result)}",
        f"left out    {', '.join(dropped) or 'no residual branch'}",
        f"widths      {widths}",
        f"locked      {', '.join(str(g['name']) for g in locked) or 'none'}",
        f"files       {result.out} (open report.html)",
    ])  # fmt: skip


def before_and_after(result: Result) -> list[tuple[str, str, str, str]]:
    """Rows of both networks' figures, heads first."""
    before, after = result.original, result.compressed
    task = result.search.get("task", CLASSIFICATION.name)
    head = ("", "original", "compressed", "change")
    if after is None:
        return [head, *((name, value, "-", "") for name, value in _figures(before, task))]
    metric = () if after.metric is None else ("",)
    changes = (
        *metric,
        f"{100 * (after.accuracy - before.accuracy):+.2f} {'points' if not metric else '%'}",
        f"{result.speedup.ratio:.2f}x faster",
        "",
        _times(before.macs, after.macs),
        _times(before.params, after.params),
        _times(before.file_bytes, after.file_bytes),
    )
    figures = zip(_figures(before, task), _figures(after, task), changes, strict=True)
    return [head, *((name, old, new, change) for (name, old), (_, new), change in figures)]


def _training(result: Result) -> list[str]:
    how = result.training
    if how is None:
        return []
    if "skipped_because" in how:
        return [f"training    SKIPPED: {how['skipped_because']}"]
    parts = [f"{how['steps']} steps of {how['batch_size']} images"]
    if len(how["finalists"]) > 1:
        parts.append(f"{len(how['finalists'])} finalists")
    if how["distillation"]:
        parts.append(f"the original's answers weigh {how['distillation']}")
    if how.get("hints"):
        parts.append(f"its hints {how['hints']:g}")
    parts += how["augmentations"]
    if how["search_accuracy"] == how["search_accuracy_before"]:
        parts.append("NOTHING GAINED: try a lower --learning-rate")
    if how["stopped_because"]:
        parts.append(f"STOPPED: {how['stopped_because']}")
    return [f"training    {', '.join(parts)}"]


def front_report(results: Sequence[Result]) -> str:
    """A row for every model of a front, slowest first; a model that another one beats says so."""
    is_labelled = not any(map(is_agreement, results))
    figure = measure(results[0]) if results else CLASSIFICATION.name
    heads = "model", "speed-up", "95 % interval", "latency", figure, "change", "MACs", "params"
    rows: list[tuple[str, ...]] = [(*heads, "")]
    for result in results:
        before, after, (low, high) = result.original, result.compressed, result.speedup.ci95
        row = [str(result.out), f"{result.speedup.ratio:.2f}x"]
        if after is None:
            row += ["not faster", *["-"] * 5]
        else:
            row += [
                f"[{low:.2f}, {high:.2f}]",
                f"{after.latency_ms.median_ms:.3f} ms",
                f"{after.accuracy:.2%}",
                f"{100 * (after.accuracy - before.accuracy):+.2f} points",
                _times(before.macs, after.macs),
                _times(before.params, after.params),
            ]
        rows.append((*row, _beaten(result, results)))
    return "\n".join([*aligned(rows), *([] if is_labelled else ["", NO_LABELS])])


def _beaten(result: Result, results: Sequence[Result]) -> str:
    """Names a model that is both faster and more accurate; training may bring that about."""
    for other in results:
        if other.compressed is None or result.compressed is None:
            continue
        is_faster = other.speedup.ratio > result.speedup.ratio
        if is_faster and other.compressed.accuracy > result.compressed.accuracy:
            return f"beaten by {other.out.name}"
    return ""


def _asked_for(result: Result) -> str:
    if result.search.get("front"):
        return "a model for every speed"
    given = result.constraints or ([result.constraint] if result.constraint else [])
    return " and ".join(map(str, given)) or "the largest weighted sum"


def speedup_of(pair: PairedLatency) -> str:
    """The ratio with what is known of it; an estimate says in capitals that it is one."""
    low, high = pair.ci95
    if pair.basis is Basis.ESTIMATE:
        return (
            f"{pair.ratio:.3f}x, ESTIMATE from the profile's figures: nothing was measured, it "
            f"may be anything from {low:.2g} to {high:.2g}"
        )
    return (
        f"{pair.ratio:.3f}x, 95 % interval [{low:.3f}, {high:.3f}], {pair.basis}, "
        f"{pair.original.n} runs of each"
    )


def _engines(result: Result) -> str:
    """Which engines agreed, and which could not be asked."""
    engines = result.equivalence["engines"]
    agreed = [name for name, error in engines.items() if isinstance(error, float)]
    silent = [f"NOT {name}: {why}" for name, why in engines.items() if isinstance(why, str)]
    return "; ".join([", ".join(agreed), *silent])


def replay_report(path: Path, found: Replayed) -> str:
    """Whether a search follows from what was measured."""
    shipped = (
        "no plan was shipped"
        if found.shipped is None
        else (f"the plan that was shipped is that of trial {found.shipped + 1}")
    )
    if found.differs_at is None:
        return f"{path}: all {found.n_trials} plans follow from the measurements; {shipped}."
    return (
        f"{path}: DIFFERS from trial {found.differs_at + 1} of {found.n_trials} on: another plan "
        f"follows from the measurements before it. Other versions of libraries search otherwise; "
        f"the run's are in manifest.json. {shipped[0].upper()}{shipped[1:]}."
    )


def trials_report(folder: Path, trials: Sequence[Trial]) -> str:
    """The trials of a run that has no result yet, the best of its measure first."""
    done = [t for t in trials if t.accuracy is not None]
    name = next((t.accuracy.name for t in done if t.accuracy is not None), CLASSIFICATION.name)
    rows = [("trial", "phase", name, "speed-up", "latency")]
    rows += [
        (str(t.number + 1), t.phase, f"{t.accuracy.value:.2%}", f"{t.speedup:.2f}x",
         f"{t.latency_ms:.3f} ms")
        for t in sorted(done, key=lambda t: t.accuracy.value if t.accuracy else 0, reverse=True)
        if t.accuracy is not None
    ]  # fmt: skip
    head = f"{folder} has no result: the run was not finished. Trials measured: {len(done)}"
    return "\n".join([f"{head}, failed: {len(trials) - len(done)}.", "", *aligned(rows)])


def trials_json(trials: Sequence[Trial]) -> str:
    """The same as JSON."""
    return TypeAdapter(list[Trial]).dump_json(list(trials), indent=2).decode()


def groups_report(groups: Sequence[ChannelGroup], branches: Sequence[Branch], paper: Cost) -> str:
    """Every channel group: who is tied to whom, what it costs, and why it is locked."""
    rows = [("group", "channels", "", "MACs", "params", "written by", "read by")]
    rows += [
        (g.name, f"{g.n_channels} x {g.unit}" if g.unit > 1 else str(g.n_channels),
         "locked" if g.locked_because else "", si(g.cost.macs), si(g.cost.params),
         _names(g.modules(Role.PRODUCER)), _names(g.modules(Role.CONSUMER)) or "-")
        for g in groups
    ]  # fmt: skip
    free = [g for g in groups if not g.locked_because]
    reasons: dict[str, list[str]] = defaultdict(list)
    for group in groups:
        if group.locked_because:
            reasons[group.locked_because].append(group.name)
    return "\n".join([
        *aligned(rows, right=(1, 3, 4)),
        "",
        f"{paper.macs / 1e6:.2f} M multiply-accumulates, {paper.params / 1e6:.3f} M parameters; "
        f"{len(free)} of {len(groups)} groups can be pruned.",
        "MACs and params are those that go if the whole group goes; groups share them.",
        "locked:" if reasons else "no group is locked",
        *(f"  {_names(names)}: {because}" for because, names in reasons.items()),
        f"residual branches that can be left out whole: "
        f"{', '.join(f'{b.name} ({si(b.macs)})' for b in branches) or 'none'}",
    ])  # fmt: skip


def groups_json(
    groups: Sequence[ChannelGroup], branches: Sequence[Branch]
) -> dict[str, list[dict[str, object]]]:
    """The same as plain values."""
    rows: list[dict[str, object]] = [
        {
            "name": g.name,
            "channels": g.n_channels,
            "unit": g.unit,
            "macs": g.cost.macs,
            "params": g.cost.params,
            "written_by": list(g.modules(Role.PRODUCER)),
            "read_by": list(g.modules(Role.CONSUMER)),
            "locked_because": g.locked_because,
        }
        for g in groups
    ]
    return {
        "groups": rows,
        "branches": [{"name": b.name, "groups": list(b.groups), "macs": b.macs} for b in branches],
    }


def _names(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = [name or "(model)" for name in names[:4]]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(shown)}{more}"


def si(count: int) -> str:
    """`1.2 M`, three figures at most."""
    for factor, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= factor:
            return f"{count / factor:.3g}{prefix}"
    return str(count)


def latency_report(pair: PairedLatency, *, is_pair: bool) -> str:
    """Times of one or two models, and their ratio."""
    low, high = pair.ci95
    rows = [("", "median", "p90", "runs")]
    sides = [("original", pair.original), ("candidate", pair.candidate)]
    rows += [
        (name, f"{side.median_ms:.3f} ms", f"{side.p90_ms:.3f} ms", str(side.n))
        for name, side in (sides if is_pair else sides[1:])
    ]
    ratio = f"{pair.ratio:.3f}x, 95 % interval [{low:.3f}, {high:.3f}]"
    if pair.basis is Basis.ESTIMATE:
        ratio = f"{pair.ratio:.3f}x, ESTIMATE from the profile's figures, nothing was measured; "
        ratio += f"it may be anything from {low:.3g} to {high:.3g}"
    what = "original / candidate" if is_pair else "the model against itself (noise floor)"
    doubts = [f"doubtful: {condition}" for condition in pair.conditions]
    verdict = [] if pair.basis is Basis.ESTIMATE else [*(doubts or ["valid"])]
    clock = [f"clock: {told}" for told in clock_of(pair)]
    return "\n".join([*aligned(rows), "", f"{what}: {ratio}", *clock, *verdict])


def latency_json(pair: PairedLatency) -> str:
    """The same as JSON, with every raw time."""
    return TypeAdapter(PairedLatency).dump_json(pair, indent=2).decode()


def targets_report(targets: Sequence[Target], answers: Mapping[str, str]) -> str:
    """One line a target: what it runs, and whether it answers."""
    rows = [("target", "answers", "runtime", "precision", "threads", "step", "opset", "what")]
    rows += [
        (t.name, answers[t.name].partition(":")[0], t.runtime, t.precision, str(t.n_threads),
         str(t.step), str(t.opset), t.description)
        for t in targets
    ]  # fmt: skip
    return "\n".join([
        *aligned(rows, right=(4, 5, 6)),
        "",
        "A target that does not answer is on another machine (--device ssh://user@host), or can "
        "be estimated (--estimate).",
    ])  # fmt: skip


def target_report(target: Target, answer: str) -> str:
    """Everything about one target."""
    roofline = target.roofline
    figures = []
    if roofline is not None:
        peak, memory = roofline.ops_per_s, roofline.bytes_per_s
        figures = [
            ("peak", f"{peak.value / 1e9:.4g} G operations/s ({peak.basis}: {peak.source})"),
            ("memory", f"{memory.value / 1e9:.4g} GB/s ({memory.basis}: {memory.source})"),
        ]
    rows = [
        ("target", f"{target.name}: {target.description}"),
        ("answers", answer),
        ("runtime", f"{target.runtime} {target.provider} {target.precision}".replace("  ", " ")),
        ("threads", str(target.n_threads)),
        ("step", f"{target.step} channels ({target.step_source})"),
        ("ONNX", f"opset {target.opset}, {target.max_opset} at most; IR {target.max_ir} or older"),
        *figures,
        *(("before", advice) for advice in target.power_advice),
        *(("source", source) for source in target.sources),
    ]
    return "\n".join(f"{name:<9} {text}" for name, text in rows)


def targets_json(targets: Sequence[Target], answers: Mapping[str, str]) -> str:
    """Every target with all its figures, and whether it answers."""
    content = TypeAdapter(list[Target]).dump_python(list(targets), mode="json")
    for entry in content:
        entry["answers"] = answers[entry["name"]]
    return json.dumps(content, indent=2)


def staircase_report(staircase: Staircase, target: Target, kept_in: Path | None = None) -> str:
    """What every width costs on the device, and the step that follows."""
    kinds = list(staircase.costs)
    rows = [("channels", *kinds)]
    rows += [
        (str(width), *(f"{staircase.costs[kind][width]:.2f}" for kind in kinds))
        for width in staircase.costs[kinds[0]]
    ]
    steps = ", ".join(f"{kind} {step}" for kind, step in staircase.kinds.items())
    return "\n".join([
        *aligned(rows, right=range(len(rows[0]))),
        "",
        f"time as a share of the widest, on {target.name}; steps: {steps}",
        f"step {staircase.step}{f', kept in {kept_in}' if kept_in else ''}",
    ])  # fmt: skip


def staircase_json(staircase: Staircase) -> str:
    """The same as JSON."""
    return TypeAdapter(Staircase).dump_json(staircase, indent=2).decode()


def _figures(side: Side, task: str) -> list[tuple[str, str]]:
    """Rows of one side; `task` names the metric."""
    worth = [(f"test {task}", f"{side.accuracy:.2%}")]
    if side.metric is not None:
        worth = [(f"test {task}", f"{side.metric:.5g}"), ("kept of it", f"{side.accuracy:.2%}")]
    return [
        *worth,
        ("latency, median", f"{side.latency_ms.median_ms:.3f} ms"),
        ("latency, p90", f"{side.latency_ms.p90_ms:.3f} ms"),
        ("MACs", f"{side.macs / 1e6:.2f} M"),
        ("parameters", f"{side.params / 1e6:.3f} M"),
        ("ONNX file", f"{side.file_bytes / 2**20:.2f} MiB"),
    ]


def _times(before: float, after: float) -> str:
    return f"{before / after:.2f}x less" if after < before else "unchanged"


def aligned(rows: Sequence[tuple[str, ...]], right: Sequence[int] | None = None) -> list[str]:
    """Lines of equal columns; `right` are those aligned right, by default all but the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    if right is None:
        right = range(1, len(widths))
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
