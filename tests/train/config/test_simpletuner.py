"""Config files of SimpleTuner: one folder of images, its prompts, and all that cannot be taken at once."""

import json

import pytest

from twinflow.train import read_config
from twinflow.train.model.parallel import check_launcher

ON = {"--pretrained_model_name_or_path": "some/model", "--use_ema": True, "--twinflow_enabled": True}
IMAGES = {
    "id": "mine", "type": "local", "instance_data_dir": "photos", "caption_strategy": "textfile", "resolution": 512,
    "resolution_type": "pixel_area", "crop": True, "crop_aspect": "square", "repeats": 5, "minimum_image_size": 0,
}  # fmt: skip
TEXTS = {"id": "embeds", "dataset_type": "text_embeds", "default": True, "type": "local", "cache_dir": "cache/text"}


@pytest.fixture
def backend(tmp_path):
    def write(*entries):
        path = tmp_path / "backend.json"
        path.write_text(json.dumps(entries))
        return {**ON, "--data_backend_config": str(path)}

    return write


def test_one_local_folder_of_images(backend):
    found = read_config(None, backend(IMAGES, TEXTS))
    assert (str(found.instance_data_dir), found.caption_strategy, found.resolution) == ("photos", "textfile", 512)
    assert not found.aspect_buckets and found.data_backend_config is None
    assert found.warnings[:1] == ("data_backend_config: embeds: text_embeds are kept in cache_dir",)
    assert read_config(None, backend(IMAGES) | {"resolution": 256}).resolution == 256, "options override it"
    area = read_config(None, backend(IMAGES | {"resolution": 0.25, "resolution_type": "area", "crop": False}))
    assert area.resolution == 512 and area.aspect_buckets
    uneven = read_config(None, backend(IMAGES | {"crop_style": "random"}, IMAGES | {"id": "other", "disabled": True}))
    assert uneven.warnings[:1] == ("data_backend_config: images are cropped to the middle, not random",)


@pytest.mark.parametrize("entries, message", [
    ([IMAGES, IMAGES | {"id": "two"}], r"must have one local folder of images, got 'mine \(local, image\), two"),
    ([IMAGES | {"type": "aws"}], r"must have one local folder of images, got 'mine \(aws, image\)'"),
    ([TEXTS], "must have one local folder of images"), (["a"], "must hold a list of data sets"),
    ([IMAGES | {"instance_prompt": "me", "maximum_image_size": 2}], "got instance_prompt 'me'; maximum_image_size 2"),
    ([IMAGES | {"caption_strategy": "filename"}], "caption_strategy must be one of .*, got 'filename'; put the"),
])  # fmt: skip
def test_other_data(backend, entries, message):
    with pytest.raises(ValueError, match=message):
        read_config(None, backend(*entries))


def test_a_file_of_data_that_is_not_there_is_missed_by_a_run_alone():
    found = read_config(None, {**ON, "data_backend_config": "nowhere.json"})
    with pytest.raises(ValueError, match=r"data_backend_config must be a JSON file that exists, got 'nowhere.json'"):
        found.require_data()


def test_all_obstacles_at_once():
    with pytest.raises(ValueError) as raised:
        read_config(None, {**ON, "num_train_epochs": 3, "push_to_hub": True, "lerning_rate": 1})
    said = str(raised.value)
    assert said.startswith("train: 3 options cannot be taken: num_train_epochs must be left out") and "\n" not in said
    assert "push_to_hub must be" in said and "unknown option 'lerning_rate'; did you mean 'learning_rate'" in said


def test_a_library_of_prompts_and_options_without_effect(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text('{"fox": "a red fox", "jay": "a blue jay"}')
    other = {"validation_adapter_strength": 1.0, "strict_epoch_limit": True, "sdnq_group_size": 32}
    found = read_config(None, {**ON, **other, "user_prompt_library": str(path)})
    assert found.validation_prompts == ("a red fox", "a blue jay")
    with pytest.raises(ValueError, match="user_prompt_library must be a JSON file, got nowhere"):
        read_config(None, {**ON, "user_prompt_library": "nowhere"})


@pytest.mark.parametrize("name, value, message, held", [
    ("MIXED_PRECISION", "fp16", "mixed_precision must be fp16, as `accelerate launch` asks, got bf16", {}),
    ("MIXED_PRECISION", "bf16", "mixed_precision must be bf16", {"mixed_precision": "bf16"}),
    ("GRADIENT_ACCUMULATION_STEPS", "4", "steps must be 4, as .* got 1", {"gradient_accumulation_steps": 4}),
    ("DYNAMO_BACKEND", "INDUCTOR", "compile_blocks must be true where", {"compile_blocks": True}),
])  # fmt: skip
def test_what_a_launcher_asks_for_is_done_or_refused(monkeypatch, name, value, message, held):
    for plain in ("MIXED_PRECISION", "DYNAMO_BACKEND"):
        monkeypatch.setenv(f"ACCELERATE_{plain}", "no")
    check_launcher(read_config(None, ON | {"mixed_precision": "no"}))
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    if held:
        check_launcher(read_config(None, ON | held))
    if value != "bf16":
        with pytest.raises(ValueError, match=message):
            check_launcher(read_config(None, ON))
    else:
        with pytest.raises(ValueError, match=message):
            check_launcher(read_config(None, ON | {"mixed_precision": "no"}))
