"""Any config and any command line gives settings or one readable line; what gives settings reads back."""

import json
import tempfile
from pathlib import Path

import pytest
from helpers.any_config import CONFIGS, LEAVES, NAMES, NUMBERS, SETTINGS, VALUES, WORDS
from hypothesis import given, settings
from hypothesis import strategies as st

from twinflow.cli.parser import Parser
from twinflow.cli.train import add_options, settings_from
from twinflow.train import TrainSettings, read_config
from twinflow.train.config import simpletuner
from twinflow.train.config.describe import describe
from twinflow.train.config.resolve import option_name
from twinflow.train.config.settings import OPTIONS

PARSER = Parser()
add_options(PARSER)
EXACT = (
    "TwinFlow requires flow-matching prediction_type.",
    "TwinFlow requires an EMA teacher;",
    "unknown option",
)  # name no option first
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
    PARSER.settle(arguments, spelled)
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
        assert option_name(name) in {*OPTIONS, *simpletuner.OPTIONS}
