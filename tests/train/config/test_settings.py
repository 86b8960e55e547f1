"""Settings of the trainer: a config file, flags that override it, and what they mean together."""

import dataclasses
import json
from pathlib import Path

import pytest

from twinflow import TwinFlowConfig, conditioning
from twinflow.teachers.teachers import teacher_from_options
from twinflow.train import TrainSettings, read_config
from twinflow.train.config.option_types import PATHS
from twinflow.train.config.settings import MODES, OPTIONS

FILE = """{"model_family": "sd3", "model_type": "lora",
"pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-large", "output_dir": "output/sd3-twinflow",
"distillation_method": null, "use_ema": true, "twinflow_enabled": true, "twinflow_target_step_count": 2,
"twinflow_estimate_order": 2, "twinflow_enhanced_ratio": 0.5, "twinflow_delta_t": 0.01, "twinflow_target_clamp": 1.0,
"learning_rate": 1e-4, "train_batch_size": 1, "gradient_accumulation_steps": 4, "mixed_precision": "bf16",
"validation_guidance": 0.0, "validation_num_inference_steps": 2}"""
MODEL = {"pretrained_model_name_or_path": "some/model"}
ON = {**MODEL, "use_ema": True, "twinflow_enabled": True}


def test_a_published_config_reads_unchanged(written):
    found = read_config(written(FILE), {})
    for name, value in json.loads(FILE).items():
        if name in ("output_dir", "distillation_method") or name.startswith("twinflow_"):
            continue
        assert getattr(found, name) == value, name
    assert found.output_dir == Path("output/sd3-twinflow") and found.step_rows == 4 and found.warnings == ()
    assert found.twinflow == TwinFlowConfig(recipe="all_terms", adversarial=False, target_step_count=2)
    assert (found.lora_rank, found.lora_alpha, found.conditioning, found.optimizer) == (64, 64, "dual", "adamw")


@pytest.mark.parametrize("form", ["--{}", "{}", "dashes"])
def test_keys_may_have_dashes(form, written):
    given = {n.replace("_", "-") if form == "dashes" else form.format(n): v for n, v in json.loads(FILE).items()}
    assert read_config(written(json.dumps(given)), {}) == read_config(written(FILE), {})


DEFAULTS = {
    "twinflow_enabled": False, "twinflow_target_step_count": 1, "twinflow_estimate_order": 2,
    "twinflow_enhanced_ratio": 0.5, "twinflow_delta_t": 0.01, "twinflow_target_clamp": 1.0,
    "twinflow_require_ema": True, "twinflow_allow_no_ema_teacher": False, "twinflow_allow_diff2flow": False,
    "twinflow_adversarial_enabled": False, "twinflow_adversarial_weight": 1.0, "twinflow_rectify_weight": 1.0,
    "diff2flow_enabled": False, "diff2flow_loss": False,
}  # fmt: skip


def test_the_documented_flags_have_the_documented_defaults():
    assert {name: OPTIONS[name].default for name in DEFAULTS} == DEFAULTS
    bare = read_config(None, ON)
    spelled = read_config(None, {**DEFAULTS, **ON})
    assert bare == spelled and bare.twinflow == TwinFlowConfig.from_flags({})[0]
    for flag, default in bare.twinflow_options.items():
        assert default == (True if flag == "twinflow_enabled" else DEFAULTS[flag])


@pytest.mark.parametrize("flag, setting, value", [
    ("estimate_order", "estimate_order", 3), ("enhanced_ratio", "enhanced_ratio", 0.0), ("delta_t", "delta_t", 0.02),
    ("target_clamp", "target_clamp", 2.0), ("adversarial_enabled", "adversarial", True),
    ("recipe", "recipe", "partition"),
    ("adversarial_weight", "adversarial_weight", 0.0), ("rectify_weight", "rectify_weight", 0.2),
    ("target_step_count", "target_step_count", 4), ("step_focus", "step_focus", 0.3),
])  # fmt: skip
def test_every_flag_arrives(flag, setting, value):
    for given in ({f"twinflow_{flag}": value}, {"preset": "sana-0.6b", f"twinflow_{flag}": str(value)}):
        assert getattr(read_config(None, {**ON, **given}).twinflow, setting) == value


def test_plain_flow_matching():
    for given in (MODEL, {**MODEL, "twinflow_enabled": "false", "twinflow_estimate_order": 4}):
        found = read_config(None, given)
        assert found.twinflow is None and found.conditioning is None and not found.use_ema
        assert (found.validation_guidance, found.validation_num_inference_steps) == (4.0, 30)
    assert read_config(None, {**MODEL, "validation_guidance": 7.5}).validation_guidance == 7.5


def test_what_validation_is_asked_for_and_does_not_do():
    found = read_config(None, {**ON, "validation_guidance": 4.5, "validation_num_inference_steps": 30,
                               "twinflow_target_step_count": 8})  # fmt: skip
    assert (found.validation_guidance, found.validation_num_inference_steps) == (0.0, 8)
    guidance, steps, many = found.warnings
    assert guidance.startswith("validation_guidance is 0.0") and "4.5" in guidance
    assert steps.startswith("validation_num_inference_steps is twinflow_target_step_count, 8, not 30")
    assert many.startswith("twinflow_target_step_count is 8") and "1 to 4" in many
    (flat,) = read_config(None, {**ON, "validation_guidance": 0}).warnings
    assert flat.startswith("one step without twinflow_adversarial_enabled tends to look flat")
    for sharp in ({"twinflow_adversarial_enabled": True}, {"twinflow_target_step_count": 2}):
        assert read_config(None, {**ON, **sharp}).warnings == ()


NO_FLOW = (
    "TwinFlow requires flow-matching prediction_type. Enable diff2flow_enabled and twinflow_allow_diff2flow to "
    "bridge epsilon/v_prediction models explicitly."
)
NO_EMA = (
    "TwinFlow requires an EMA teacher; enable use_ema or set twinflow_allow_no_ema_teacher to fall back to student "
    "weights explicitly."
)


@pytest.mark.parametrize("given", [{"model_family": "sdxl"}, {"model_family": "sd1x", "use_ema": False},
                                   {"model_family": "sd2x", "diff2flow_enabled": True}, {"prediction_type": "epsilon"},
                                   {"model_family": "unet", "twinflow_allow_diff2flow": True}])  # fmt: skip
def test_diffusion_models_need_both_switches(given):
    with pytest.raises(ValueError) as raised:
        read_config(None, {**ON, **given})
    assert str(raised.value) == NO_FLOW
    both = {"diff2flow_enabled": True, "twinflow_allow_diff2flow": True, "use_ema": True}
    assert read_config(None, {**ON, **given, **both}).model_family in ("unet", None)


def test_a_diffusion_model_without_twinflow():
    with pytest.raises(ValueError, match=r"^train: diff2flow_enabled must be true for a model that predicts no"):
        read_config(None, {**MODEL, "model_family": "sdxl"})
    assert read_config(None, {**MODEL, "model_family": "sdxl", "diff2flow_enabled": 1}).twinflow is None


def test_an_ema_is_required_unless_it_is_not():
    with pytest.raises(ValueError) as raised:
        read_config(None, {**ON, "use_ema": False})
    assert str(raised.value) == NO_EMA
    for allowed in ({"twinflow_allow_no_ema_teacher": True}, {"twinflow_require_ema": False}):
        found = read_config(None, {**ON, "use_ema": False, **allowed})
        teacher = teacher_from_options(lambda x, t, r, cond: x, found.twinflow_options, use_ema=found.use_ema)
        assert type(teacher).__name__ == "StudentTeacher"


def test_the_resolved_config_reads_back(written):
    shares = {"recipe": "partition", "shares": {"any": 1}, "target_clamp": float("inf"), "step_focus": 0.3}
    for given in (
        MODEL, ON, {"preset": "sana-0.6b"}, {"preset": "qwen-image-lora", "output_dir": "x"},
        {**ON, "twinflow": shares, "validation_prompts": ["a", "b"], "validation_resolution": "512x768"},
        {**ON, "prompts_file": "prompts.txt", "lr_warmup_steps": 5, "lora_layers": "to_q"},
        {"preset": "sana-1.6b", "twinflow_enabled": False, "max_grad_norm": 0, "twinflow_target_step_count": 3},
        {**ON, "model_family": "sdxl", "diff2flow_enabled": True, "twinflow_allow_diff2flow": True},
    ):  # fmt: skip
        found = read_config(None, given)
        text = found.to_json()
        assert read_config(written(text), {}) == found, given
        assert json.loads(text) and "Infinity" not in text and "NaN" not in text


def test_the_home_folder_in_every_path(written, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/mine")
    names = [name for name, option in OPTIONS.items() if option.kind in PATHS]
    assert len(names) > 6 and {"pretrained_model_name_or_path", "base_lora", "resume_from_checkpoint"} < {*names}
    for name in names:
        other = {option: value for option, value in ON.items() if option != name}
        for found in (
            read_config(None, {**other, name: "~/x"}), read_config(written(json.dumps({**other, name: "~/x"})), {}),
        ):  # fmt: skip
            assert str(getattr(found, name)) == "/home/of/mine/x", name


def test_defaults_are_values_of_their_kind():
    assert {field.name for field in dataclasses.fields(TrainSettings)} - OPTIONS.keys() == {
        "twinflow_options",
        "warnings",
    }
    for name, option in OPTIONS.items():
        assert option.default is None or option.kind.convert(name, option.default) == option.default
        assert option.help and (option.kind.wanted or option.group == "TwinFlow")


def test_names_that_are_written_twice_so_that_help_imports_no_torch():
    assert MODES == conditioning.MODES and MODES[0] == conditioning.LORA_MODE


def test_small_rules():
    assert read_config(None, {**ON, "lr_warmup_steps": 5}).lr_scheduler == "constant_with_warmup"
    assert read_config(None, {**ON, "gradient_checkpointing": True}).memory_preset == "checkpoint"
    both = read_config(None, {**ON, "gradient_checkpointing": True, "memory_preset": "80gb"})
    assert both.memory_preset == "80gb" and "gradient_checkpointing" in both.warnings[0]
    assert read_config(None, {**ON, "caption_strategy": "parquet"}).caption_strategy == "metadata"
    assert read_config(None, {**ON, "model_family": "z-image"}).model_family == "z_image"
    assert read_config(None, {**ON, "validation_resolution": "512x768"}).validation_resolution == (512, 768)
    free = read_config(None, {**ON, "prompts_file": "p.txt"})
    assert free.data_free and free.twinflow.data_free
    free.require_data()
    with pytest.raises(ValueError, match=r"^train: instance_data_dir must be given, a folder of images \(or prompts"):
        read_config(None, ON).require_data()
    with pytest.raises(ValueError, match=r"^train: prompts_file must be given where twinflow.data_free is true"):
        dataclasses.replace(free, prompts_file=None, instance_data_dir=Path("d")).require_data()
