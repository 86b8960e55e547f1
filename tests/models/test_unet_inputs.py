"""What UNet students take: conditions of Stable Diffusion 1.5 and XL, stock encoders, opt-ins; and what they refuse."""

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusionXLPipeline
from helpers.tiny_pipelines import saved_pipeline
from helpers.tiny_text import clip_text_encoder, clip_tokenizer
from helpers.tiny_unet import OPT_IN, SHAPE, prompts, sd15_scheduler, tiny_model, tiny_unet

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


def message(call):
    with pytest.raises(ValueError) as raised:
        call()
    return str(raised.value)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("allowed", [False, True])
def test_it_needs_both_opt_ins(enabled, allowed):
    unet, scheduler = tiny_unet(), sd15_scheduler()
    options = {"diff2flow_enabled": enabled, "twinflow_allow_diff2flow": allowed, "conditioning": "dual"}
    if enabled and allowed:
        assert UNetModel(unet, scheduler=scheduler, **options).prediction_type == "epsilon"
        return
    assert message(lambda: UNetModel(unet, scheduler=scheduler, **options)) == (
        "TwinFlow is only supported for flow-matching models. Enable diff2flow bridging explicitly to run with "
        "epsilon/v_prediction targets."
    )
    assert not hasattr(unet, "time_embedding_2")


def test_what_cannot_be_bridged_is_refused():
    unet, alphas = tiny_unet(), sd15_scheduler().alphas_cumprod
    unavailable = "TwinFlow diff2flow bridge requested but unavailable."
    flow = FlowMatchEulerDiscreteScheduler()
    assert message(lambda: UNetModel(unet, scheduler=flow, **OPT_IN)) == unavailable
    absent = "alphas_cumprod tensor is required to build a DiffusionToFlowBridge."
    assert message(lambda: UNetModel(unet, prediction_type="eps", **OPT_IN)) == absent
    for kind in ("sample", None):
        wanted = f"Unsupported prediction_type for diff2flow bridge: {kind}"
        both = {"alphas_cumprod": alphas, "prediction_type": kind, **OPT_IN}
        assert message(lambda both=both: UNetModel(unet, **both)) == wanted
    given = {"scheduler": sd15_scheduler(), "prediction_type": "v", **OPT_IN}
    assert "must be None beside a scheduler" in message(lambda: UNetModel(unet, **given))
    assert "timesteps must be one of fractional, nearest" in message(lambda: tiny_model(timesteps="linear"))
    zero = DDIMScheduler(rescale_betas_zero_snr=True)
    assert "must be v_prediction where alphas_cumprod reaches 0" in message(
        lambda: UNetModel(unet, scheduler=zero, **OPT_IN)
    )
    zero.register_to_config(prediction_type="v_prediction")
    assert UNetModel(unet, scheduler=zero, **OPT_IN).bridge.sigma_range[1] == 1
    assert UNetModel(unet, alphas_cumprod=alphas, prediction_type="vpred", **OPT_IN).prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"in_channels": 9}, "in_channels 4, got 9"),
        ({"num_class_embeds": 3}, "num_class_embeds None, got 3"),
        ({"class_embed_type": "timestep"}, "class_embed_type None, got 'timestep'"),
        ({"addition_embed_type": "text"}, "addition_embed_type None or 'text_time', got 'text'"),
    ],
)
def test_other_unets_are_refused(changes, name):
    assert message(lambda: tiny_model(unet=tiny_unet(**changes))) == (
        f"load: transformer must be a text-to-image UNet with {name}"
    )
    fourier = tiny_unet(time_embedding_type="fourier")
    assert "UNet with fourier time features" in message(lambda: tiny_model(unet=fourier, conditioning="dual"))
