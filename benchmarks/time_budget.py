"""Runs of the demo's network with time budgets: asked, taken, and what was cut short.

python samples/digits/train.py
python -m benchmarks.time_budget --minutes 2,3,1.5,4
"""

import argparse
import tempfile
import time
from pathlib import Path

import compressor

MODEL = Path(__file__).parents[1] / "samples" / "digits" / "model.pt"


def main() -> None:
    """Prints a row a run, as it ends."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", default="2,3,1.5,4,2.5,1,2,1.5,3,1")
    budgets = [60 * float(each) for each in parser.parse_args().minutes.split(",")]
    print("| asked | taken | off | trials | steps | verdict | speed-up | accuracy | cut short |")
    print("|--:|--:|--:|--:|--:|---|--:|--:|---|")
    for budget_s in budgets:
        with tempfile.TemporaryDirectory() as folder:
            config = compressor.load_config(
                MODEL, {"target": "host-cpu", "speedup": 2.0, "time_budget": budget_s,
                        "out": Path(folder) / "run"},
            )  # fmt: skip
            began = time.monotonic()
            try:
                result = compressor.compress(config)
            except compressor.CompressorError as err:
                took_s = time.monotonic() - began
                print(f"| {budget_s:.0f} s | {took_s:.0f} s | refused: {err} |", flush=True)
                continue
            took_s = time.monotonic() - began
            n_steps = (
                result.training["steps"] if result.training and "steps" in result.training else 0
            )
            accuracy = f"{result.compressed.accuracy:.2%}" if result.compressed else "-"
            print(
                f"| {budget_s:.0f} s | {took_s:.0f} s | {took_s - budget_s:+.0f} s | "
                f"{result.search['n_trials']} | {n_steps} | {result.verdict} | "
                f"{result.speedup.ratio:.2f} | {accuracy} | "
                f"{'; '.join(result.search.get('cut_short', []))} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
