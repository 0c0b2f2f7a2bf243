"""The staircase: which step follows from which costs, and that a probe is used from then on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compressor
from compressor import api
from compressor.errors import ConfigError
from compressor.latency import probe as probe_module
from compressor.latency.device import Device, open_device
from compressor.latency.machine import Model, content_of
from compressor.latency.probe import (
    CONV_3X3,
    DECISIVE,
    LAYERS,
    STEPS,
    WIDTHS,
    layers,
    probe,
    step_of,
)
from compressor.latency.schema import probe_file
from compressor.latency.targets import load_target
from compressor.latency.timing import FINAL, Effort
from compressor.values import KernelTime, Latency, PairedLatency, Progress, Target


def blocked(step: int, width: int) -> float:
    """Time of two layers on a runtime that pads both sides to blocks."""
    return (-(-width // step) * step / 64) ** 2


@pytest.mark.parametrize("step", STEPS)
def test_a_runtime_that_pads_to_blocks_has_their_step(step: int) -> None:
    assert step_of({w: blocked(step, w) for w in WIDTHS}) == step


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(STEPS), st.lists(st.floats(-0.01, 0.01), min_size=20, max_size=20))
def test_noise_of_one_percent_changes_nothing(step: int, noise: list[float]) -> None:
    costs = {w: blocked(step, w) * (1 + e) for w, e in zip(WIDTHS, noise, strict=True)}
    assert step_of(costs) == step


def test_widths_that_leave_the_fast_path_are_not_worth_having() -> None:
    """ONNX Runtime on AVX-512, measured: 33 and 49 channels are slower than the line there."""
    costs = {16: 0.08, 20: 0.27, 28: 0.27, 32: 0.27, 33: 0.41, 40: 0.57, 47: 0.74, 48: 0.56,
             49: 0.85, 56: 1.0, 63: 1.26, 64: 1.0}  # fmt: skip
    assert step_of(costs) == 16


def test_a_runtime_where_every_width_pays_has_no_step() -> None:
    assert step_of({4: 0.2, 5: 0.1, 6: 0.3, 8: 0.4}) == 1


@pytest.mark.parametrize("kind", LAYERS)
def test_probed_layers_are_what_they_are_called(kind: str) -> None:
    target = load_target("jetson-nano", estimate=True)
    model = onnx.load_from_string(layers(kind, 20, target))
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version <= 13
    assert model.ir_version <= target.max_ir
    shapes = [tuple(t.dims) for t in model.graph.initializer]
    side, is_grouped = LAYERS[kind]
    assert shapes == [(20, 1 if is_grouped else 20, side, side)] * 2


class BlockedDevice:
    """A fake device: times follow from the width in the ONNX file, in blocks of 8."""

    def describe(self) -> Mapping[str, Any]:
        return {"runtime": "fake", "version": "1", "model": "a board"}

    def compare(
        self, original: Model, candidate: Model, *, effort: Effort = FINAL, seed: int = 0
    ) -> PairedLatency:
        graphs = [onnx.load_from_string(content_of(m)).graph for m in (original, candidate)]
        widths = [graph.initializer[0].dims[0] for graph in graphs]
        times = [blocked(8, width) for width in widths]
        sides = [Latency(ms, ms, 9) for ms in times]
        return PairedLatency(times[0] / times[1], (1, 1), sides[0], sides[1], ())

    def profile(self, model: Model) -> tuple[KernelTime, ...]:
        return ()

    def reconnect(self) -> None: ...

    def close(self) -> None: ...


def test_every_kind_and_width_is_measured() -> None:
    seen: list[Progress] = []
    device: Device = BlockedDevice()
    staircase = probe(device, load_target("host-cpu"), seen.append)
    assert staircase.step == 8
    assert set(staircase.kinds) == set(LAYERS) >= set(DECISIVE)
    assert all(tuple(costs) == WIDTHS for costs in staircase.costs.values())
    assert seen[-1].n_done == seen[-1].n_total == len(LAYERS) * len(WIDTHS)


def test_this_machine_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "WIDTHS", (8, 12, 16, 64))
    target = load_target("host-cpu")
    hasty = replace(probe_module.EFFORT, min_pairs=2, max_pairs=2, budget_s=0.1)
    with open_device(target) as device:
        staircase = probe(device, target, effort=hasty)
    assert all(tuple(costs) == (8, 12, 16, 64) for costs in staircase.costs.values())
    wide = staircase.costs[CONV_3X3]
    assert wide[64] == pytest.approx(1, rel=0.5)
    assert wide[8] < 0.4  # a sixty-fourth of the MACs


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_probed_step_is_used_for_that_device_and_no_other(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Opened:
        def __init__(self, _target: object) -> None: ...

        def __enter__(self) -> BlockedDevice:
            return BlockedDevice()

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(api, "open_device", Opened)
    pi = load_target("raspberry-pi-5", device="ssh://pi@one")
    assert pi.step == 16
    staircase, kept_in = compressor.probe_target(pi)
    assert kept_in.is_relative_to(cache)
    assert staircase.step == 8
    again = load_target("raspberry-pi-5", device="ssh://pi@one")
    assert (again.step, again.step_source[:7]) == (8, "probed ")
    assert load_target("raspberry-pi-5", device="ssh://pi@two").step == 16
    content = json.loads(kept_in.read_text())
    assert content["costs"]["conv 3x3"]["12"] == pytest.approx(blocked(8, 12))
    assert content["model"] == "a board"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema": 1, "step": 0, "date": "d"}',
             '{"schema": 2, "step": 8, "date": "d"}', '{"schema": 1, "step": "8", "date": "d"}']
)  # fmt: skip
def test_a_broken_probe_is_named(cache: Path, text: str) -> None:
    path = probe_file("host-cpu", None, "fp32")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"is no probe .*delete it, or probe again"):
        load_target("host-cpu")


def test_an_estimate_cannot_be_probed() -> None:
    with pytest.raises(ConfigError, match="leave --estimate away"):
        compressor.probe_target(load_target("jetson-nano", estimate=True))


def test_targets_are_listed_with_who_answers() -> None:
    here = replace(load_target("host-cpu"), name="here")
    there: Sequence[Target] = [here, load_target("jetson-nano")]
    answers = compressor.who_answers(there)
    assert answers["here"].startswith("yes: onnxruntime ")
    assert answers["jetson-nano"].startswith("no: ")
    assert "--device" in answers["jetson-nano"]
    table = compressor.targets_report(there, answers)
    assert [line.split()[1] for line in table.splitlines()[2:4]] == ["yes", "no"]
    rows = json.loads(compressor.targets_json(there, answers))
    assert rows[1]["roofline"]["ops_per_s"]["basis"] == "datasheet"
    whole = compressor.target_report(there[1], answers["jetson-nano"])
    assert "sudo nvpmodel -m 0" in whole
    assert "datasheet" in whole
