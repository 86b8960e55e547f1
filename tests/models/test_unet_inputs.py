"""What UNet students take: conditions of Stable Diffusion 1.5 and XL, stock encoders, opt-ins; and what they refuse."""

import re

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusionXLPipeline
from helpers.batches import move
from helpers.tiny_pipelines import latent_shape, saved_pipeline
from helpers.tiny_text import clip_text_encoder, clip_tokenizer
from helpers.tiny_unet import OPT_IN, SHAPE, prompts, sd15_scheduler, tiny_model, tiny_unet

from twinflow.export import export
from twinflow.formats.manifest import LORA, read_names
from twinflow.lora import add_lora
from twinflow.models import load
from twinflow.models.unet import UNetModel

SDXL = dict(
    addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 16
)


def test_sdxl_is_told_pooled_prompt_and_sizes():
    unet = tiny_unet(**SDXL)
    model, x, t = tiny_model(unet=unet), torch.randn(2, *SHAPE), torch.tensor([0.5, 0.7])
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64], [64.0, 64, 8, 8, 64, 64]])
    cond = prompts(2, pooled_prompt_embeds=torch.randn(2, 16), time_ids=ids)
    velocity = model(x, t, t, cond)
    for name in ("pooled_prompt_embeds", "time_ids"):
        assert not torch.equal(model(x, t, t, cond | {name: cond[name] + 1}), velocity)
        with pytest.raises(ValueError, match=f"UNetModel: cond must have '{name}', got"):
            model(x, t, t, {key: value for key, value in cond.items() if key != name})
    with pytest.raises(ValueError, match=r"cond\['time_ids'\] must be \(B, 6\), got \(2, 5\)"):
        model(x, t, t, cond | {"time_ids": ids[:, :5]})


def test_prompts_are_encoded_by_the_stock_pipelines():
    pipe = DiffusionPipeline.from_pretrained(saved_pipeline("sd15"))
    model = UNetModel(pipe.unet, scheduler=pipe.scheduler, **OPT_IN)
    cond = model.encode_prompt(pipe, ["a cat", "a dog"])
    expected = pipe.encode_prompt(["a cat", "a dog"], "cpu", 1, False)[0]
    assert set(cond) == {"prompt_embeds"} and torch.equal(cond["prompt_embeds"], expected)

    tokenizer = clip_tokenizer()
    encoders = clip_text_encoder(tokenizer, 8), clip_text_encoder(tokenizer, 16, projected=True)
    unet = tiny_unet(cross_attention_dim=24, **SDXL)
    pipe = StableDiffusionXLPipeline(
        None, encoders[0], encoders[1], tokenizer, tokenizer, unet, sd15_scheduler(), add_watermarker=False
    )
    model = UNetModel(unet, scheduler=pipe.scheduler, **OPT_IN)
    cond = model.encode_prompt(pipe, ["a cat", "a dog"], size=(64, 32))
    assert cond["time_ids"].tolist() == [[64, 32, 0, 0, 64, 32]] * 2
    t = torch.tensor([0.5, 0.7])
    assert model(torch.randn(2, *SHAPE), t, t, cond).shape == (2, *SHAPE)
    default = model.encode_prompt(pipe, ["a cat"])["time_ids"]
    assert default.unique().tolist() == [0, 8 * pipe.vae_scale_factor]


def test_a_lora_goes_out_as_a_file_that_the_stock_pipeline_takes(tmp_path):
    pipe = DiffusionPipeline.from_pretrained(saved_pipeline("sd15"))
    student = move(add_lora(load(pipe.unet, scheduler=pipe.scheduler, **OPT_IN), 4, conditioning="midpoint"), 0.05)
    folder = export(student, tmp_path / "lora")
    names = read_names(folder / LORA)
    assert names and all(name.startswith("unet.") for name in names)
    stock = DiffusionPipeline.from_pretrained(saved_pipeline("sd15"))
    x, prompt = torch.randn(latent_shape("sd15", 2)), student.encode_prompt(pipe, ["a cat", "a dog"])["prompt_embeds"]
    with torch.no_grad():
        plain = stock.unet(x, 500, prompt).sample
        stock.load_lora_weights(folder)
        found, expected = stock.unet(x, 500, prompt).sample, student.transformer(x, 500, prompt).sample
    assert torch.equal(found, expected) and not torch.allclose(found, plain, atol=1e-3)


BOTH = (
    "TwinFlow is only supported for flow-matching models. Enable diff2flow bridging explicitly to run with "
    "epsilon/v_prediction targets."
)
UNAVAILABLE = "TwinFlow diff2flow bridge requested but unavailable."
ABSENT = "alphas_cumprod tensor is required to build a DiffusionToFlowBridge."
UNSUPPORTED = "Unsupported prediction_type for diff2flow bridge: "
ALPHAS = sd15_scheduler().alphas_cumprod
ZERO = DDIMScheduler(rescale_betas_zero_snr=True)
TEXT = "load: transformer must be a text-to-image UNet with "
REFUSED = [
    *((dict.fromkeys(OPT_IN, False) | {name: True}, {}, BOTH) for name in ("", *OPT_IN)),
    (dict(scheduler=FlowMatchEulerDiscreteScheduler()), {}, UNAVAILABLE),
    (dict(scheduler=None, prediction_type="eps"), {}, ABSENT),
    *(
        (dict(scheduler=None, alphas_cumprod=ALPHAS, prediction_type=k), {}, f"{UNSUPPORTED}{k}")
        for k in ("sample", None)
    ),
    (dict(prediction_type="v"), {}, "must be None beside a scheduler"),
    (dict(timesteps="linear"), {}, "timesteps must be one of fractional, nearest"),
    (dict(scheduler=ZERO), {}, "must be v_prediction where alphas_cumprod reaches 0"),
    (dict(conditioning="dual"), dict(time_embedding_type="fourier"), "UNet with fourier time features"),
    ({}, dict(in_channels=9), f"{TEXT}in_channels 4, got 9"),
    ({}, dict(num_class_embeds=3), f"{TEXT}num_class_embeds None, got 3"),
    ({}, dict(class_embed_type="timestep"), f"{TEXT}class_embed_type None, got 'timestep'"),
    ({}, dict(addition_embed_type="text"), f"{TEXT}addition_embed_type None or 'text_time', got 'text'"),
]


@pytest.mark.parametrize("options, changes, message", REFUSED)
def test_refused(options, changes, message):
    unet = tiny_unet(**changes)
    names = list(unet.state_dict())
    options = {"scheduler": sd15_scheduler()} | OPT_IN | {name: value for name, value in options.items() if name}
    with pytest.raises(ValueError, match=re.escape(message)):
        UNetModel(unet, **options)
    assert list(unet.state_dict()) == names


def test_what_can_be_bridged():
    assert UNetModel(tiny_unet(), scheduler=sd15_scheduler(), **OPT_IN).prediction_type == "epsilon"
    zero = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert UNetModel(tiny_unet(), scheduler=zero, **OPT_IN).bridge.sigma_range[1] == 1
    v = UNetModel(tiny_unet(), alphas_cumprod=ALPHAS, prediction_type="vpred", **OPT_IN)
    assert v.prediction_type == "v_prediction"


@pytest.mark.parametrize("zeros", [True, False])
def test_the_unconditional_condition_of_sdxl_is_the_stock_pipelines(zeros):
    """Without a negative prompt it guides away from zeros, unless its configuration says otherwise."""
    tokenizer = clip_tokenizer()
    encoders = clip_text_encoder(tokenizer, 8), clip_text_encoder(tokenizer, 16, projected=True)
    unet = tiny_unet(cross_attention_dim=24, **SDXL)
    pipe = StableDiffusionXLPipeline(
        None, *encoders, tokenizer, tokenizer, unet, sd15_scheduler(), force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )  # fmt: skip
    model = UNetModel(unet, scheduler=pipe.scheduler, **OPT_IN)
    cat, negative, pooled, negative_pooled = pipe.encode_prompt("a cat", negative_prompt=None)
    uncond = model.encode_negative_prompt(pipe, [""])
    assert torch.equal(uncond["prompt_embeds"], negative) and bool(negative.any()) != zeros
    assert torch.equal(uncond["pooled_prompt_embeds"], negative_pooled)
    both = model.encode_prompt(pipe, ["", "a cat"])
    torch.testing.assert_close(both["prompt_embeds"], torch.cat([negative, cat]))
    torch.testing.assert_close(both["pooled_prompt_embeds"], torch.cat([negative_pooled, pooled]))
