"""One line for every mistake in a config file or in an option."""

from pathlib import Path

import pytest

from twinflow.train import read_config
from twinflow.train.config.settings import OPTIONS
from twinflow.train.config.simpletuner import IGNORED, REFUSED

MODEL = {"pretrained_model_name_or_path": "some/model"}
ON = {**MODEL, "use_ema": True, "twinflow_enabled": True}
FILE = '{"pretrained_model_name_or_path": "some/model", "learning_rate": 2e-4}'


@pytest.mark.parametrize("given, message", [
    ({"distillation_method": "dmd"}, "distillation_method must be left out, .*, got 'dmd'; set twinflow_enabled"),
    ({"scheduled_sampling_max_step_offset": 2}, "scheduled_sampling_max_step_offset must be left out, .*, got 2; set"),
    ({"base_model_precision": "int8-quanto"}, "'int8-quanto'; memory_preset 32gb packs the frozen base as int8"),
    ({"num_train_epochs": 3}, "count in steps: max_train_steps"), ({"push_to_hub": True}, "push_to_hub must be left"),
    ({"flow_schedule_shift": 3.0}, "flow_schedule_shift must be left out, .*, got 3.0; the method draws"),
    ({"model_family": "pixart_sigma"}, "model_family must be one of .*, got 'pixart_sigma'; no bridge reads"),
    ({"model_family": "wan"}, "got 'wan'; video models are not trained here"),
    ({"model_family": "sd35"}, "model_family must be one of qwen_image, sd3, sana, flux, z_image, unet, got 'sd35'$"),
    ({"optimizer": "adamw_bf16"}, "optimizer must be one of .*, got 'adamw_bf16'; use adamw, whose states are float32"),
    ({"optimizer": "ao-adamw8bit"}, "got 'ao-adamw8bit'; use adamw8bit"),
    ({"mixed_precision": "fp16"}, "mixed_precision must be one of no, bf16, got 'fp16'; residuals are 1 / delta_t"),
    ({"lr_scheduler": "cosine"}, "got 'cosine'; the method trains at a constant rate"),
    ({"lr_scheduler": "constant", "lr_warmup_steps": 9}, "lr_warmup_steps must be 0 with lr_scheduler constant, got 9"),
    ({"report_to": "comet_ml"}, "got 'comet_ml'; use tensorboard or wandb"),
    ({"memory_preset": "48gb"}, "memory_preset must be auto or .*40gb.*, got '48gb'"),
    ({"prompts_file": "p", "instance_data_dir": "d"}, "prompts_file must be absent beside instance_data_dir, got both"),
    ({"prompts_file": "p", "twinflow_enabled": False}, "prompts_file must be given with TwinFlow only"),
    ({"twinflow": {"data_free": True}, "instance_data_dir": "d"}, "twinflow.data_free must be false with instance"),
    ({"twinflow": {}, "conditioning": "dual", "twinflow_enabled": 0}, "conditioning must be absent where"),
    ({"twinflow": {"loss": "l2"}, "twinflow_enabled": False}, "twinflow must be absent where twinflow_enabled"),
    ({"twinflow": {"los": "l2"}}, "twinflow must hold .*, got 'los'; did you mean 'loss'"),
    ({"twinflow": [1]}, "twinflow must be an obj"),
    ({"twinflow_target_step_count": 2**31}, "twinflow_target_step_count must be <= 1000, got 2147483648"),
    ({"twinflow": {"shares": {"any": 10**400}}}, "twinflow must hold numbers that fit"),
    ({"twinflow": {"loss": "mse"}}, "twinflow.loss must be one of barron, l2, got 'mse'"),
    ({"twinflow_delta_t": 0}, "twinflow_delta_t must be in"),
    ({"twinflow_delta_t": "x"}, "twinflow_delta_t must be a number"),
    ({"twinflow_estimate_order": 10**5000}, "twinflow_estimate_order must be a number that fits, got a int too long"),
    ({"model_type": "full", "base_lora": "mine"}, "base_lora must be absent where model_type is full, got 'mine'"),
    ({"model_family": "sd3", "prediction_type": "epsilon"}, "prediction_type must be flow_matching for a sd3 model"),
    ({"model_family": "sdxl", "prediction_type": "flow_matching"}, "prediction_type must be epsilon or v_prediction"),
    ({"pretrained_model_name_or_path": None}, "pretrained_model_name_or_path must be given"),
    ({"lerning_rate": 1}, "unknown option 'lerning_rate'; did you mean 'learning_rate'"),
    ({"estimate_order": 1}, "unknown option 'estimate_order'; did you mean 'twinflow_estimate_order'"),
    ({"--twinflow_clamp": 1}, "unknown option '--twinflow_clamp'; did you mean 'twinflow_target_clamp'"),
    ({"xyzzy": 1}, "unknown option 'xyzzy'; `twinflow train --help` lists them all"),
    ({"use_ema": True, "--use-ema": True}, "use_ema must be given once, got use_ema and --use-ema"),
    ({"lr": 1, "learning_rate": 1}, "learning_rate must be given once, got lr and learning_rate"),
])  # fmt: skip
def test_options_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=f"^(train: .*)?{message}") as raised:
        read_config(None, {**ON, **given})
    assert "\n" not in str(raised.value)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("name, values", [
    ("train_batch_size", [0, -1, 1.5, True, "two", [4], NAN, INF, 10**30, 10**5000, {}]),
    ("learning_rate", [0, -1e-4, NAN, INF, "fast", True, [1e-4], 10**400, "nan"]),
    ("seed", [-1, 2**32, True]), ("adam_beta2", [1, 1.0, -0.1]), ("ema_decay", [0, 1, 1.5]), ("eval_share", [1, -0.1]),
    ("use_ema", ["maybe", 2, 0.5, [True]]), ("output_dir", [5, ["a"], "a\0b", "\ud800", True]),
    ("lora_alpha", [0, -1]), ("resolution", ["1024x768", 8, 10**9]), ("validation_resolution", ["big", "1x2x3", 0, {}]),
    ("validation_prompts", [5, ["a", 5], {"a": 1}]), ("unconditional_prompt", [["a"], 0]),
    ("model_family", [["sd3"], 3, {}]), ("max_grad_norm", [-1, NAN]), ("twinflow_step_focus", [1.1, NAN, True]),
    ("conditioning", ["both", True]), ("preset", [True, "x" * 1000, "openuni-512"]),
])  # fmt: skip
def test_values_that_cannot_be(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^train: {name} must be .*, got ") as raised:
            read_config(None, {**ON, name: value})
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_option_that_asks_for_nothing(name):
    for nothing in (None, False, 0, "", "0", "false", "none", [], {}, *REFUSED[name][0]):
        assert read_config(None, {**ON, name: nothing}) == read_config(None, ON)
    for something in ("quite another", [1], 1e9, NAN):
        with pytest.raises(ValueError, match=f"^train: {name} must be left out, as it is not supported, got "):
            read_config(None, {**ON, name: something})
    assert name not in OPTIONS


def test_options_of_other_trainers_without_effect():
    assert read_config(None, {**ON, **dict.fromkeys(IGNORED, "anything")}) == read_config(None, ON)


@pytest.mark.parametrize("text, message", [
    ("", r"line 1 column 1: Expecting value \(the file is empty\)"),
    ('{"a": 1,\n // no\n "b": 2}', r"config\.json line 2 column 2: .*\(JSON has no comments\)"),
    ('{"a": 1,\n}', r"line \d column \d: .*\(JSON has no comma after the last entry\)"),
    ('{"a": [1, 2,]}', r"line 1 column \d+: .*\(JSON has no comma after the last entry\)"),
    ("{'a': 1}", r"line 1 column 2: .*\(JSON has double quotes only\)"),
    ('{"use_ema": true} x', "line 1 column 19: Extra data"), ('{"use_ema": ', "line 1 column 13"),
    ('{"use_ema": true, "use_ema": false}', "'use_ema' must be given once, got it twice in"),
    ('{"twinflow": {"loss": 1, "loss": 2}}', "'loss' must be given once"),
    ("[1]", "config must hold an object .* with a list"), ("5", "with a int"), ('"x"', "with a str"),
    ('{"seed": 1' + "0" * 5000 + "}", "with an integer too long to read"), ("[" * 100_000, "nested too deeply"),
    (b'\xff\xfe{\x00"\x00', "in UTF-8, got .* with byte 0 of another encoding"), (b'{"a": "\xe9"}', "in UTF-8"),
    (" " * 1_000_001, "of at most 1000000 bytes"),
    ('{"learning_rate": NaN}', "learning_rate must be a number .*, got nan"),
    ('{"learning_rate": 1e999}', "learning_rate must be a number .*, got inf"),
])  # fmt: skip
def test_files_that_cannot_be_read(text, message, written):
    with pytest.raises(ValueError, match=f"^train: .*{message}") as raised:
        read_config(written(text), MODEL)
    assert "\n" not in str(raised.value)


def test_files_that_are_none(tmp_path, written):
    for path, message in ((tmp_path, "got the folder"), (tmp_path / "none.json", "that exists, got '"),
                          (Path("a\0b"), "that exists"), (Path("/dev/null"), "that exists")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^train: config must be a JSON file.*{message}"):
            read_config(path, {})
    assert read_config(written(b"\xef\xbb\xbf" + FILE.encode()), {}) == read_config(written(FILE), {})
