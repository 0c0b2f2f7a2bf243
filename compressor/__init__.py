"""Trained CNN in, measured-faster ONNX out.

    config = load_config(Path("model.pt"), {"target": "host-cpu", "speedup": 2.0})
    result = compress(config)

Names are imported when they are first used, so that `compress --help` does not wait for torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

# ONNX Runtime from 1.29 on tells its makers names and hashes of the models that it runs, unless
# this is set before it is imported. What is compressed here is nobody's business.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from compressor.api import (
        dashboard,
        explain,
        folder_report,
        inspect_model,
        load_compressed,
        probe_target,
        prune,
        who_answers,
    )
    from compressor.config import Config, commented_toml, load_config
    from compressor.errors import CompressorError
    from compressor.export import check_exportable, export_onnx
    from compressor.graph import channel_groups, cost
    from compressor.latency.device import compare_latency, open_device
    from compressor.latency.profiles import target_names
    from compressor.latency.targets import load_target
    from compressor.pipeline import compress, compress_front, replay, resume
    from compressor.prunable import load_model
    from compressor.report import (
        front_report,
        groups_json,
        groups_report,
        latency_json,
        latency_report,
        replay_report,
        staircase_json,
        staircase_report,
        target_report,
        targets_json,
        targets_report,
        text_report,
    )
    from compressor.report.explained import explain_json, explain_report
    from compressor.run_folder import read_result, to_json
    from compressor.values import Plan, Progress, Result, Trial, Verdict

__version__ = "0.1.0"

__all__ = [
    "CompressorError",
    "Config",
    "Plan",
    "Progress",
    "Result",
    "Trial",
    "Verdict",
    "channel_groups",
    "check_exportable",
    "commented_toml",
    "compare_latency",
    "compress",
    "compress_front",
    "cost",
    "dashboard",
    "explain",
    "explain_json",
    "explain_report",
    "export_onnx",
    "folder_report",
    "front_report",
    "groups_json",
    "groups_report",
    "inspect_model",
    "latency_json",
    "latency_report",
    "load_compressed",
    "load_config",
    "load_model",
    "load_target",
    "open_device",
    "probe_target",
    "prune",
    "read_result",
    "replay",
    "replay_report",
    "resume",
    "staircase_json",
    "staircase_report",
    "target_names",
    "target_report",
    "targets_json",
    "targets_report",
    "text_report",
    "to_json",
    "who_answers",
]

_HOMES = {
    "compressor.api": (
        "dashboard",
        "explain",
        "folder_report",
        "inspect_model",
        "load_compressed",
        "probe_target",
        "prune",
        "who_answers",
    ),
    "compressor.config": ("Config", "commented_toml", "load_config"),
    "compressor.errors": ("CompressorError",),
    "compressor.export": ("check_exportable", "export_onnx"),
    "compressor.graph": ("channel_groups", "cost"),
    "compressor.latency.device": ("compare_latency", "open_device"),
    "compressor.latency.profiles": ("target_names",),
    "compressor.latency.targets": ("load_target",),
    "compressor.pipeline": ("compress", "compress_front", "replay", "resume"),
    "compressor.prunable": ("load_model",),
    "compressor.report": (
        "front_report",
        "groups_json",
        "groups_report",
        "latency_json",
        "latency_report",
        "replay_report",
        "staircase_json",
        "staircase_report",
        "targets_json",
        "target_report",
        "targets_report",
        "text_report",
    ),
    "compressor.report.explained": ("explain_json", "explain_report"),
    "compressor.run_folder": ("read_result", "to_json"),
    "compressor.values": ("Plan", "Progress", "Result", "Trial", "Verdict"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
