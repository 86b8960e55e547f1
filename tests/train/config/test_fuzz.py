"""Any config and any command line gives settings or one readable line; what gives settings reads back."""

import argparse
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinflow.train import TrainSettings, add_options, read_config, settings_from
from twinflow.train.config.describe import describe
from twinflow.train.config.options import ALIASES, OPTIONS, option_name
from twinflow.train.config.presets import TRAIN_PRESETS
from twinflow.train.config.simpletuner import HARMLESS, UNSUPPORTED

PARSER = argparse.ArgumentParser()
add_options(PARSER)
EXACT = (
    "TwinFlow requires flow-matching prediction_type.",
    "TwinFlow requires an EMA teacher;",
)  # name no option first
NAMES = st.sampled_from([*OPTIONS, *ALIASES, *UNSUPPORTED, *HARMLESS])
WORDS = st.sampled_from([
    "", "0", "1", "2.5", "1e-4", "nan", "inf", "-1", "true", "false", "no", "auto", "full", "lora", "sd3", "sdxl", "a",
    "epsilon", "constant", "adamw", "bf16", "all", "dual", "512x768", "partition", "24gb", "checkpoint", "é",
    *TRAIN_PRESETS,
])  # fmt: skip
NUMBERS = st.one_of(st.integers(-2, 5), st.integers(), st.floats(0, 1), st.floats())
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text())
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
SETTINGS = st.dictionaries(
    st.sampled_from(["recipe", "shares", "loss", "step_focus", "target_clamp", "data_free", "time_dist", "delta_t"]),
    VALUES | st.sampled_from([{"any": 1}, [1, 1, 1], "all_terms", "partition", "l2"]),
)
CONFIGS = st.dictionaries(NAMES, LEAVES | VALUES, max_size=8)
WORKS = {"pretrained_model_name_or_path": "some/model", "use_ema": True, "twinflow_enabled": True}
SLOW = pytest.mark.slow
MANY, FEW = settings(max_examples=3000, deadline=None), settings(max_examples=150, deadline=None)


def read_or_line(read, names) -> TrainSettings | None:
    """The settings, or None where one line was said that names an option that was given, or a missing one."""
    try:
        return read()
    except ValueError as error:
        line = str(error)
        assert "\n" not in line and len(line) < 1000 and line.startswith(("train: ", *EXACT)), line
        known = {option_name(str(name)).removeprefix("twinflow_") for name in names}
        known |= {"pretrained_model_name_or_path", "EMA", "diff2flow_enabled", "adversarial", *map(str, names)}
        assert any(name in line or repr(name)[1:20] in line for name in known), line
        return None


def reads_back(found: TrainSettings | None) -> None:
    if found is None:
        return
    assert describe(found).count("\n") > 60
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "resolved.json")
        path.write_text(found.to_json(), encoding="utf-8")
        assert read_config(path, {}) == found
    json.loads(found.to_json(), parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def any_config(config: dict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(config), encoding="utf-8")
        reads_back(read_or_line(lambda: read_config(path, {}), config))
    both = {**WORKS, **config}
    reads_back(read_or_line(lambda: read_config(None, both), both))


def any_objective(own: dict) -> None:
    reads_back(read_or_line(lambda: read_config(None, {**WORKS, "twinflow": own}), {"twinflow": own}))


def any_flags(flags: list) -> None:
    spelled = [f"--{name.replace('_', '-') if dashes else name}={value}" for name, value, dashes in flags]
    arguments = PARSER.parse_args([*(f"--{name}={value}" for name, value in WORKS.items()), *spelled])
    reads_back(read_or_line(lambda: settings_from(arguments), [name for name, *_ in flags]))


def any_bytes(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_bytes(content)
        read_or_line(lambda: read_config(path, WORKS), [path, "config", "unknown option", "given once"])


FLAGS = st.lists(st.tuples(NAMES, WORDS | NUMBERS.map(str) | st.text(), st.booleans()), max_size=6)
BYTES = st.binary() | st.text().map(str.encode) | CONFIGS.map(lambda c: json.dumps(c)[:-1].encode())
ONE_VALUE = st.tuples(NAMES, LEAVES | VALUES).map(lambda pair: dict([pair]))
CASES = [
    (any_config, CONFIGS),
    (any_config, ONE_VALUE),
    (any_objective, SETTINGS),
    (any_flags, FLAGS),
    (any_bytes, BYTES),
]
IDS = ["config", "one-option", "objective", "flags", "bytes"]


@pytest.mark.parametrize("check, values", CASES, ids=IDS)
def test_settings_or_one_line(check, values):
    FEW(given(values)(check))()


@SLOW
@pytest.mark.parametrize("check, values", CASES, ids=IDS)
def test_settings_or_one_line_many_times(check, values):
    MANY(given(values)(check))()


@FEW
@given(st.text(), VALUES)
def test_an_unknown_option_is_named(name, value):
    try:
        read_config(None, {**WORKS, name: value})
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith(("train: ", *EXACT))
    else:
        assert option_name(name) in {*OPTIONS, *UNSUPPORTED, *HARMLESS}
