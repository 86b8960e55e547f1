"""SD3 and SD3.5 as students."""

from typing import Any, ClassVar

import torch

from twinflow.conditioning import TimeEmbedder
from twinflow.models.base import FlowModel, Published
from twinflow.models.modulation import Modulation


class SD3Model(FlowModel):
    """F(x_t, t, r, cond) of an SD3Transformer2DModel; cond: `prompt_embeds`, `pooled_prompt_embeds`.

    Prompts keep their padding: the model was trained with all its tokens attended.
    """

    family = "sd3"
    transformer_class = "SD3Transformer2DModel"
    pipeline_class = "StableDiffusion3Pipeline"
    second_embedder = "time_text_embed_2.timestep_embedder"
    condition_settings: ClassVar = {
        "prompt_embeds": "joint_attention_dim",
        "pooled_prompt_embeds": "pooled_projection_dim",
    }
    block_lists = (("num_layers", "transformer_blocks"),)
    special_blocks = "dual_attention_layers"
    published = (
        Published(
            "sd3.5-medium", dict(
                sample_size=128, num_layers=24, num_attention_heads=24, joint_attention_dim=4096,
                caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=384,
                qk_norm="rms_norm", dual_attention_layers=tuple(range(13))
            ),
            latent_channels=16, text_tokens=333, lora_rank=64, text_encoder_gb=11.2,
            repositories=("stabilityai/stable-diffusion-3.5-medium",),
        ),
        Published(
            "sd3.5-large", dict(
                sample_size=128, num_layers=38, num_attention_heads=38, joint_attention_dim=4096,
                caption_projection_dim=2432, pooled_projection_dim=2048, pos_embed_max_size=192,
                qk_norm="rms_norm"
            ),
            latent_channels=16, text_tokens=333, lora_rank=64, text_encoder_gb=11.2,
            repositories=("stabilityai/stable-diffusion-3.5-large", "stabilityai/stable-diffusion-3.5-large-turbo"),
        ),
    )  # fmt: skip
    tiny: ClassVar = dict(
        sample_size=8, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, caption_projection_dim=32, pooled_projection_dim=40, pos_embed_max_size=16,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
        "attn.add_v_proj", "attn.to_add_out", "timestep_embedder.linear_1", "timestep_embedder.linear_2",
    )  # fmt: skip
    modulation = Modulation(
        "time_text_embed", ("transformer_blocks", "norm_out"),
        ("norm1.linear", "norm1_context.linear", "norm_out.linear"),
    )  # fmt: skip

    def time_embedder(self) -> TimeEmbedder:
        return TimeEmbedder("time_text_embed.timestep_embedder", self.second_embedder)

    def longest_edge(self) -> int:
        return self.config.pos_embed_max_size * self.config.patch_size

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, cond: dict[str, Any], lengths: list[int]) -> torch.Tensor:
        return self.transformer(
            hidden_states=x_t,
            timestep=t * 1000,
            encoder_hidden_states=cond["prompt_embeds"].to(x_t.dtype),
            pooled_projections=cond["pooled_prompt_embeds"].to(x_t.dtype),
            return_dict=False,
        )[0]

    def encode_prompt(self, pipe: Any, prompts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, **options)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
