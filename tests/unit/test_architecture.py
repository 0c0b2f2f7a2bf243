"""Which file may import which: cli -> compressor -> steps -> values -> errors."""

import ast
from pathlib import Path

import pytest

import compressor

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "compressor"

BASE = {
    "containers", "errors", "goals", "values", "files", "inputs", "user_code", "tasks", "hints",
    "augmentation", "watching", "running", "rows", "learner", "environment",
    "threads", "printable", "ranges", "sqlite", "scratch", "plugins",
}  # fmt: skip
STEPS = {
    "chance", "config", "model_io", "datasets", "graph", "program", "importance", "features",
    "surgery", "recovery", "least_squares", "training", "export", "exporter", "evaluate",
    "latency", "search", "run_folder", "report", "symbolics", "template", "computed",
    "second_exporter",
}  # fmt: skip
MAY_IMPORT = {
    "errors": set(),
    "goals": {"values"},  # for the type checker only
    "containers": {"errors"},
    "values": {"containers", "errors", "goals"},
    "files": set(),
    "printable": set(),
    "plugins": {"errors", "user_code"},
    "ranges": {"plugins"},
    "watching": set(),
    "threads": {"running", "values"},
    "environment": {"values"},
    "running": {"containers", "values"},
    "learner": {
        "containers",
        "errors",
        "hints",
        "rows",
        "running",
        "tasks",
        "user_code",
        "values",
        "watching",
    },
    "hints": {"containers", "errors", "running", "values", "watching"},
    "rows": {"containers", "values"},
    "augmentation": {"errors", "rows", "values"},
    "user_code": {"errors"},
    "sqlite": {"errors", "files", "scratch"},
    "scratch": set(),
    "inputs": {"errors", "sqlite", "user_code"},
    "tasks": {"containers", "errors", "inputs", "rows", "values", "user_code"},
    **{step: BASE for step in STEPS},
    "search": BASE | {"config"},
    "export": BASE | {"exporter", "latency", "template"},  # what was written is run
    "exporter": BASE | {"symbolics", "second_exporter"},
    "program": BASE | {"computed"},
    "template": BASE | {"exporter"},
    "border": BASE | STEPS,
    "matching": BASE | STEPS,
    "prunable": BASE | STEPS,
    "budget": BASE | STEPS,
    "bench": BASE | STEPS | {"prunable"},
    "run": BASE | STEPS | {"bench", "budget", "job"},
    "job": BASE | STEPS | {"border", "prunable", "bench", "matching"},
    "trials": BASE | STEPS | {"budget", "prunable", "bench", "job"},
    "finalists": BASE | STEPS | {"budget", "prunable", "bench", "job", "run", "trials"},
    "summary": BASE | STEPS | {"prunable", "job", "run", "trials", "finalists"},
    "shipping": BASE
    | STEPS
    | {"prunable", "bench", "job", "run", "trials", "finalists", "summary"},
    "corrections": BASE | STEPS | {"finalists", "trials"},
    "forecast": BASE | STEPS | {"bench", "job", "trials", "finalists"},
    "pipeline": BASE
    | STEPS
    | {
        "budget",
        "corrections",
        "prunable",
        "bench",
        "job",
        "run",
        "trials",
        "finalists",
        "shipping",
        "summary",
        "forecast",
        "border",
    },
    "api": BASE | STEPS | {"prunable", "job"},
    "__init__": BASE | STEPS | {"prunable", "pipeline", "api"},
}
ONLY_IN = {
    "botorch": {"search"},
    "gpytorch": {"search"},
    "optuna": {"search"},
    "cmaes": {"search"},
    "onnxruntime": {"latency", "export", "evaluate"},
    "tensorrt": {"latency", "export", "evaluate"},
    "nni": {"surgery"},
    "typer": set(),
    "rich": set(),
}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "compressor":
                rooms = (alias.name for alias in node.names if alias.name != "__version__")
                found |= {f"compressor.{name}" for name in rooms}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is a new room: say here what it may import"
    rooms = {
        name.split(".")[1]
        for name in imported_modules(path)
        if name.startswith("compressor.") and len(name.split(".")) > 1
    }
    assert rooms - {room} <= MAY_IMPORT[room]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_stay_in_their_rooms(path: Path) -> None:
    for library in {name.split(".")[0] for name in imported_modules(path)} & ONLY_IN.keys():
        assert room_of(path) in ONLY_IN[library], f"{library} in {path.name}"


@pytest.mark.parametrize("path", sorted((ROOT / "cli").glob("*.py")), ids=lambda p: p.name)
def test_the_command_line_uses_the_public_interface_only(path: Path) -> None:
    """`compressor` itself, its errors and its border; `values` only for the type checker."""
    allowed = {
        "compressor", "compressor.border", "compressor.errors", "compressor.plugins",
        "compressor.printable", "compressor.values",
    }  # fmt: skip
    used = {n for n in imported_modules(path) if n.startswith("compressor")}
    assert {n for n in used if not n.startswith("compressor.cli")} <= allowed


def test_every_public_name_is_there() -> None:
    assert sorted(compressor.__all__) == list(compressor.__all__)
    for name in compressor.__all__:
        assert getattr(compressor, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = compressor.compres


def test_lazy_names_and_typed_names_are_the_same() -> None:
    source = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    (block,) = [n for n in ast.parse(source).body if isinstance(n, ast.If)]
    typed = {
        (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = {(module, name) for module, names in compressor._HOMES.items() for name in names}
    assert typed == lazy
    assert {name for _, name in lazy} == set(compressor.__all__)


def test_files_and_functions_stay_readable() -> None:
    """At most 400 lines a file and 60 a function; a longer one needs a reason, here."""
    reasons = {
        "values.py": "every value that travels, in one place",
        "runner.py": "one file, because it is sent to devices as it is",
        "cli/runs.py: run": "one parameter a flag",
    }
    for path in [*FILES, *sorted((ROOT / "cli").glob("*.py"))]:
        text = path.read_text(encoding="utf-8")
        if path.name not in reasons:
            assert len(text.splitlines()) <= 400, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                n_lines = (node.end_lineno or 0) - node.lineno
                name = f"{path.parent.name}/{path.name}: {node.name}"
                assert n_lines <= 60 or name in reasons, f"{name} has {n_lines} lines"
