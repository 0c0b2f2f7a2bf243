"""The probe on ONNX Runtime limited to AVX2: does it find the step that the source says?

ONNX Runtime has no switch for its instruction set, so its process runs under QEMU's user-mode
emulation of a Haswell (AVX2, no AVX-512). Emulated times say how many vector instructions a width
takes, and nothing about milliseconds; the step is a matter of the former.

    apt-get install qemu-user-static
    python benchmarks/staircase_avx2.py
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace

import compressor
from compressor.latency.by_runner import RunnerDevice
from compressor.latency.host import LocalHost
from compressor.latency.probe import probe
from compressor.latency.timing import Effort
from compressor.report import staircase_report

EMULATOR = "qemu-x86_64-static"
FEW = Effort(
    min_pairs=3, max_pairs=3, budget_s=600, pair_s=0.0, min_rounds=5, max_rounds=6, n_warmup=1
)


class EmulatedHost(LocalHost):
    """This machine, with a Haswell's instructions."""

    def python(self) -> Sequence[str]:
        """Python under the emulator."""
        return (EMULATOR, "-cpu", "Haswell", sys.executable)


def main() -> None:
    """Prints the staircase and its step."""
    if shutil.which(EMULATOR) is None:
        raise SystemExit(f"No {EMULATOR}: apt-get install qemu-user-static")
    target = replace(compressor.load_target("host-cpu"), name="AVX2, emulated", run_limit_s=600)
    host = EmulatedHost()
    device = RunnerDevice(host, target)
    try:
        staircase = probe(
            device,
            target,
            lambda p: print(f"{p.n_done}/{p.n_total} {p.note}", file=sys.stderr),
            effort=FEW,
        )
    finally:
        device.close()
    print(staircase_report(staircase, target))


if __name__ == "__main__":
    main()
