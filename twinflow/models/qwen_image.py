"""Qwen-Image as a student."""

from typing import Any, ClassVar

import torch

from twinflow.conditioning import TimeEmbedder
from twinflow.errors import require
from twinflow.models.autoencoders import FrameAutoencoder
from twinflow.models.base import FlowModel, Published
from twinflow.models.modulation import Modulation
from twinflow.models.packing import pack, unpack
from twinflow.models.prompts import host_lengths


class QwenImageModel(FlowModel):
    """F(x_t, t, r, cond) of a QwenImageTransformer2DModel.

    cond: `prompt_embeds`, and `prompt_lengths` or `prompt_mask`.
    """

    family = "qwen_image"
    transformer_class = "QwenImageTransformer2DModel"
    pipeline_class = "QwenImagePipeline"
    second_embedder = "time_text_embed_2.timestep_embedder"
    condition_settings: ClassVar = {"prompt_embeds": "joint_attention_dim"}
    guidance_argument = "true_cfg_scale"
    guidance_off = 1.0
    packs_latents = True
    comfyui = True
    autoencoder = FrameAutoencoder
    block_lists = (("num_layers", "transformer_blocks"),)
    published = (
        Published(
            "qwen-image", dict(),
            latent_channels=16, text_tokens=256, lora_rank=64, text_encoder_gb=16.6,
            repositories=("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"),
        ),
    )  # fmt: skip
    tiny: ClassVar = dict(
        in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "attn.to_add_out",
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
        "timestep_embedder.linear_1", "timestep_embedder.linear_2",
    )  # fmt: skip
    modulation = Modulation(
        "time_text_embed", ("transformer_blocks", "norm_out"), ("img_mod.1", "txt_mod.1", "norm_out.linear")
    )

    def time_embedder(self) -> TimeEmbedder:
        wanted = "None for an edit model that embeds time 0 too"
        require(not self.config.zero_cond_t, "load", "conditioning", wanted, "a mode")
        return TimeEmbedder("time_text_embed.timestep_embedder", self.second_embedder)

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, cond: dict[str, Any], lengths: list[int]) -> torch.Tensor:
        batch, _, height, width = x_t.shape
        tokens = self.transformer(
            hidden_states=pack(x_t),
            timestep=t,
            encoder_hidden_states=cond["prompt_embeds"].to(x_t.dtype),
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def encode_prompt(self, pipe: Any, prompts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        embeds, mask = pipe.encode_prompt(prompts, **options)
        lengths = torch.full((len(prompts),), embeds.shape[1]) if mask is None else host_lengths(mask)
        return {"prompt_embeds": embeds, "prompt_lengths": lengths}
