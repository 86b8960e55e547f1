"""TwinFlowConfig: resolution by recipe, ranges, presets, and the flags of other trainers."""

import dataclasses
import json
import math

import pytest

from twinflow import TwinFlowConfig, TwinFlowLoss
from twinflow.objective.config import ROLES

FLAGS = {
    "twinflow_enabled": (False, True),
    "twinflow_target_step_count": (1, 4),
    "twinflow_estimate_order": (2, 3),
    "twinflow_enhanced_ratio": (0.5, 0.8),
    "twinflow_delta_t": (0.01, 0.02),
    "twinflow_target_clamp": (1.0, 2.0),
    "twinflow_require_ema": (True, False),
    "twinflow_allow_no_ema_teacher": (False, True),
    "twinflow_allow_diff2flow": (False, True),
    "twinflow_adversarial_enabled": (False, True),
    "twinflow_adversarial_weight": (1.0, 0.3),
    "twinflow_rectify_weight": (1.0, 0.2),
    "diff2flow_enabled": (False, True),
    "diff2flow_loss": (False, True),
}
OF_THE_CONFIG = {
    "twinflow_target_step_count": "target_step_count",
    "twinflow_estimate_order": "estimate_order",
    "twinflow_enhanced_ratio": "enhanced_ratio",
    "twinflow_delta_t": "delta_t",
    "twinflow_target_clamp": "target_clamp",
    "twinflow_adversarial_enabled": "adversarial",
    "twinflow_adversarial_weight": "adversarial_weight",
    "twinflow_rectify_weight": "rectify_weight",
}
OF_THE_TRAINER = set(FLAGS) - set(OF_THE_CONFIG) | {"twinflow_target_step_count"}


def read(name, config, rest):
    return getattr(config, OF_THE_CONFIG[name]) if name in OF_THE_CONFIG else rest[name]


@pytest.mark.parametrize(
    "nothing", [{}, dict.fromkeys(FLAGS), dict.fromkeys(FLAGS, "")], ids=["absent", "None", "empty"]
)
def test_flag_defaults(nothing):
    config, rest = TwinFlowConfig.from_flags(nothing)
    assert set(rest) == OF_THE_TRAINER
    for name, (default, _) in FLAGS.items():
        value = read(name, config, rest)
        assert value == default and type(value) is type(default), name


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_arrives(name, as_text):
    value = FLAGS[name][1]
    config, rest = TwinFlowConfig.from_flags({name: str(value) if as_text else value})
    assert read(name, config, rest) == value
    if name in OF_THE_CONFIG and name in rest:
        assert rest[name] == value
    for other, (default, _) in FLAGS.items():
        if other != name:
            assert read(other, config, rest) == default


def test_an_explicit_zero_is_kept():
    zeros = ["enhanced_ratio", "estimate_order", "adversarial_weight", "rectify_weight"]
    for zero in (0, 0.0, "0"):
        config, _ = TwinFlowConfig.from_flags({f"twinflow_{name}": zero for name in zeros})
        assert all(getattr(config, name) == 0 for name in zeros)
    with pytest.raises(ValueError, match="delta_t"):
        TwinFlowConfig.from_flags({"twinflow_delta_t": 0})


def test_flags_select_the_recipe():
    """all_terms, off: (a) and (b) only; on: all of them; `twinflow_recipe: partition` overrides."""
    off, _ = TwinFlowConfig.from_flags({})
    assert off.recipe == "all_terms" and not off.adversarial and off.real_velocity_weight == 1.0
    on, _ = TwinFlowConfig.from_flags({"twinflow_adversarial_enabled": True})
    assert on.recipe == "all_terms" and on.adversarial and on.consistency_weight == 1.0
    partition, rest = TwinFlowConfig.from_flags({"twinflow_recipe": "partition", "twinflow_adversarial_enabled": 1})
    assert partition.recipe == "partition" and partition.adversarial and "twinflow_recipe" not in rest
    fakeless, _ = TwinFlowConfig.from_flags({"twinflow_recipe": "partition"})
    assert fakeless.active_shares().keys() == {"e2e", "mul", "any"}


@pytest.mark.parametrize("name, nearest", [
    ("twinflow_estimat_order", "twinflow_estimate_order"), ("estimate_order", "twinflow_estimate_order"),
    ("twinflow_clamp", "twinflow_target_clamp"), ("diff2flow_enable", "diff2flow_enabled"),
    ("twinflow_adverserial_weight", "twinflow_adversarial_weight"),
])  # fmt: skip
def test_an_unknown_flag_suggests_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=rf"known options, got '{name}'; did you mean '{nearest}'"):
        TwinFlowConfig.from_flags({name: 1})
    with pytest.raises(TypeError, match="from_flags: mapping must be a mapping of option to value, got list"):
        TwinFlowConfig.from_flags([name])


@pytest.mark.parametrize("name, value", [
    ("twinflow_estimate_order", "two"), ("twinflow_estimate_order", 1.5), ("twinflow_enhanced_ratio", "high"),
    ("twinflow_enabled", "maybe"), ("twinflow_enabled", 2), ("twinflow_delta_t", True), ("twinflow_target_clamp", [1]),
    ("twinflow_target_step_count", float("nan")), ("twinflow_recipe", "other"),
])  # fmt: skip
def test_a_flag_of_the_wrong_kind(name, value):
    with pytest.raises(ValueError, match=f"{name.removeprefix('twinflow_')} must be .*, got"):
        TwinFlowConfig.from_flags({name: value})


def test_defaults_by_recipe():
    partition, all_terms = TwinFlowConfig(), TwinFlowConfig(recipe="all_terms")
    assert (partition.loss, partition.time_weight, partition.rectify_weight) == ("barron", True, 0.5)
    assert (all_terms.loss, all_terms.time_weight, all_terms.rectify_weight) == ("l2", False, 1.0)
    assert partition.rectify_loss == "barron" and all_terms.rectify_loss == "l2"
    assert TwinFlowConfig(loss="l2").rectify_loss == "l2" and TwinFlowConfig(rectify_loss="l2").loss == "barron"
    shared = dict(estimate_order=2, enhanced_ratio=0.5, enhanced_range=(0.0, 1.0), delta_t=0.01, target_clamp=1.0,
                  barron_alpha=1.0, barron_c=1e-3, time_dist=(1.0, 1.0, 1.0), adversarial_weight=1.0, step_focus=0.0,
                  adversarial=True, data_free=False, check_finite=False, target_step_count=1)  # fmt: skip
    for name, value in shared.items():
        assert getattr(partition, name) == getattr(all_terms, name) == value
    assert partition.active_shares() == {"e2e": 0.25, "mul": 0.25, "any": 0.25, "adv": 0.25}


def test_the_config_is_frozen_and_keyword_only():
    config = TwinFlowConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.delta_t = 0.5
    with pytest.raises(TypeError):
        TwinFlowConfig("partition")
    assert config == TwinFlowConfig() != TwinFlowConfig(delta_t=0.5)


def test_the_resolved_config_can_be_saved_and_printed():
    for config in (TwinFlowConfig(), TwinFlowConfig(recipe="all_terms", target_clamp=None)):
        saved = json.loads(json.dumps(config.to_dict()))
        assert TwinFlowConfig(**saved) == config
        assert all(f"{name} = " in str(config) for name in saved)


PRESETS = ["published", "paper", "sana-0.6b", "sana-1.6b", "openuni-512", "sd3.5-medium", "qwen-image-lora",
           "qwen-image-full", "qwen-image-edit", "lora-order1", "data-free"]  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = TwinFlowConfig.preset(name)
    TwinFlowLoss(config)
    assert (config.recipe == "all_terms") == (name == "paper")
    assert config.data_free == (name == "data-free")
    if name == "published":
        assert config == TwinFlowConfig()
    if name == "paper":
        assert config == TwinFlowConfig(recipe="all_terms")
    if name == "lora-order1":
        assert config.estimate_order == 1 and config.active_shares() == dict.fromkeys(ROLES, 0.2)


def test_an_unknown_preset_lists_the_names():
    with pytest.raises(ValueError, match=f"name must be one of {', '.join(PRESETS)}, got 'sdxl'"):
        TwinFlowConfig.preset("sdxl")


NAN = math.nan
WRONG = [
    ("recipe", "other"), ("recipe", ["partition"]), ("shares", {"e2e": -1}), ("shares", {"e2e": 0}), ("shares", {}),
    ("shares", {"all": 1}), ("shares", {"mul": NAN}), ("shares", {"mul": math.inf}), ("shares", {"mul": "1"}),
    ("shares", {"mul": True}), ("shares", [1, 1, 1]), ("adversarial", 1), ("estimate_order", -1),
    ("estimate_order", 1.0), ("estimate_order", True), ("enhanced_ratio", -0.1), ("enhanced_ratio", NAN),
    ("enhanced_ratio", None), ("enhanced_range", (0.5, 0.5)), ("enhanced_range", (-0.1, 1)),
    ("enhanced_range", (0, NAN)),
    ("enhanced_range", (0.1,)), ("enhanced_range", 0.5), ("enhanced_range", "ab"), ("delta_t", 0), ("delta_t", 0.0),
    ("delta_t", -0.01), ("delta_t", 1.5), ("delta_t", NAN), ("delta_t", "0.01"), ("target_clamp", 0),
    ("target_clamp", -1.0), ("target_clamp", NAN), ("loss", "mse"), ("rectify_loss", "mse"), ("barron_alpha", NAN),
    ("barron_alpha", math.inf), ("barron_c", 0.0), ("barron_c", NAN), ("time_weight", "yes"), ("time_dist", (0, 1, 1)),
    ("time_dist", (1, 1)), ("time_dist", (1, 1, 1.5)), ("time_dist", (1, NAN, 1)), ("time_dist", 1.0),
    ("time_dist", ("a", "b", "c")), ("real_velocity_weight", -1), ("adversarial_weight", math.inf),
    ("rectify_weight", NAN), ("consistency_weight", "1"), ("target_step_count", 0), ("target_step_count", 2.0),
    ("step_focus", 1.1), ("step_focus", NAN), ("data_free", None), ("rng_align", "row"), ("check_finite", 1),
]  # fmt: skip


@pytest.mark.parametrize("name, value", WRONG, ids=str)
def test_a_setting_out_of_range(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"^TwinFlowConfig: {name}.* must be .*, got "):
        TwinFlowConfig(**{name: value})


def test_shares_without_a_role_that_runs():
    with pytest.raises(ValueError, match="shares must be positive for at least one role that runs"):
        TwinFlowConfig(shares={"adv": 1}, adversarial=False)
