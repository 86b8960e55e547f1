"""Latents and conditions: what the stock pipelines compute."""

import inspect

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.cache_cases import FAMILIES, PROMPTS
from helpers.tiny_pipelines import saved_pipeline
from sklearn.datasets import load_sample_images

from twinflow.train.data.encoders import Encoders, collate, encode_images, uncollate

IMG2IMG = {
    "sd3": "StableDiffusion3Img2ImgPipeline", "flux": "FluxImg2ImgPipeline", "z_image": "ZImageImg2ImgPipeline",
    "qwen_image": "QwenImageImg2ImgPipeline",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_latents_are_the_stock_pipelines(family):
    """Against `prepare_latents` of img2img with no noise, and for SANA, which has none, the inverse of its decoding."""
    pipe = DiffusionPipeline.from_pretrained(saved_pipeline(family))
    pixels = torch.from_numpy(load_sample_images().images[0][:32, :48].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    encoders = Encoders(saved_pipeline(family))
    found = encode_images(pipe, pixels, encoders.student.autoencoder)
    assert encoders.factor == pipe.vae_scale_factor and tuple(found.shape[1:]) == encoders.latent_shape((32, 48))
    if family == "sana":
        expected = pipe.vae.encode(pixels).latent * 0.41407
    else:
        stock = getattr(diffusers, IMG2IMG[family]).from_pipe(pipe)
        stock.vae.encode = _mode_only(stock.vae.encode)
        stock.scheduler.scale_noise = lambda latents, *_: latents
        where = dict(dtype=torch.float32, device="cpu", generator=torch.Generator())
        if family == "sd3":
            expected = stock.prepare_latents(pixels, torch.tensor([1.0]), 1, 1, **where)
        else:
            expected = stock.prepare_latents(pixels, torch.tensor([1.0]), 1, 16, 32, 48, **where)
        expected = expected[0] if isinstance(expected, tuple) else expected
        if family in ("flux", "qwen_image"):
            expected = stock._unpack_latents(expected, 32, 48, 2).reshape(found.shape)
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def _mode_only(encode):
    def encoded(pixels):
        out = encode(pixels)
        out.latent_dist.sample = lambda generator=None: out.latent_dist.mode()
        return out

    return encoded


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_conditions_put_together_are_the_batchs_own(family):
    encoders = Encoders(saved_pipeline(family))
    expected = encoders.student.encode_prompt(encoders._loaded(), list(PROMPTS))
    found = collate(uncollate(expected))
    assert found.keys() == expected.keys()
    longest = found["prompt_embeds"].shape[1]
    for name, leaf in expected.items():
        if name != "prompt_embeds" or "prompt_lengths" not in expected:
            assert torch.equal(found[name], leaf), name
            continue
        assert longest == max(expected["prompt_lengths"])
        for mine, theirs, length in zip(found[name], leaf, expected["prompt_lengths"].tolist(), strict=True):
            assert torch.equal(mine[:length], theirs[:length]) and not mine[length:].any()
    alone = collate([encoders.prompts([prompt])[0] for prompt in PROMPTS])
    for name, leaf in alone.items():
        torch.testing.assert_close(leaf, found[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_unconditional_condition_is_what_the_stock_pipeline_guides_away_from(family):
    """With the defaults of its own call: SANA has a long instruction before prompts, none before negative ones."""
    encoders = Encoders(saved_pipeline(family))
    mine, pipe, negative = encoders.negative_prompt(""), encoders._loaded(), None
    if family == "sana":
        default = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
        given = {"negative_prompt": "", "complex_human_instruction": default}
        _, _, negative, mask = pipe.encode_prompt("a cat", True, **given)
        negative = negative[0, : int(mask.sum())]
        blurry = encoders.negative_prompt("blurry")["prompt_embeds"]
        _, _, bad, mask = pipe.encode_prompt("a cat", True, **given | {"negative_prompt": "blurry"})
        assert torch.allclose(blurry, bad[0, : int(mask.sum())], atol=1e-5)
        assert len(encoders.prompts(["blurry"])[0]["prompt_embeds"]) > len(blurry)
    elif family == "sd3":
        _, negative, _, _ = pipe.encode_prompt("a cat", None, None, do_classifier_free_guidance=True)
    elif family == "z_image":
        _, (negative,) = pipe.encode_prompt("a cat", do_classifier_free_guidance=True)
    if negative is not None:
        assert torch.allclose(mine["prompt_embeds"], negative.reshape(mine["prompt_embeds"].shape), atol=1e-5)
    alone, _ = encoders.prompts(["", "a cat"])  # an image without words is unconditional
    assert torch.allclose(alone["prompt_embeds"], mine["prompt_embeds"], atol=1e-5)
