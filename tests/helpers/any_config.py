"""Hypothesis's strategies for configs of `twinflow train`, sensible or not."""

from hypothesis import strategies as st

from twinflow.train.config import simpletuner
from twinflow.train.config.presets import TRAIN_PRESETS
from twinflow.train.config.resolve import ALIASES
from twinflow.train.config.settings import OPTIONS

NAMES = st.sampled_from([*OPTIONS, *ALIASES, *simpletuner.OPTIONS])
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
