"""What a resolved config looks like, and what a resumed run may not change."""

from twinflow.train import changed, read_config
from twinflow.train.config.describe import describe

MODEL = {"pretrained_model_name_or_path": "some/model"}
ON = {**MODEL, "use_ema": True, "twinflow_enabled": True}


def test_a_readable_description():
    found = read_config(None, {**ON, "learning_rate": 2e-4, "validation_guidance": 3, "twinflow_step_focus": 0.3})
    text = describe(found)
    assert "* learning_rate = 0.0002" in text and "  lora_rank = 64" in text and "* twinflow_enabled = True" in text
    assert "* step_focus = 0.3" in text and "30% of all rows take their times from the sampling grid of 1 step" in text
    assert "  lora_alpha = 64" in text and "  validation_seed = 42" in text
    assert "\nwarnings\n! validation_guidance is 0.0" in text
    groups = [line for line in text.splitlines() if line and line[0] not in " *!"]
    assert groups == ["model", "data", "step", "optimizer", "run", "validation", "TwinFlow", "warnings"]
    assert "step_focus 0: the step count 1 rules validation only" in describe(read_config(None, ON))
    assert "plain flow matching" in describe(read_config(None, MODEL))


def test_what_a_resumed_run_may_not_change():
    old = read_config(None, {**ON, "instance_data_dir": "a"})
    for given, sentence in (
        ({"lora_rank": 8}, "lora_rank was 64 and is now 8"),
        ({"optimizer": "radam"}, "optimizer was adamw and is now radam"),
        ({"instance_data_dir": "b"}, "instance_data_dir was a and is now b"),
        ({"twinflow_recipe": "partition"}, "twinflow.recipe was all_terms and is now partition"),
        ({"twinflow_enabled": False}, "twinflow_enabled was True and is now False"),
        ({"model_type": "full"}, "model_type was lora and is now full"), ({"seed": 1}, "seed was 42 and is now 1"),
        ({"pretrained_model_name_or_path": "b"}, "pretrained_model_name_or_path was some/model and is now b"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps was 1 and is now 4"),
        ({"base_lora": "mine"}, "base_lora was absent and is now mine"),
    ):  # fmt: skip
        assert sentence in changed(old, read_config(None, {**ON, "instance_data_dir": "a", **given}))
    free = dict(learning_rate=1e-3, max_train_steps=9, output_dir="c", memory_preset="40gb", validation_steps=1,
                report_to="all", checkpointing_steps=1, debug=True, twinflow_target_step_count=4)  # fmt: skip
    assert changed(old, read_config(None, {**ON, "instance_data_dir": "a", **free})) == []
    full, focus = {**ON, "model_type": "full"}, {**ON, "twinflow_step_focus": 0.5}
    assert changed(read_config(None, full), read_config(None, {**full, "lora_rank": 8})) == []
    more = changed(read_config(None, focus), read_config(None, {**focus, "twinflow_target_step_count": 4}))
    assert more == ["twinflow.target_step_count was 1 and is now 4"]


def test_one_place_by_two_names_is_no_change(tmp_path, monkeypatch):
    (tmp_path / "models" / "sd3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    given = {**ON, "pretrained_model_name_or_path": "models/sd3", "instance_data_dir": "photos"}
    relative = read_config(None, given)
    kept = relative.with_absolute_paths()
    assert kept != relative and kept.pretrained_model_name_or_path == str(tmp_path / "models" / "sd3")
    assert changed(kept, relative) == changed(relative, kept) == []
    assert changed(relative.with_absolute_paths(), read_config(None, given | {"instance_data_dir": "../photos"})) != []
    (tmp_path / "photos").mkdir()
    (tmp_path / "moved" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "moved")
    assert any("instance_data_dir" in said for said in changed(kept, relative)), "other images of the same name"
    (tmp_path / "photos").rmdir()
    (tmp_path / "models").rename(tmp_path / "moved" / "models")
    assert changed(kept, relative) == [], "all of it was moved"
