"""`report.html`: one file that opens without a network, on a phone, and on paper.

The text stands without JavaScript; figures are drawn by plotly.js, which lies in the file, packed.
What comes from a run is escaped: names in a model could hold anything.
"""

import base64
import gzip
import html
import json
import re
from collections.abc import Sequence
from importlib import resources

from compressor.printable import printable
from compressor.report import before_and_after
from compressor.report.clock import clock_of
from compressor.report.figures import Figure, figures
from compressor.report.words import NO_LABELS, is_agreement, verdict_in_words, why
from compressor.values import Result, Trial

STYLE = """
:root { color-scheme: light; --ink: #1c2126; --dim: #5b6470; --line: #e2e5e9; --blue: #0b6bcb; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .3rem; }
p.verdict { font-size: 1.15rem; border-left: 4px solid var(--blue); padding-left: .9rem; }
p.note, figcaption { color: var(--dim); margin: .2rem 0 .6rem; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, td.text { text-align: left; }
th { color: var(--dim); font-weight: 600; }
figure { margin: 0; break-inside: avoid; } div.plot { width: 100%; }
pre { background: #f5f6f8; padding: .8rem; overflow-x: auto; font-size: .85rem; }
@media (max-width: 40rem) { body { font-size: 15px; } th, td { padding: .3rem .35rem; } }
@media print { body { max-width: none; font-size: 11pt; } h2 { break-after: avoid; } }
"""
SCRIPT = """
const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent.trim()),
  (c) => c.charCodeAt(0));
const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
new Response(unpacked).text().then(async (text) => {
  const library = document.createElement("script");
  library.textContent = text;
  document.head.append(library);
  const figures = JSON.parse(document.getElementById("figures").textContent);
  for (const f of figures) {
    const layout = { margin: { l: 60, r: 20, t: 10, b: 50 }, font: { family: "system-ui" },
      legend: { orientation: "h", y: 1.12 }, paper_bgcolor: "white", plot_bgcolor: "white",
      ...f.layout, height: f.height };
    await Plotly.newPlot(f.name, f.traces, layout, { responsive: true, displaylogo: false,
      displayModeBar: false });
  }
  document.body.dataset.drawn = figures.length;
});
"""


def html_report(result: Result, trials: Sequence[Trial]) -> str:
    """The whole page.

    Args:
        result: Of a finished run.
        trials: Of its study.
    """
    drawn = figures(result, trials)
    title = f"{result.out.name}: compressed for {result.target}"
    return "\n".join([
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_safe(title)}</title>", f"<style>{STYLE}</style>", "</head>", "<body>",
        f"<h1>{_safe(title)}</h1>",
        f'<p class="verdict">{_safe(verdict_in_words(result))}</p>',
        *_agreement(result),
        *_before_and_after(result),
        *_why(result),
        *(line for figure in drawn for line in _figure(figure)),
        *_locked(result),
        *_environment(result),
        f'<script type="application/json" id="figures">{_data(drawn)}</script>',
        f'<script type="text/plain" id="plotly">{_library()}</script>',
        f"<script>{SCRIPT}</script>", "</body>", "</html>", "",
    ])  # fmt: skip


def _agreement(result: Result) -> list[str]:
    said = f'<p class="note">{NO_LABELS[0].upper()}{NO_LABELS[1:]}.</p>'
    return [said] if is_agreement(result) else []


def _before_and_after(result: Result) -> list[str]:
    head, *rows = before_and_after(result)
    doubts = [f"<p>Doubtful: {_safe(c)}.</p>" for c in result.speedup.conditions]
    clock = [f"<p>Clock: {_safe(told)}.</p>" for told in clock_of(result.speedup)]
    return ["<h2>Before and after</h2>", *_table(head, rows), *clock, *doubts]


def _why(result: Result) -> list[str]:
    step = str(result.environment.get("channel_step", "")).split(" ")[0]
    is_number = re.fullmatch(r"[1-9][0-9]{0,5}", step)
    said = why(result, int(step) if is_number else None)
    if not said:
        return []
    return [
        "<h2>Where the time went</h2>",
        "<ul>",
        *(f"<li>{_safe(s)}</li>" for s in said),
        "</ul>",
    ]


def _figure(figure: Figure) -> list[str]:
    return [
        "<figure>", f"<h2>{_safe(figure.title)}</h2>",
        f"<figcaption>{_safe(figure.text)}</figcaption>",
        f'<div class="plot" id="{figure.name}" style="min-height:{figure.height}px"></div>',
        "</figure>",
    ]  # fmt: skip


def _locked(result: Result) -> list[str]:
    rows = [(g["name"] or "(model)", str(g["channels"]), g["locked_because"])
            for g in result.groups if g["locked_because"]]  # fmt: skip
    dropped = [(b["name"], f"{b['macs'] / 1e6:.2f} M", "") for b in result.branches
               if not b["kept"]]  # fmt: skip
    parts = []
    if rows:
        parts += ["<h2>Left alone, and why</h2>", *_table(("group", "channels", "because"), rows)]
    if dropped:
        parts += ["<h2>Residual branches that were left out</h2>",
                  *_table(("branch", "multiply-accumulates", ""), dropped)]  # fmt: skip
    return parts


def _environment(result: Result) -> list[str]:
    asked = " ".join(constraint.flag for constraint in result.constraints)
    search = result.search
    told = json.dumps(result.environment, indent=2, default=str)
    return [
        "<h2>How to do it again</h2>",
        f'<p class="note">{_safe(search["strategy"])}, {search["n_trials"]} trials '
        f"({search['n_failed']} failed) in {search['seconds']:.0f} s, seed {search['seed']}. "
        f"config.toml, manifest.json and every raw time are in the run folder.</p>",
        f"<pre>compress MODEL --target {_safe(result.target)} {_safe(asked)} "
        f"--search {_safe(search['strategy'])} --seed {search['seed']}\n"
        f"compress measure model.onnx --against original.onnx --target {_safe(result.target)}\n"
        f"compress replay RUN</pre>",
        f"<details><summary>Environment</summary><pre>{_safe(told)}</pre></details>",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    cells = "".join(f"<th>{_safe(name)}</th>" for name in head)
    lines = [f"<tr>{''.join(f'<td>{_safe(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return ['<div class="wide"><table>', f"<tr>{cells}</tr>", *lines, "</table></div>"]


def _safe(text: object) -> str:
    return html.escape(printable(text))


def _data(drawn: Sequence[Figure]) -> str:
    """As JSON that cannot end its element."""
    content = [
        {"name": f.name, "traces": f.traces, "layout": f.layout, "height": f.height} for f in drawn
    ]
    return json.dumps(content, allow_nan=False).replace("<", "\\u003c")


def _library() -> str:
    """plotly.js, packed: a third of its size."""
    script = resources.files("plotly").joinpath("package_data/plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(script, compresslevel=9, mtime=0)).decode("ascii")
