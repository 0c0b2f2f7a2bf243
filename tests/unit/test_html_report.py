"""The page in a real browser, and what it says."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from compressor.goals import Constraint
from compressor.report.figures import figures
from compressor.report.html import html_report
from compressor.report.words import verdict_in_words, why
from compressor.values import (
    Accuracy,
    GroupRow,
    LayerRow,
    Result,
    Trial,
    Verdict,
)
from tests.unit.test_run_folder import make_result

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
MEASURE = """<script>
const wait = setInterval(() => {
  if (!document.body.dataset.drawn) return;
  clearInterval(wait);
  document.body.dataset.ms = Math.round(performance.now());
  document.body.dataset.overflow = document.documentElement.scrollWidth - innerWidth;
}, 5);
</script></body>"""

Change = Callable[[Result], Result]


def layer(name: str, before: float, after: float | None, macs: int, left: int) -> LayerRow:
    return {"name": name, "kind": "Conv", "original_ms": before, "compressed_ms": after,
            "original_macs": macs, "compressed_macs": left}  # fmt: skip


def full_result(folder: Path) -> Result:
    """With something of everything."""
    made = make_result(folder / "run")
    tree = {"names": ["stem", "body", "<b>tail"],
            "linkage": [(0.0, 1.0, 0.5, 2.0), (2.0, 3.0, 1.5, 3.0)]}  # fmt: skip
    return replace(
        made,
        layers=[
            layer("stem", 1.0, 0.5, 1000, 500),
            layer("pool", 0.2, 0.2, 0, 0),
            layer("gone", 0.5, None, 400, 0),
        ],
        search={**made.search, "tree": tree},  # type: ignore[typeddict-item]
        environment={**made.environment, "channel_step": "16 (AVX512 on this CPU)"},
    )


def some_trials(n: int = 12) -> list[Trial]:
    return [
        Trial(i, {"stem": 16}, "start" if i < 4 else "clusters" if i < 8 else "layers",
              Accuracy(0.5 + 0.03 * i, 100), 1.5 + 0.2 * i, (1.4, 3.0), 2.0)
        for i in range(n)
    ] + [Trial(n, {"stem": 16}, "layers", failed_because="it crashed")]  # fmt: skip


def in_browser(page: str, folder: Path, width: int) -> tuple[str, str]:
    """(the page after its scripts, what the browser's console said)."""
    assert CHROMIUM is not None
    file = folder / "report.html"
    file.write_text(page.replace("</body>", MEASURE), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--timeout=60000",
         "--virtual-time-budget=20000", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, "\n".join(x for x in done.stderr.splitlines() if "CONSOLE" in x)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1200, 500])
def test_every_figure_is_drawn_without_a_network(tmp_path: Path, width: int) -> None:
    """On a desk and on a phone; under 5 MB, and soon."""
    result, trials = full_result(tmp_path), some_trials()
    page = html_report(result, trials)
    assert len(page.encode()) < 5e6
    drawn = figures(result, trials)
    assert len(drawn) == 6
    dom, console = in_browser(page, tmp_path, width)
    assert console == ""
    assert f'data-drawn="{len(drawn)}"' in dom
    for figure in drawn:
        element = dom[dom.index(f'id="{figure.name}"') :]
        assert "main-svg" in element[: element.index("</figure>")], figure.name
    overflow = re.search(r'data-overflow="(-?\d+)"', dom)
    assert overflow is not None
    assert int(overflow[1]) <= 0


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = html_report(full_result(tmp_path), some_trials())
    text = re.sub(r'<script type="text/plain" id="plotly">.*?</script>', "", page, flags=re.S)
    assert not re.search(r"(src|href)\s*=|url\(|@import|fetch\(|https?://", text)


def test_names_cannot_speak_for_the_page(tmp_path: Path) -> None:
    """Those of layers come from a model that anybody may have written."""
    evil = "</script><script>alert(1)</script>"
    rows: list[GroupRow] = [{"name": evil, "channels": 8, "kept": 8, "locked_because": evil}]
    result = replace(
        full_result(tmp_path), groups=rows, target=evil, layers=[layer(evil, 1, 1, 1, 1)]
    )
    page = html_report(result, some_trials())
    assert "<script>alert" not in page
    data = re.search(r'id="figures">(.*?)</script>', page, flags=re.S)
    assert data is not None
    assert evil in json.dumps(json.loads(data[1])).replace("\\u003c", "<")


@pytest.mark.parametrize(
    ("constraint", "flag"),
    [
        (Constraint("speedup", 2.0), "--speedup 2"),
        (Constraint("max-latency", 12.5), "--max-latency 12.5ms"),
        (Constraint("max-drop", 1.0), "--max-drop 1"),
        (Constraint("macs", 0.5), "--constraint macs=0.5"),
    ],
)
def test_the_command_that_does_it_again_can_be_given(
    constraint: Constraint, flag: str, tmp_path: Path
) -> None:
    page = html_report(replace(full_result(tmp_path), constraints=[constraint]), [])
    assert f"--target host-cpu {flag} --search" in page


def test_a_result_with_little_in_it_is_a_page_too(tmp_path: Path) -> None:
    made = make_result(tmp_path, Verdict.NOT_FASTER)
    page = html_report(replace(made, groups=[], branches=[]), [])
    assert "No network is handed back" in page
    assert "Every trial" not in page


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r, "time followed them"),
        (lambda r: replace(r, speedup=replace(r.speedup, ratio=1.2)), "did not follow them"),
        (lambda r: replace(r, layers=[]), "does not tell what each layer takes"),
        (lambda r: replace(r, layers=[layer("a", 1, 0.5, 9, 3), layer("sum", 1, 1, 0, 0)]),
         "Memory-bound: 67% of the time"),
        (lambda r: replace(r, layers=[layer("a", 0.1, 0.002, 9, 3), layer("b", 1, 0.006, 9, 3)]),
         "Launch-bound: 2 nodes of under 10 us take 100%"),
        (lambda r: replace(r, layers=[layer("whole", 1, 1, 9, 9), layer("b", 1, 0.3, 9, 3)]),
         "77% of the time is in layers that kept all their channels, such as whole"),
        (lambda r: replace(r, layers=[layer("slow", 1, 0.9, 9, 3), layer("b", 1, 0.3, 9, 3)]),
         "75% of the time is in layers that multiply more slowly than before"),
        (lambda r: replace(r, layers=[layer("b", 1, 0.3, 9, 3), layer("gone", 1, None, 9, 0)]),
         "1 nodes went whole, with 50% of the original's time"),
        (lambda r: replace(r, layers=[{**layer("to_half", 1, 1, 0, 0), "kind": "Cast"},
                                      layer("b", 1, 3, 9, 3)]),
         "Fallback precision: 25% of the time goes into casts"),
        (lambda r: r, "Every width that was changed is on the target's step of 16"),
        (lambda r: replace(r, groups=[{**r.groups[0], "kept": 17}]),
         "Off the target's step of 16 channels: stem"),
    ],
)  # fmt: skip
def test_words_say_where_the_time_went(change: Change, sentence: str, tmp_path: Path) -> None:
    assert sentence in " ".join(why(change(full_result(tmp_path)), 16))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r, "2.50 times as fast as the original (95 % interval 2.40 to 2.60), loses "
                      "0.20 points of accuracy and meets"),
        (lambda r: replace(r, verdict=Verdict.INFEASIBLE), "and misses"),
        (lambda r: replace(r, accuracy_drop_points=-0.4), "gains 0.40 points"),
        (lambda r: replace(r, accuracy_drop_points=0.0), "keeps its accuracy"),
        (lambda r: replace(r, constraints=[Constraint("max_drop", 1.0)]), "meets"),
        (lambda r: replace(
            r, original=replace(r.original, metric=0.4), search={**r.search, "task": "mAP"}
        ), "% of its mAP and meets"),
        (lambda r: replace(r, compressed=None), "No network is handed back"),
    ],
)  # fmt: skip
def test_the_verdict_is_a_sentence(change: Change, sentence: str, tmp_path: Path) -> None:
    assert sentence in verdict_in_words(change(full_result(tmp_path)))
