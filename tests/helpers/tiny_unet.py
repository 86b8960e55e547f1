"""Tiny UNets of Stable Diffusion's shape as students, and what their tests ask them."""

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from twinflow.models.unet import UNetModel

SHAPE, WIDTH, TOKENS = (4, 8, 8), 8, 5
OPT_IN = {"diff2flow_enabled": True, "twinflow_allow_diff2flow": True}
KINDS = ("epsilon", "v_prediction")


def tiny_unet(cls=UNet2DConditionModel, **changes):
    return cls(**dict(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=WIDTH, norm_num_groups=4,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ) | changes)  # fmt: skip


def sd15_scheduler(kind="epsilon"):
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        timestep_spacing="trailing", prediction_type=kind,
    )  # fmt: skip


def tiny_model(kind="epsilon", unet=None, **options):
    return UNetModel(unet or tiny_unet(), scheduler=sd15_scheduler(kind), **OPT_IN, **options)


def prompts(batch, dtype=torch.float32, **more):
    return {"prompt_embeds": torch.randn(batch, TOKENS, WIDTH, dtype=dtype)} | more
