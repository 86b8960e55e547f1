"""Weights that are there in one variant only, as `variant="fp16"` saves and downloads them."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.tiny_pipelines import saved_pipeline

from twinflow.formats.variants import variant_among, variant_of_pipeline, variant_on_the_hub
from twinflow.models import load
from twinflow.train.data.decoder import Decoder
from twinflow.train.data.encoders import Encoders
from twinflow.train.model.pipeline_source import pipeline_folder

MODEL = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    "files, variant",
    [
        ([f"{MODEL}.fp16.safetensors", "config.json"], "fp16"),
        (["model.bf16-00001-of-00002.safetensors", "model.safetensors.index.bf16.json"], "bf16"),
        (["pytorch_model-00001-of-00002.fp16.bin"], "fp16"),
        ([f"{MODEL}.safetensors", f"{MODEL}.fp16.safetensors"], None),
        (["model-00001-of-00002.safetensors", "model.fp16.safetensors"], None),
        (["config.json", "model.safetensors.index.json"], None),
    ],
)
def test_names_of_files(files, variant):
    assert variant_among(files, "here") == variant


def test_several_variants_are_named():
    with pytest.raises(ValueError, match=r"weights must be there in one variant, got bf16, fp16 in here; remove all"):
        variant_among(["model.fp16.safetensors", "model.bf16.safetensors"], "here")


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("half") / "sd3"
    DiffusionPipeline.from_pretrained(saved_pipeline("sd3")).save_pretrained(folder, variant="fp16")
    assert variant_of_pipeline(folder) == "fp16" and variant_of_pipeline(saved_pipeline("sd3")) is None
    return folder


def test_a_pipeline_in_one_variant_is_read_whole(half):
    whole = saved_pipeline("sd3")
    weights = [dict(load(folder).named_parameters()) for folder in (half, whole)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    for mine, theirs in zip(*(Encoders(folder).prompts(["a cat"]) for folder in (half, whole)), strict=True):
        assert torch.equal(mine["prompt_embeds"], theirs["prompt_embeds"])
    latents, kind = torch.randn(1, 16, 4, 4), load(whole).autoencoder
    first, second = (Decoder(folder, kind).decode(latents) for folder in (half, whole))
    assert (first == second).all()


def test_a_hub_pipeline_that_has_one_variant_is_downloaded_in_it(half, tmp_path, monkeypatch):
    """diffusers downloads configurations without weights where the repository has only `*.fp16.*`."""
    bare = tmp_path / "bare"
    shutil.copytree(half, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    asked = []

    def download(name, variant=None):
        asked.append(variant)
        return bare if variant is None else half

    files = [str(path.relative_to(half)) for path in half.rglob("*") if path.is_file()]
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: files)
    assert pipeline_folder("owner/model") == half and asked == [None, "fp16"]
    assert variant_on_the_hub("owner/model", "transformer") == "fp16"
    assert variant_on_the_hub("owner/model", "elsewhere") is None
