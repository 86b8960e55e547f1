"""What a model's configuration says of what it cannot be trained on: said before anything is encoded."""

import json
import shutil

import pytest
from helpers.tiny_pipelines import saved_pipeline
from helpers.training_cases import quiet, settings
from rich.console import Console

from twinflow.train.data.encoders import Encoders
from twinflow.train.data.prepare import require_fitting
from twinflow.train.dry_run import dry_run
from twinflow.train.run import train
from twinflow.train.validation.prompts import require_resolution


def changed(family, folder, file="transformer/config.json", **changes):
    """The family's pipeline with other settings in one of its files."""
    shutil.copytree(saved_pipeline(family), folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


SECOND = "pretrained_model_name_or_path must be a text-to-image model, got "
REFUSED = {
    "fills": ("flux", dict(in_channels=384, out_channels=64), SECOND + "one whose transformer takes 96 .* makes 16"),
    "follows": ("sd3", dict(in_channels=32), SECOND + "one whose transformer takes 32 channels .* makes 16"),
    "edits": (
        "qwen_image",
        dict(file="model_index.json", _class_name="QwenImageEditPipeline"),
        SECOND + "a QwenImageE",
    ),
    "positions": (
        "sd3",
        dict(pos_embed_max_size=10),
        "resolution must be at most 32, .* 40 pixels .* edge of 64 pixels",
    ),
    "axes": (
        "z_image",
        dict(axes_lens=[1024, 10, 64]),
        "resolution must be at most 32, .* has positions for 40 pixels",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_encoders_are_loaded(tmp_path, name, monkeypatch):
    family, changes, message = REFUSED[name]
    run = settings(tmp_path, family, resolution=48, aspect_bucket_alignment=16,
                   pretrained_model_name_or_path=str(changed(family, tmp_path / "model", **changes)))  # fmt: skip
    monkeypatch.setattr(Encoders, "_loaded", lambda self: pytest.fail("encoders are loaded"))
    for work in (lambda: train(run, quiet()), lambda: dry_run(run, Console(quiet=True))):
        with pytest.raises(ValueError, match=f"train: {message}"):
            work()


def test_what_just_fits(tmp_path):
    """The advised resolution, and squares of a larger one."""
    model = str(changed("sd3", tmp_path / "model", pos_embed_max_size=10))
    encoders = Encoders(model)
    how = dict(pretrained_model_name_or_path=model, aspect_bucket_alignment=16)
    assert max(map(max, require_fitting(settings(tmp_path, resolution=32, **how), encoders))) <= 40
    assert require_fitting(settings(tmp_path, resolution=40, aspect_buckets=False, **how), encoders) == [(40, 40)]
    run = settings(tmp_path, resolution=32, validation_resolution="32x64", **how)
    with pytest.raises(
        ValueError, match=r"validation_resolution must be at most 40 pixels along an edge, .* got 32x64"
    ):
        require_resolution(run, encoders)


def test_prompts_of_another_width_are_refused_at_the_first(tmp_path):
    with pytest.raises(ValueError, match="prompt_embeds must be of width 40, which the transformer takes, got 24 from"):
        Encoders(changed("sana", tmp_path / "model", caption_channels=40)).prompts(["a cat"])
