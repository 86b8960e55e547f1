"""`--preset`: the training configurations of the paper's Table 6, typed from the paper."""

import pytest

from twinflow import TwinFlowConfig
from twinflow.memory import PRESETS
from twinflow.train import read_config
from twinflow.train.config.presets import TRAIN_PRESETS

# Table 6 of arXiv 2512.05150, column by column; a clip of None is a dash there, a rank of None trains all weights.
NAMES = ("optimizer", "lr", "decay", "betas", "batch", "steps", "clip", "rank", "ema")
TABLE_6 = {
    name: dict(zip(NAMES, column, strict=True)) for name, *column in (
        ("sana-0.6b", "RAdam", 1e-4, 0, (0.9, 0.95), 128, 30_000, None, None, 0.99),
        ("sana-1.6b", "RAdam", 1e-4, 0, (0.9, 0.99), 128, 30_000, None, None, 0.99),
        ("qwen-image-lora", "AdamW", 1e-4, 0, (0.9, 0.99), 64, 7_000, 1.0, 64, 0),
        ("qwen-image-full", "AdamW", 1e-5, 0, (0.9, 0.99), 32, 3_000, 1.0, None, 0.99),
    )
}  # fmt: skip
HOUSE = ("sd3.5-medium-lora", "sd3.5-large-lora")


@pytest.mark.parametrize("name", TABLE_6)
def test_a_preset_is_its_column_of_table_6(name):
    column, found = TABLE_6[name], read_config(None, {"preset": name})
    assert found.optimizer == column["optimizer"].lower()
    assert (found.learning_rate, found.lr_scheduler) == (column["lr"], "constant")
    assert (found.adam_beta1, found.adam_beta2) == column["betas"]
    assert found.adam_weight_decay == column["decay"]
    assert found.step_rows == found.train_batch_size * found.gradient_accumulation_steps == column["batch"]
    assert found.max_train_steps == column["steps"]
    assert found.max_grad_norm == (column["clip"] or 0)
    assert found.model_type == ("full" if column["rank"] is None else "lora")
    if column["rank"] is not None:
        assert found.lora_rank == found.lora_alpha == column["rank"]
    # EMA 0 in the table: the student is its own teacher, and the options permit that; no average is kept.
    assert found.use_ema == (column["ema"] > 0)
    assert found.twinflow_options["twinflow_allow_no_ema_teacher"] == (column["ema"] == 0)
    assert column["ema"] == 0 or found.ema_decay == column["ema"]


def test_the_scale_of_a_lora_follows_its_rank():
    """A preset's alpha belongs to its rank: with a rank of 2 its 64 would be a scale of 32."""
    found = read_config(None, {"preset": "qwen-image-lora", "lora_rank": 2})
    assert (found.lora_rank, found.lora_alpha) == (2, 2)
    found = read_config(None, {"preset": "qwen-image-lora", "lora_rank": 2, "lora_alpha": 4})
    assert (found.lora_rank, found.lora_alpha) == (2, 4)
    assert read_config(None, {"preset": "qwen-image-lora", "lora_alpha": 32}).lora_alpha == 32


@pytest.mark.parametrize("name", [*TABLE_6, *HOUSE])
def test_a_preset_is_whole(name):
    """It names a model, trains it with its own objective, and says so without a warning."""
    found = read_config(None, {"preset": name})
    objective = "sd3.5-medium" if name in HOUSE else name
    assert found.twinflow == TwinFlowConfig.preset(objective) and found.warnings == ()
    assert found.model_family == name.partition(".")[0].partition("-")[0].replace("qwen", "qwen_image")
    part = {"sana-0.6b": "_600M", "sana-1.6b": "_1600M", "sd3.5-medium-lora": "-medium", "sd3.5-large-lora": "-large"}
    assert part.get(name, "Qwen/Qwen-Image") in found.pretrained_model_name_or_path
    assert set(TRAIN_PRESETS) == {*TABLE_6, *HOUSE}


def test_everything_overrides_a_preset():
    preset = read_config(None, {"preset": "qwen-image-lora"})
    changes = dict(
        optimizer="adamw8bit", learning_rate=3e-4, train_batch_size=2, max_train_steps=9, max_grad_norm=0,
        lora_rank=8, lora_alpha=4.0, use_ema=True, pretrained_model_name_or_path="here", memory_preset="24gb",
        twinflow_enhanced_ratio=0.0, twinflow_target_step_count=4, twinflow_adversarial_enabled=False,
    )  # fmt: skip
    found = read_config(None, {"preset": "qwen-image-lora", **changes})
    for name, value in changes.items():
        if not name.startswith("twinflow_"):
            assert getattr(found, name) == value
    assert (found.twinflow.enhanced_ratio, found.twinflow.target_step_count) == (0.0, 4)
    assert not found.twinflow.adversarial and found.twinflow.estimate_order == preset.twinflow.estimate_order
    assert found.adam_beta2 == preset.adam_beta2 == 0.99
    assert read_config(None, {"preset": "qwen-image-lora", "learning_rate": None}) == preset
    assert read_config(None, {"preset": "sana-0.6b", "twinflow_enabled": False}).twinflow is None


def test_another_recipe_brings_its_own_losses():
    found = read_config(None, {"preset": "sana-0.6b", "twinflow_recipe": "all_terms"}).twinflow
    assert (found.recipe, found.loss, found.rectify_loss, found.time_weight) == ("all_terms", "l2", "l2", False)
    kept = read_config(None, {"preset": "sana-0.6b", "twinflow_recipe": "partition"}).twinflow
    assert kept == TwinFlowConfig.preset("sana-0.6b")
    own = read_config(None, {"preset": "sana-0.6b", "twinflow": {"recipe": "all_terms", "loss": "barron"}}).twinflow
    assert (own.recipe, own.loss, own.enhanced_ratio) == ("all_terms", "barron", 0.5)


@pytest.mark.parametrize("name, reason", [
    ("qwen-image-edit", "edit models, which look at a second image"), ("openuni-512", "no diffusers pipeline"),
    ("qwen-image-lra", "preset must be qwen-image-lora or "), ("", None), (5, "preset must be a string, got 5"),
])  # fmt: skip
def test_a_preset_that_there_is_not(name, reason):
    message = reason or "pretrained_model_name_or_path must be given"
    with pytest.raises(ValueError, match=f"^train: .*{message}"):
        read_config(None, {"preset": name})


@pytest.mark.parametrize("memory", PRESETS)
def test_memory_presets_go_with_what_is_trained(memory):
    assert read_config(None, {"preset": "sd3.5-medium-lora", "memory": memory}).memory_preset == memory
    if PRESETS[memory].base or PRESETS[memory].defer:
        with pytest.raises(ValueError, match="memory_preset must be one that leaves the weights as they are"):
            read_config(None, {"preset": "sana-0.6b", "memory": memory})
    else:
        assert read_config(None, {"preset": "sana-0.6b", "memory": memory}).memory_preset == memory
