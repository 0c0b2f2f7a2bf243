"""Flags, compress.toml and device profiles at the border."""

import re
from pathlib import Path

import pytest

from compressor.config import EXAMPLES, Config, commented_toml, load_config
from compressor.errors import ConfigError
from compressor.latency.profiles import target_names
from compressor.latency.runner import instruction_set
from compressor.latency.targets import load_target


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


def write(folder: Path, text: str) -> Path:
    (folder / "compress.toml").write_text(text)
    return folder / "model.pt"


def test_the_file_beside_the_model_then_flags(folder: Path) -> None:
    model = write(folder, 'target = "host-cpu"\nspeedup = 2\ntrials = 7\ndata = "d.npz"\n')
    config = load_config(model, {"trials": 9})
    assert (config.target, config.trials, config.speedup) == ("host-cpu", 9, 2.0)
    assert config.data == folder / "d.npz"
    write(Path(), 'target = "other"\n')
    assert load_config(model, {}).target == "host-cpu"
    (folder / "compress.toml").unlink()
    assert load_config(model, {}).target == "other"


def test_paths_in_the_file_are_relative_to_it(folder: Path) -> None:
    model = write(folder, 'target = "mine.toml"\ndata = "d.npz"\nout = "run"\n')
    config = load_config(model, {})
    assert config.target == str(folder / "mine.toml")
    assert (config.data, config.out) == (folder / "d.npz", folder / "run")
    assert load_config(model, {"out": Path("here")}).out == Path("here")


def test_a_constraint_flag_replaces_the_files(folder: Path) -> None:
    model = write(folder, 'target = "host-cpu"\nspeedup = 2\n')
    config = load_config(model, {"max_latency": "1500us"})
    (limit,) = config.constraints
    assert limit.kind == "max-latency"
    assert limit.value == pytest.approx(1.5)
    assert limit.min_speedup(original_ms=6.0) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("250ms", 0.25)]
)
def test_durations(text: str, seconds: float) -> None:
    config = load_config(Path("m.pt"), {"target": "host-cpu", "time_budget": text})
    assert config.time_budget == pytest.approx(seconds)


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    """config.toml of a run is a compress.toml that asks for the same."""
    flags = {"target": "host-cpu", "max_latency": "12ms", "mean": ["0.5"], "std": ["0.2"]}
    config = load_config(folder / "model.pt", flags)
    import tomli_w

    settings = config.as_toml()
    del settings["model"]
    model = write(folder, tomli_w.dumps(settings))
    assert load_config(model, {}) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "For which device.*--target"),
        ({"target": "host-cpu", "speedup": 0.5}, "--speedup:.*greater than 1"),
        ({"target": "host-cpu", "max_latency": "12"}, "--max-latency: expected a number with a"),
        ({"target": "host-cpu", "max_latency": "12parsec"}, "--max-latency"),
        ({"target": "host-cpu", "speedup": 2, "max_latency": "1ms"}, "not both"),
        ({"target": "host-cpu", "trials": 0}, "--trials"),
        (
            {"target": "host-cpu", "search": "bocrr"},
            "Unknown --search 'bocrr'. Did you mean 'bocr'",
        ),
        ({"target": "host-cpu", "mean": ["0.5"]}, "mean has 1 values and std 0"),
        ({"target": "host-cpu", "mean": ["1"], "std": ["0"]}, "--std: Input should be greater"),
        ({"target": "host-cpu", "mean": ["nan"], "std": ["1"]}, "--mean:.*finite"),
        ({"target": "host-cpu", "mean": ["0"], "std": ["inf"]}, "--std:.*finite"),
        ({"target": "host-cpu", "labels": "non"}, "Unknown --labels 'non'. Did you mean 'none'"),
        (
            {"target": "host-cpu", "labels": "none", "label_smoothing": 0.1, "classes": "c.txt"},
            "without labels, leave classes and label-smoothing away",
        ),
        ({"target": "host-cpu", "labels": "none", "task": "a:b"}, "leave labels away"),
        ({"target": "host-cpu", "trails": 3}, "Unknown setting 'trails'. Did you mean 'trials'"),
    ],
)
def test_impossible_settings_are_named(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Path("m.pt"), flags)


def test_bad_files_are_named(folder: Path) -> None:
    model = write(folder, "trials = \n")
    with pytest.raises(ConfigError, match=r"compress\.toml cannot be read"):
        load_config(model, {"target": "host-cpu"})
    write(folder, "spedup = 2\n")
    with pytest.raises(ConfigError, match=r"key in .*compress\.toml 'spedup'. Did you mean 'spee"):
        load_config(model, {"target": "host-cpu"})


def test_a_run_without_a_limit_says_how_to_give_one() -> None:
    with pytest.raises(ConfigError, match=r"--speedup 2 or --max-latency 12ms"):
        load_config(Path("m.pt"), {"target": "host-cpu"}).check_goal()


def test_host_cpu_knows_its_step() -> None:
    target = load_target("host-cpu")
    assert target.n_threads == 1
    assert target.step == {"AVX512": 16, "AVX2": 8, "NEON": 8, "OTHER": 4}[instruction_set()]
    assert instruction_set() in target.step_source


@pytest.mark.parametrize("name", target_names())
def test_every_profile_that_ships_is_valid_and_has_sources(name: str) -> None:
    assert load_target(name).sources


def test_unknown_target_is_guessed() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'host-cpu'"):
        load_target("hostcpu")


PROFILE = """
description = "mine"
[runtime]
kind = "onnxruntime"
n_threads = 4
[channels]
step = 8
[onnx]
opset = 17
"""


def test_own_profile_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(PROFILE)
    target = load_target(str(tmp_path / "mine.toml"))
    assert (target.name, target.step, target.n_threads, target.opset) == ("mine", 8, 4, 17)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_threads = 4", "n_threads = 0", "runtime.n_threads"),
        ('kind = "onnxruntime"', 'kind = "abacus"', "runtime.kind.*abacus"),
        ("step = 8", "stride = 8", "channels"),
        ("step = 8", 'step = "auto"', "no entry for this CPU"),
        ("step = 8", "step = 0", "channels.step"),
        ("opset = 17", "opset =", "Invalid value"),
    ],
)
def test_broken_profiles_name_the_key(old: str, new: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(PROFILE.replace(old, new))
    with pytest.raises(ConfigError, match=f"is broken: {message}|{message}"):
        load_target(str(tmp_path / "mine.toml"))


def test_a_profile_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"Profile .*mine\.toml cannot be read"):
        load_target(str(tmp_path / "mine.toml"))


def settings_of(text: str) -> dict[str, str]:
    """Name -> the setting, uncommented, of every one in a commented file."""
    found = {}
    for paragraph in text.split("\n\n")[1:]:
        lines = [line.removeprefix("# ").rstrip() for line in paragraph.splitlines()]
        first = next(i for i, x in enumerate(lines) if re.match(r"\[[\w-]+\]$|[\w-]+ = ", x))
        name = re.sub(r"[\[\]]| =.*", "", lines[first])
        found[name] = "\n".join(lines[first:])
    return found


def test_the_commented_file_has_every_setting(tmp_path: Path) -> None:
    """Each is valid by itself, and has its default where it has one."""
    settings = settings_of(commented_toml())
    fields = {name.replace("_", "-") for name in Config.model_fields}
    assert set(settings) == fields - {"model", "trust"}
    pairs = {"mean": settings["std"], "std": settings["mean"]}
    for name, setting in settings.items():
        target = "" if name == "target" else 'target = "host-cpu"\n'
        (tmp_path / "compress.toml").write_text(f"{target}{pairs.get(name, '')}\n{setting}\n")
        config = load_config(tmp_path / "model.pt", {})
        field = Config.model_fields[name.replace("-", "_")]
        if name.replace("-", "_") not in EXAMPLES:
            assert getattr(config, name.replace("-", "_")) == field.default
    assert "One of bocr, bo, random" in commented_toml()
