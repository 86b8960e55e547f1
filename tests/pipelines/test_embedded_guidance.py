"""FLUX.1-dev takes a guidance scale as an input: another one than it was trained at is said."""

import warnings

import pytest
import torch
from helpers.drawing import PROMPTS, arguments, draw, fresh, sampled, start
from helpers.export_cases import lora_student, stock_pipeline

from twinflow import attach
from twinflow.export import export
from twinflow.lora import load_lora


def call(pipe, **more):
    """The latents, and what twinflow warned of."""
    given = {name: value for name, value in arguments("flux_guidance").items() if name != "guidance_scale"} | more
    pipe.scheduler.set_generator(fresh())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        latents = pipe(
            list(PROMPTS), latents=start("flux_guidance"), output_type="latent", num_inference_steps=2, **given
        ).images
    return latents, [str(w.message) for w in said if "twinflow" in str(w.message)]


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.0])
def test_another_scale_than_the_trained_one_is_said_once(scale, tmp_path):
    student = lora_student("flux_guidance", "dual")
    pipe = attach(stock_pipeline("flux_guidance"), export(student, tmp_path))
    for more in ({}, {"guidance_scale": 3.5}):
        latents, said = call(pipe, **more)
        assert not said
        torch.testing.assert_close(latents, sampled(student, pipe, "flux_guidance"), atol=1e-4, rtol=1e-4)
    latents, said = call(pipe, guidance_scale=scale)
    assert len(said) == 1 and f"guidance_scale={scale} is an input" in said[0] and "Pass guidance_scale=3.5" in said[0]
    assert (latents - sampled(student, pipe, "flux_guidance")).abs().max() > 1e-2
    assert not call(pipe, guidance_scale=scale)[1]


def test_a_transformer_that_embeds_no_scale_warns_of_none(tmp_path):
    pipe = attach(stock_pipeline("flux"), export(lora_student("flux", None), tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipe, "flux", guidance_scale=0.0)


@pytest.mark.parametrize(
    "family, used", [("flux", [1.0, 0.5, 0.0]), ("qwen_image", [1.0, 0.5, 0.0]), ("sd3", [1.0, 0.5, 0.0])]
)
def test_sigmas_that_a_caller_lists_are_used_in_an_attached_pipeline(family, used, tmp_path):
    pipe = attach(stock_pipeline(family), export(lora_student(family, None), tmp_path))
    draw(pipe, family, sigmas=[1.0, 0.5])
    assert pipe.scheduler.sigmas.tolist() == used
    draw(pipe, family)
    assert pipe.scheduler.sigmas.tolist() == pytest.approx([0.999, 0.6, 0.0])


def test_an_attached_lora_is_on_where_others_are_switched_off(tmp_path):
    style = export(lora_student("sd3", None, targets=("attn.to_q",)), tmp_path / "style")
    few = export(lora_student("sd3", None), tmp_path / "few")
    pipe, alone = stock_pipeline("sd3"), attach(stock_pipeline("sd3"), few)
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.disable_lora()
    torch.testing.assert_close(draw(attach(pipe, few), "sd3"), draw(alone, "sd3"))


def test_folders_below_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    student = lora_student("sd3", None)
    export(student, "~/few")
    assert (tmp_path / "few").is_dir()
    draw(attach(stock_pipeline("sd3"), "~/few"), "sd3")
    load_lora(student, "~/few")
